"""The server's optimisers are the published formulas, whatever the blocks, and their state goes from round to round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gptfl_dist.aggregation.mean import narrow, numbers
from gptfl_dist.aggregation.server import advance, first_moments, stepping
from gptfl_dist.config.strategy import Strategy
from gptfl_dist.errors import StorageError
from gptfl_dist.weights import Layout, WeightsFile

LAYOUT = Layout.of([("w", (10,), "F32"), ("seen", (3,), "I64")])
ADAPTIVE = ("adam", "yogi", "adagrad")
updates = arrays(np.float64, (4, 3), elements=st.floats(-10, 10))
momenta = st.floats(0, 0.99)


def trajectory(strategy: Strategy, means: np.ndarray) -> list[np.ndarray]:
    """What each round adds to the weights."""
    moments = first_moments(strategy, means.shape[1])
    added = []
    for mean in means:
        increase, moments = advance(strategy, mean, moments)
        added.append(increase)
    return added


@given(updates, momenta, st.floats(0.01, 2))
def test_sgd_is_that_of_torch(means, momentum, rate):
    strategy = Strategy(optimizer="sgd", learning_rate=rate, momentum=momentum)
    weights = torch.zeros(means.shape[1], dtype=torch.float64, requires_grad=True)
    reference = torch.optim.SGD([weights], lr=rate, momentum=momentum)
    total = np.zeros(means.shape[1])
    for mean, increase in zip(means, trajectory(strategy, means), strict=True):
        weights.grad = torch.from_numpy(-mean)  # a mean update points where a gradient points away from
        reference.step()
        total += increase
        np.testing.assert_allclose(total, weights.detach().numpy(), atol=1e-9)


@given(updates, momenta, st.floats(0, 0.999), st.floats(1e-4, 1.0))
def test_the_adaptive_ones_are_algorithm_2_of_reddi(means, momentum, second_momentum, tau):
    for optimizer in ADAPTIVE:
        strategy = Strategy(
            optimizer=optimizer, learning_rate=0.5, momentum=momentum, second_momentum=second_momentum, adaptivity=tau
        )
        for column in range(means.shape[1]):
            first, second, expected = 0.0, tau**2, []
            for delta in means[:, column]:
                first = momentum * first + (1 - momentum) * delta
                if optimizer == "adam":
                    second = second_momentum * second + (1 - second_momentum) * delta**2
                elif optimizer == "adagrad":
                    second += delta**2
                else:
                    second -= (1 - second_momentum) * delta**2 * np.sign(second - delta**2)
                expected.append(0.5 * first / (second**0.5 + tau))
            got = [increase[column] for increase in trajectory(strategy, means)]
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", ADAPTIVE)
def test_an_adaptive_step_hardly_depends_on_the_size_of_the_updates(optimizer):
    strategy = Strategy(optimizer=optimizer, momentum=0, learning_rate=0.01, adaptivity=1e-9)
    small, large = (np.abs(trajectory(strategy, np.full((1, 1), size))[0]) for size in (0.01, 10.0))
    np.testing.assert_allclose(small, large, rtol=1e-3)


def steps(folder: Path, strategy: Strategy, rounds: int, cuts: list[int]) -> np.ndarray:
    """The sum of what several rounds add, each block by block, cut at these places."""
    total = np.zeros(LAYOUT.parameters)
    for round_ in range(rounds):
        before = total.copy()
        old = folder / f"{round_ - 1}.safetensors" if round_ else None
        mean = np.sin(np.arange(LAYOUT.parameters) + round_)
        with stepping(strategy, LAYOUT, old, folder / f"{round_}.safetensors", durable=False) as optimizer:
            for start, stop in zip([0, *cuts], [*cuts, LAYOUT.parameters], strict=True):
                total[start:stop] = optimizer.step(start, before[start:stop], mean[start:stop])
    return total


@pytest.mark.parametrize("strategy", [Strategy(momentum=0.9), *(Strategy(optimizer=name) for name in ADAPTIVE)])
def test_the_result_is_bitwise_the_same_whatever_the_blocks(tmp_path, strategy):
    results = []
    for number, cuts in enumerate(([], [1, 4], list(range(1, LAYOUT.parameters)))):
        folder = tmp_path / str(number)
        folder.mkdir()
        results.append(steps(folder, strategy, 3, cuts))
    assert all(np.array_equal(results[0], other) for other in results[1:])
    means = np.stack([np.sin(np.arange(LAYOUT.parameters) + round_) for round_ in range(3)])
    np.testing.assert_allclose(results[0], sum(trajectory(strategy, means)), rtol=1e-5, atol=1e-6)


def test_plain_averaging_keeps_no_file(tmp_path):
    steps(tmp_path, Strategy(), 2, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_weights_in_half_precision_step_from_a_full_precision_master(tmp_path, dtype):
    """A hundred steps, each too small to show in a half of 1.0, add up; single precision beside it is kept as it is."""
    layout = Layout.of([("half", (5,), dtype), ("single", (3,), "F32")])
    weights = np.ones(layout.parameters)
    for round_ in range(100):
        old = tmp_path / f"{round_ - 1}.safetensors" if round_ else None
        with stepping(Strategy(), layout, old, tmp_path / f"{round_}.safetensors", durable=False) as optimizer:
            single = optimizer.step(0, weights[:3], np.full(3, 1e-4))
            half = optimizer.step(3, weights[3:], np.full(5, 1e-4))
        weights = np.concatenate([single, np.frombuffer(rounded(half, dtype), "<f4")]).astype(np.float64)
    np.testing.assert_allclose(weights, 1.01, rtol=4e-3)
    with WeightsFile(tmp_path / "99.safetensors") as state:
        assert state.layout.tensors[0].name == "master"
        assert state.nbytes == 5 * 4


def rounded(values: np.ndarray, dtype: str) -> bytes:
    """What the weights file keeps of these numbers, as float32."""
    return numbers(narrow(values, dtype).data.cast("B"), dtype).astype("<f4").tobytes()


def test_a_state_of_another_strategy_is_refused(tmp_path):
    steps(tmp_path, Strategy(momentum=0.9), 1, [])
    adam = Strategy(optimizer="adam")
    with (
        pytest.raises(StorageError, match="no state of this strategy"),
        stepping(adam, LAYOUT, tmp_path / "0.safetensors", tmp_path / "1.safetensors", durable=False),
    ):
        pass
    assert not (tmp_path / "1.safetensors").exists()


def test_what_is_left_out_is_what_suits_the_optimiser():
    assert (Strategy().step, Strategy().first_momentum) == (1.0, 0.0)
    assert (Strategy(optimizer="adam").step, Strategy(optimizer="adam").first_momentum) == (0.01, 0.9)
    assert Strategy(optimizer="adagrad").first_momentum == 0.0
    given = Strategy(optimizer="yogi", learning_rate=0.5, momentum=0.0)
    assert (given.step, given.first_momentum) == (0.5, 0.0)

"""What is chosen in a run, the learning rate and the model that is kept, is chosen on the silos' validation data."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from federated import (
    ARM,
    DEADLINE,
    ROUNDS,
    SAMPLES,
    START,
    Metrics,
    World,
    in_loop,
    mean_step,
    value_of,
)

from gptfl_dist.errors import FederationError, TrainerError
from gptfl_dist.federation.orders import Order
from gptfl_dist.run.arm import trial_name
from gptfl_dist.run.federate import RoundFailed
from gptfl_dist.testing.clock import advance
from gptfl_dist.weights import WeightsFile

# What is chosen


def accuracies(*by_round: float) -> Callable[[str, Order], Metrics]:
    """The accuracy of the weights after round 0, 1, 2 ... as every silo measures it."""
    return lambda silo, order: {"accuracy": by_round[order.round - 1], "loss": 1.0}


@pytest.mark.parametrize("test_data_say", [lambda value: value / 1000, lambda value: 1 - value / 1000])
@in_loop
async def test_the_best_round_is_that_of_the_silos_validation_data_whatever_the_test_data_say(
    tmp_path: Path, test_data_say: Callable[[float], float]
) -> None:
    async with World(tmp_path, script=accuracies(0.1, 0.4, 0.8, 0.6), accuracy=test_data_say) as world:
        record = await world.federate()
    assert record.best_round == 2
    assert value_of(world.model(ARM)) == START + 2 * mean_step(SAMPLES)
    assert world.value() == START + 3 * mean_step(SAMPLES)
    for r in (1, 2, 3):
        found = record.rounds[r - 1].tested
        assert found is not None
        assert found.accuracy == test_data_say(START + r * mean_step(SAMPLES))


@in_loop
async def test_the_models_that_are_published_are_those_of_the_ledger(tmp_path: Path) -> None:
    async with World(tmp_path, script=accuracies(0.9, 0.4, 0.8, 0.6)) as world:
        record = await world.federate()
    assert record.best_round == 0
    for name, digest in ((ARM, record.weights_of(0)), (f"{ARM}-final", record.final)):
        with WeightsFile(world.model(name)) as weights:
            assert weights.digest() == digest
    kept = {path.stem for path in (world.file.run_folder / "weights").iterdir()}
    assert kept == {record.start, record.final}


@in_loop
async def test_the_last_round_is_kept_where_silos_withhold_their_metrics(tmp_path: Path) -> None:
    async with World(tmp_path, script=accuracies(0.1, 0.9, 0.2, 0.3), released=[]) as world:
        record = await world.federate()
    assert record.best_round == ROUNDS
    assert value_of(world.model(ARM)) == START + ROUNDS * mean_step(SAMPLES)
    assert all(not order.metrics for r in record.rounds for order in r.orders)


# Tuning


def by_rate(scores: dict[float, float]) -> Callable[[str, Order], Metrics]:
    """Accuracy by the rate of the trial; a rate without one cannot be trained with."""

    def script(silo: str, order: Order) -> Metrics:
        if order.kind == "train":
            assert order.training is not None
            if order.training.learning_rate not in scores:
                raise TrainerError("the training loss became nan")
            return {"accuracy": 0.5}
        for rate, accuracy in scores.items():
            if order.arm == trial_name(ARM, rate):
                return {"accuracy": accuracy}
        return {"accuracy": 0.5}

    return script


@in_loop
async def test_the_rate_is_chosen_by_validation_accuracy_and_one_that_cannot_be_trained_with_is_out(
    tmp_path: Path,
) -> None:
    script = by_rate({0.125: 0.3, 0.25: 0.6, 0.5: 0.4})
    async with World(tmp_path, rates=[0.125, 1e30, 0.25, 0.5], script=script, rounds=1) as world:
        record = await world.federate()
    assert record.learning_rate == 0.25
    assert any("learning rate 1e+30 is out" in text for text in world.notes.texts)
    assert world.value() == START + mean_step(SAMPLES)  # trials leave the start weights alone


@in_loop
async def test_a_grid_without_any_usable_rate_ends_the_run(tmp_path: Path) -> None:
    async with World(tmp_path, rates=[1e29, 1e30], script=by_rate({})) as world:
        with pytest.raises(FederationError, match="no learning rate of the grid"):
            await world.federate()


@in_loop
async def test_a_missed_deadline_in_a_trial_condemns_no_rate_and_the_same_call_goes_on(tmp_path: Path) -> None:
    script = by_rate({0.25: 0.3, 0.5: 0.6})
    async with World(tmp_path, rates=[0.25, 0.5], script=script, rounds=1) as world:
        trial = trial_name(ARM, 0.5)
        late = world.network.hold("c", "upload", round=1, arm=trial)
        run = asyncio.create_task(world.federate())
        await late.reached.wait()
        await world.until(lambda: world.committed(1, trial) == {"a", "b"})
        advance(DEADLINE)
        with pytest.raises(FederationError, match="c: missed the deadline") as stopped:
            await run
        assert not isinstance(stopped.value, RoundFailed)
        assert not world.record(trial).finished
        late.release()
        record = await world.federate()
    assert record.learning_rate == 0.5
    assert world.trained("a") == [(trial_name(ARM, 0.25), 1), (trial, 1), (ARM, 1)]


@in_loop
async def test_rates_cannot_be_tuned_where_silos_withhold_their_accuracy(tmp_path: Path) -> None:
    async with World(tmp_path, rates=[0.25, 0.5], released=["loss"]) as world:
        with pytest.raises(FederationError, match="no silo reported an accuracy"):
            await world.federate()

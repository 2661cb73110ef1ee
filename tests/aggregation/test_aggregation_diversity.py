"""Gradient diversity is its definition, over the parameters alone, and does not ask who came first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from flat_buffers import Flat, flat_of
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.aggregation.diversity import Diversity, diversity_of
from gptfl_dist.aggregation.mean import BLOCK_ELEMENTS
from gptfl_dist.weights import FLOATS, Layout


def of(*rows: Sequence[float], dtype: str = "F64") -> Diversity:
    """Of updates with these numbers."""
    layout = Layout.of([("w", (len(rows[0]),), dtype)])
    kind = {"F64": "<f8", "F32": "<f4"}[dtype]
    updates = {f"silo-{number}": Flat(np.array(row, kind).tobytes()) for number, row in enumerate(rows)}
    return diversity_of(layout, {"w"}, updates)


@pytest.mark.parametrize(
    ("rows", "diversity", "log_n_diversity", "cosine"),
    [
        pytest.param([[3, 4]] * 5, 1 / 5, 0, 1, id="equal"),
        pytest.param([[2, 0, 0], [0, 3, 0], [0, 0, 7]], 1, math.log(3), 0, id="orthogonal"),
        pytest.param([[3, 4]], 1, 0, None, id="one silo"),
        pytest.param([[2, 0], [-1, 0]], 5, math.log(10), -1, id="against each other"),
        pytest.param([[1, 0], [100, 0]], 10001 / 10201, math.log(20002 / 10201), 1, id="one goes far"),
        pytest.param([[0, 0], [3, 4]], 1, math.log(2), None, id="one did not move"),
        pytest.param([[0, 0], [1, 0], [0, 1]], 1, math.log(3), 0, id="the cosine is of those that moved"),
        pytest.param([[1, 2], [-1, -2]], None, None, -1, id="nothing comes of them"),
        pytest.param([[0, 0], [0, 0]], None, None, None, id="nobody moved"),
        pytest.param([[1e200, 0], [1e200, 0]], None, None, None, id="too large for a number"),
    ],
)
def test_closed_forms(
    rows: list[list[float]], diversity: float | None, log_n_diversity: float | None, cosine: float | None
) -> None:
    found = of(*rows)
    assert found.updates == len(rows)
    for value, expected in zip(
        (found.diversity, found.log_n_diversity, found.mean_cosine), (diversity, log_n_diversity, cosine), strict=True
    ):
        assert value == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_drift_is_how_far_silos_went() -> None:
    found = of([3, 4], [0, 0], [6, 8])
    assert (found.mean_norm, found.max_norm) == (5, 10)


def test_buffers_and_counters_have_no_part() -> None:
    """As of a batch norm: its running mean lies between its parameters, of the same dtype."""
    names = {"a.bias": 3, "a.running_mean": 4, "a.weight": 5, "z": 2}
    layout = Layout.of([*((name, (size,), "F32") for name, size in names.items()), ("seen", (), "I64")])
    parameters = names.keys() - {"a.running_mean"}
    updates, rows = {}, []
    for seed in range(3):
        updates[str(seed)], tensors = flat_of(layout, seed)
        rows.append(np.concatenate([tensors[name].double().numpy() for name in sorted(parameters)]))
    found = diversity_of(layout, parameters, updates)
    assert found.diversity == pytest.approx(naive(np.array(rows))[0])
    with_all = diversity_of(layout, names.keys(), updates).diversity
    assert with_all is not None
    assert abs(with_all - found.diversity) > 1e-3


def test_several_blocks_are_one_update() -> None:
    rows = np.random.default_rng(0).standard_normal((3, BLOCK_ELEMENTS + 7)).astype("<f4")
    found = of(*rows, dtype="F32")
    assert (found.diversity, found.mean_cosine) == pytest.approx(naive(rows.astype(np.float64)))


@given(
    st.integers(1, 6), st.integers(0, 2**32), st.sampled_from([1e-6, 1.0, 1e4]), st.sampled_from(sorted(FLOATS)),
    st.randoms(),
)  # fmt: skip
def test_it_is_what_whole_updates_in_memory_give(count, seed, scale, dtype, order):
    layout = Layout.of([("a", (3, 5), dtype), ("b", (70,), "F32"), ("c", (9,), "I32"), ("d", (1,), "F64")])
    made = [flat_of(layout, seed + number, scale) for number in range(count)]
    rows = np.array([np.concatenate([tensors[n].double().numpy().ravel() for n in "abd"]) for _, tensors in made])
    updates = {str(number): flat for number, (flat, _) in enumerate(made)}
    found = diversity_of(layout, {"a", "b", "d"}, updates)
    diversity, cosine = naive(rows)
    assert found.diversity == pytest.approx(diversity, rel=1e-9)
    assert found.mean_cosine == (None if cosine is None else pytest.approx(cosine, abs=1e-9))
    norms = np.linalg.norm(rows, axis=1)
    assert (found.mean_norm, found.max_norm) == pytest.approx((norms.mean(), norms.max()))
    shuffled = list(updates.items())
    order.shuffle(shuffled)
    assert diversity_of(layout, {"a", "b", "d"}, dict(shuffled)) == found
    # By the inequality of Cauchy and Schwarz it is at least 1/n.
    assert found.log_n_diversity is not None
    assert found.log_n_diversity >= -1e-12


def naive(rows: np.ndarray) -> tuple[float, float | None]:
    """Diversity and mean cosine by their definitions."""
    diversity = float((rows**2).sum() / (rows.sum(axis=0) ** 2).sum())
    pairs = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for i, a in enumerate(rows) for b in rows[i + 1 :]]
    return diversity, float(np.mean(pairs)) if pairs else None

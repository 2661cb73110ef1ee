"""Each rule is its definition, bears as many malicious silos as it promises, and does not ask who came first.

The definitions are written out here once more over whole updates in memory, the geometric median is also what SciPy's
minimiser finds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from flat_buffers import Flat, flat_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from gptfl_dist.aggregation.blocks import blocks_of
from gptfl_dist.aggregation.rules import OURS, next_weights, rule_of
from gptfl_dist.aggregation.updates import Updates
from gptfl_dist.config.plan import LocalTraining
from gptfl_dist.config.strategy import ROBUST, RULES, Strategy
from gptfl_dist.errors import FederationError, ModelError
from gptfl_dist.weights import Layout

TRAINING = LocalTraining(
    epochs=1, batch_size=8, learning_rate=0.1, momentum=0.0, weight_decay=0.0, augmentation=False, threads=1
)


def layout_of(size: int, dtype: str = "F64") -> Layout:
    return Layout.of([("w", (size,), dtype), ("seen", (2,), "I64"), ("on", (1,), "BOOL")])


def updates_of(
    rows: np.ndarray, *, samples: Sequence[int] | None = None, seen: Sequence[int] | None = None,
    factors: Sequence[float] | None = None, trainings: Sequence[LocalTraining] | None = None, dtype: str = "F64",
) -> Updates:  # fmt: skip
    """Updates with these rows, each of a silo of so many samples that saw so many batches."""
    count = len(rows)
    layout = layout_of(rows.shape[1], dtype)
    kind = {"F64": "<f8", "F32": "<f4"}[dtype]
    counters = [np.full(2, batches, "<i8") for batches in seen or [1] * count]
    readers = []
    for row, counter in zip(rows, counters, strict=True):
        parts = {"w": row.astype(kind).tobytes(), "seen": counter.tobytes(), "on": b"\1"}
        readers.append(Flat(b"".join(parts[tensor.name] for tensor in layout.tensors)))
    return Updates(
        layout=layout,
        silos=tuple(f"silo-{number:03d}" for number in range(count)),
        readers=tuple(readers),
        samples=tuple(samples or [1] * count),
        trainings=tuple(trainings or [TRAINING] * count),
        factors=tuple(factors or [1.0] * count),
    )


def outcome(strategy: Strategy, updates: Updates) -> tuple[np.ndarray, np.ndarray]:
    """What the rule makes of the floating numbers, and what is added to the counters: the old weights are zero."""
    base = Flat(bytes(updates.layout.nbytes))
    flat = b"".join(
        next_weights(rule_of(strategy), strategy, base, updates, lambda place, weights, mean: weights + mean)
    )
    found = {t.name: flat[t.offset : t.offset + t.nbytes] for t in updates.layout.tensors}
    kinds = {t.name: t.dtype for t in updates.layout.tensors}
    assert found["on"] == b"\0"
    return np.frombuffer(found["w"], "<f4" if kinds["w"] == "F32" else "<f8"), np.frombuffer(found["seen"], "<i8")


def reference(rule: str, rows: np.ndarray, f: int) -> np.ndarray:
    """The definitions, over whole updates."""
    n = len(rows)
    if rule == "median":
        return np.median(rows, axis=0)
    if rule == "trimmed_mean":
        return np.array([np.mean(sorted(column)[f : n - f]) for column in rows.T])
    scores = []
    for i in range(n):
        others = sorted(float(np.sum((rows[i] - rows[j]) ** 2)) for j in range(n) if j != i)
        scores.append(sum(others[: n - f - 2]))
    best = sorted(range(n), key=lambda i: scores[i])
    return rows[best[0]] if rule == "krum" else np.mean(rows[best[: n - f - 2]], axis=0)


def test_every_rule_that_the_file_knows_is_there() -> None:
    assert set(OURS) == set(RULES)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "multi_krum"])
@pytest.mark.parametrize("dtype", ["F64", "F32"])
@given(f=st.integers(0, 3), more=st.integers(0, 4), size=st.integers(1, 20), seed=st.integers(0, 2**32))
@settings(max_examples=30)
def test_a_rule_is_its_definition(rule: str, dtype: str, f: int, more: int, size: int, seed: int) -> None:
    strategy = Strategy(rule=rule, malicious=f)
    rows = np.random.default_rng(seed).standard_normal((strategy.fewest + more, size))
    rows = rows.astype("<f4" if dtype == "F32" else "<f8")
    found, _ = outcome(strategy, updates_of(rows, dtype=dtype))
    expected = reference(rule, rows.astype(np.float64), f)
    np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype == "F32" else 1e-12, atol=1e-6)


@given(count=st.integers(3, 9), size=st.integers(2, 6), seed=st.integers(0, 2**32))
@settings(max_examples=30)
def test_the_geometric_median_has_the_least_sum_of_distances(count: int, size: int, seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((count, size))
    found, _ = outcome(Strategy(rule="geometric_median"), updates_of(rows))

    def total(point: np.ndarray) -> float:
        return float(np.linalg.norm(rows - point, axis=1).sum())

    best = min(
        (minimize(total, start, method="Nelder-Mead", options={"maxiter": 20_000, "fatol": 1e-12, "xatol": 1e-9})
         for start in (rows.mean(axis=0), np.median(rows, axis=0))),
        key=lambda result: result.fun,
    )  # fmt: skip
    assert total(found) <= best.fun * (1 + 1e-6)


def test_the_geometric_median_of_a_line_is_the_middle_point() -> None:
    rows = np.array([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0]])
    found, _ = outcome(Strategy(rule="geometric_median"), updates_of(rows))
    np.testing.assert_allclose(found, [1.0, 1.0], atol=1e-4)


ATTACKS = {
    "large": lambda honest, f: np.full((f, honest.shape[1]), 1e6),
    "endless": lambda honest, f: np.full((f, honest.shape[1]), -1e30),
    "opposite": lambda honest, f: np.tile(-20 * honest.mean(axis=0), (f, 1)),
    "apart": lambda honest, f: np.stack([(-1) ** i * 10.0 ** (i + 2) * np.ones(honest.shape[1]) for i in range(f)]),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", ROBUST)
@given(f=st.integers(1, 4), size=st.integers(1, 40), seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=25)
def test_up_to_its_bound_no_attack_leads_far_from_the_honest_updates(rule, attack, f, size, seed, data) -> None:
    """At the exact bound. What the mean makes of it lies as far off as the attackers like."""
    strategy = Strategy(rule=rule, malicious=f)
    random = np.random.default_rng(seed)
    honest = 1 + 0.1 * random.standard_normal((strategy.fewest - f, size))
    bad = ATTACKS[attack](honest, f)
    order = data.draw(st.permutations(range(strategy.fewest)))
    rows = np.concatenate([honest, bad])[order]
    seen = [[*[7] * len(honest), *[10**12] * f][place] for place in order]
    found, counters = outcome(
        strategy, updates_of(rows, seen=seen, samples=[10**9 if p >= len(honest) else 1 for p in order])
    )
    spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    # The geometric median's own bound at its breaking point is the loosest: 2 (n - f) / (n - 2f) times the spread.
    assert np.linalg.norm(found - honest.mean(axis=0)) <= 2 * (f + 1) * spread + 1e-6
    assert counters.tolist() == [7, 7]
    mean, counters = outcome(Strategy(), updates_of(rows, seen=seen))
    assert np.linalg.norm(mean - honest.mean(axis=0)) > 2 * (f + 1) * spread
    assert counters.tolist() == [10**12, 10**12]


@pytest.mark.parametrize("rule", RULES)
@given(order=st.permutations(range(7)), seed=st.integers(0, 2**32))
@settings(max_examples=10)
def test_the_result_is_bitwise_the_same_whatever_the_order(rule: str, order: list[int], seed: int) -> None:
    """Readers by name in another order; `run.federate` sorts them, as this does."""
    layout = Layout.of([("a", (300,), "F64"), ("b", (77,), "BF16"), ("c", (41,), "F16"), ("n", (3,), "I32")])
    base, _ = flat_of(layout, seed)
    by_name = {f"s{number}": flat_of(layout, seed + 1 + number)[0] for number in range(7)}
    results = []
    for names in (range(7), order):
        silos = tuple(sorted(f"s{number}" for number in names))
        updates = Updates(layout, silos, tuple(by_name[s] for s in silos), (3,) * 7, (TRAINING,) * 7, (1.0,) * 7)
        strategy = Strategy(rule=rule)
        results.append(b"".join(next_weights(OURS[rule], strategy, base, updates, lambda place, w, mean: w + mean)))
    assert results[0] == results[1]
    assert len(results[0]) == layout.nbytes


@pytest.mark.parametrize("rule", RULES)
def test_a_model_of_several_blocks_and_dtypes_is_combined_as_one_of_one_block(rule: str, monkeypatch) -> None:
    layout = Layout.of([("a", (700,), "F64"), ("b", (900,), "F32"), ("c", (300,), "BF16"), ("n", (600,), "I64")])
    silos = tuple(f"s{number}" for number in range(6))
    readers = tuple(flat_of(layout, number, 0.1)[0] for number in range(6))
    updates = Updates(layout, silos, readers, (3, 1, 4, 1, 5, 9), (TRAINING,) * 6, (1.0, 0.5, 1.0, 1.0, 0.25, 1.0))
    base, _ = flat_of(layout, 99)
    strategy = Strategy(rule=rule)
    results = []
    for elements in (256, 10_000):
        monkeypatch.setattr(Updates, "elements", property(lambda self, elements=elements: elements))
        whole = Updates(**{name: getattr(updates, name) for name in Updates.__dataclass_fields__})
        flat = b"".join(next_weights(OURS[rule], strategy, base, whole, lambda place, w, mean: w + mean))
        results.append(np.frombuffer(flat[: 8 * 700], "<f8"))
    assert len(list(blocks_of(layout, 256))) > len(list(blocks_of(layout, 10_000)))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_an_update_that_counts_half_is_half_as_long_to_the_rule(rule: str) -> None:
    rows = np.random.default_rng(3).standard_normal((7, 9))
    factors = [1.0, 0.5, 1.0, 0.25, 1.0, 1.0, 0.5]
    scaled, _ = outcome(Strategy(rule=rule), updates_of(rows * np.array(factors)[:, None]))
    found, _ = outcome(Strategy(rule=rule), updates_of(rows, factors=factors))
    np.testing.assert_allclose(found, scaled, rtol=1e-9)


def test_the_even_number_of_a_counter_takes_the_lower_of_the_middle() -> None:
    rows = np.zeros((4, 1))
    _, counters = outcome(Strategy(rule="median"), updates_of(rows, seen=[3, 9, 5, 10**15]))
    assert counters.tolist() == [5, 5]


def test_a_rule_of_ones_own_may_weigh_updates_or_combine_blocks() -> None:
    rows = np.arange(12.0).reshape(4, 3)
    updates = updates_of(rows)
    base = Flat(bytes(updates.layout.nbytes))
    for rule in (lambda u, s: np.array([0, 0.5, 0.5, 0]), lambda u, s: lambda block: block[1:3].mean(axis=0)):
        flat = b"".join(next_weights(rule, Strategy(rule="mine:rule"), base, updates, lambda place, w, mean: w + mean))
        (place,) = (t.offset for t in updates.layout.tensors if t.name == "w")
        assert np.frombuffer(flat[place : place + 24], "<f8").tolist() == [4.5, 5.5, 6.5]


def broken(updates, strategy):
    raise ZeroDivisionError("no updates of mine")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (broken, r"strategy\.rule mine:rule failed: ZeroDivisionError: no updates of mine"),
        (lambda u, s: [1.0], r"returned float64 of shape \(1,\), expected 4 finite numbers"),
        (lambda u, s: np.full(4, np.nan), "expected 4 finite numbers"),
        (lambda u, s: lambda block: block, r"of shape \(4, 3\), expected 3 finite numbers"),
        (lambda u, s: lambda block: 1 / 0, "failed: ZeroDivisionError"),
        (lambda u, s: "mean", "expected 4 finite numbers"),
    ],
)
def test_a_rule_that_fails_is_named_with_what_it_did(rule, said: str) -> None:
    updates = updates_of(np.ones((4, 3)))
    with pytest.raises(FederationError, match=said):
        b"".join(next_weights(rule, Strategy(rule="mine:rule"), Flat(bytes(1000)), updates, lambda p, w, m: w + m))


def test_code_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match=r"strategy\.rule no_such_module:rule cannot be imported"):
        rule_of(Strategy(rule="no_such_module:rule"))

"""From outcomes of cells to the rows of a table: target, rounds and bytes to it, pairs, and what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace

import pytest
from finished_run import arm
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.config.experiment import Group, Silos
from gptfl_dist.observe.matrix import Outcome, Row, Spread, outcome_of, rows_of
from gptfl_dist.observe.matrix_cost import Cost
from gptfl_dist.observe.matrix_measures import Known
from gptfl_dist.observe.summary import ServerStage, StageCost

RANDOM = frozenset({"random"})


def group(start: str = "random", strategy: str = "fedavg", silos: Silos = "all", split: str = "even") -> Group:
    return Group(split, start, strategy, silos)


def outcome(*curve: float, start: float = 0.1, bytes_a_round: float = 100) -> Outcome:
    sent: Known = {"bytes_down": bytes_a_round - 40, "bytes_up": 40}
    rounds: list[Known] = [{"bytes_down": 0, "bytes_up": 0}, *[sent] * len(curve)]
    cost = Cost(0.0, 0.0, None, 0)
    return Outcome(start, curve, max(curve), curve[-1] - 0.1, bytes_a_round, cost, tuple(rounds), ())


def by_group(found: Mapping[Group, Mapping[int, Outcome]]) -> dict[Group, Row]:
    return {row.group: row for row in rows_of(found, RANDOM)}


def test_a_small_matrix_by_hand() -> None:
    fedavg, fedprox, ours = group(), group(strategy="fedprox"), group("synthetic")
    rows = by_group(
        {
            fedavg: {0: outcome(0.2, 0.4), 1: outcome(0.3, 0.6), 2: outcome(0.4, 0.8)},
            fedprox: {0: outcome(0.2, 0.4), 1: outcome(0.3, 0.5), 2: outcome(0.5, 0.6)},
            ours: {0: outcome(0.7, 0.6, start=0.5), 1: outcome(0.5, 0.7), 2: outcome(0.5, 0.55, bytes_a_round=70)},
        }
    )
    assert list(rows) == [fedavg, fedprox, ours]
    assert rows[fedavg].accuracy.mean == pytest.approx(0.6)
    assert rows[fedavg].accuracy.sd == pytest.approx(0.2)
    assert {row.baseline for row in rows.values()} == {fedavg}
    assert {row.target for row in rows.values()} == {rows[fedavg].accuracy.mean}
    assert rows[fedavg].pairs is None
    assert rows[fedavg].rounds_to_target == {0: None, 1: 2, 2: 2}

    assert rows[ours].kept.values == (0.7, 0.7, 0.55)
    assert rows[ours].start.values == (0.5, 0.1, 0.1)
    assert rows[ours].worst is None
    assert rows[ours].rounds_to_target == {0: 1, 1: 2, 2: None}
    assert rows[ours].bytes_to_target == {0: 100, 1: 200, 2: None}
    pairs = rows[ours].pairs
    assert pairs is not None
    assert pairs.by_seed == pytest.approx({0: 0.2, 1: 0.1, 2: -0.25})
    assert pairs.mean == pytest.approx(0.05 / 3)


def test_bytes_to_the_target_are_those_of_the_rounds_up_to_it() -> None:
    cell = outcome(0.2, 0.6, 0.7)
    with_samples: Known = {"bytes_down": 900, "bytes_up": 40}
    ours = replace(cell, measures=(cell.measures[0], with_samples, *cell.measures[2:]))
    rows = by_group({group(): {0: outcome(0.6)}, group("synthetic"): {0: ours}})
    assert rows[group("synthetic")].rounds_to_target == {0: 2}
    assert rows[group("synthetic")].bytes_to_target == {0: 940 + 100}


def test_one_seed_has_no_spread_and_none_has_no_mean() -> None:
    assert Spread({4: 0.5}).mean == 0.5
    assert Spread({4: 0.5}).sd is None
    assert Spread({}).mean is None
    assert Spread({}).sd is None


def test_each_split_has_its_own_baseline() -> None:
    rows = by_group(
        {
            group(split="even"): {0: outcome(0.9)},
            group(split="odd"): {0: outcome(0.3)},
            group(split="odd", strategy="fedprox"): {0: outcome(0.5)},
            group("synthetic", split="odd"): {0: outcome(0.6)},
        }
    )
    assert rows[group("synthetic", split="odd")].baseline == group(split="odd", strategy="fedprox")
    assert rows[group(split="even")].target == 0.9


def test_only_federated_arms_from_random_weights_are_to_be_beaten() -> None:
    fedavg, alone, pooled = group(), group(silos="alone"), group(silos="pooled")
    rows = by_group(
        {
            pooled: {0: outcome(0.9)},
            alone: {0: outcome(0.8)},
            fedavg: {0: outcome(0.5)},
            group("synthetic"): {0: outcome(0.7)},
        }
    )
    assert {row.baseline for row in rows.values()} == {fedavg}
    assert rows[alone].worst == Spread({0: 0.8 - 0.1})
    assert rows[pooled].rounds_to_target == {0: 1}
    assert rows[pooled].bytes_to_target == {0: None}, "one silo with all data sends nothing"
    assert not rows[pooled].federated
    assert rows[fedavg].federated


def test_all_silos_go_before_a_cohort_and_a_cohort_before_nothing() -> None:
    cohort, ours = group(silos=5), group("synthetic", silos=5)
    found = {cohort: {0: outcome(0.6)}, ours: {0: outcome(0.7)}}
    assert by_group(found)[ours].baseline == cohort
    assert by_group({**found, group(): {0: outcome(0.5)}})[ours].baseline == group()


def test_without_an_arm_from_random_weights_there_is_no_target() -> None:
    (row,) = rows_of({group("synthetic"): {0: outcome(0.7), 1: outcome(0.8)}}, RANDOM)
    assert row.target is None
    assert row.baseline is None
    assert row.pairs is None
    assert row.rounds_to_target == {0: None, 1: None}
    assert row.accuracy.mean == pytest.approx(0.75)


def test_pairs_are_over_the_seeds_that_both_have() -> None:
    ours, other = group("synthetic"), group("synthetic", "fedprox")
    rows = by_group(
        {
            group(): {0: outcome(0.5), 1: outcome(0.7)},
            ours: {1: outcome(0.8), 2: outcome(0.1)},
            other: {2: outcome(0.9)},
        }
    )
    pairs = rows[ours].pairs
    assert pairs is not None
    assert pairs.by_seed == pytest.approx({1: 0.1})
    assert rows[other].pairs is None
    assert rows[other].baseline == group()


def test_a_lucky_seed_that_is_left_over_makes_no_baseline() -> None:
    rows = by_group(
        {
            group(): {0: outcome(0.5), 1: outcome(0.6)},
            group(strategy="fedprox"): {1: outcome(0.9)},
        }
    )
    assert rows[group()].baseline == group()


def test_validation_data_choose_of_the_arms_from_other_weights_and_test_data_do_not() -> None:
    def judged(validation: float | None, *curve: float) -> Outcome:
        return replace(outcome(*curve), validation=validation)

    found = {
        group(): {0: judged(0.99, 0.6)},
        group("synthetic"): {0: judged(0.8, 0.9)},
        group("synthetic", "moon"): {0: judged(0.9, 0.7)},
        group("synthetic", "fedprox"): {0: judged(None, 0.95)},
        group("synthetic", silos=3): {0: judged(0.95, 0.9)},
        group("synthetic", silos="pooled"): {0: judged(0.97, 0.9)},
        group("synthetic", split="odd"): {0: judged(0.1, 0.9)},
    }
    rows = by_group(found)
    assert rows[group()].chosen == rows[group("synthetic")].chosen == group("synthetic", "moon")
    assert rows[group("synthetic", split="odd")].chosen == group("synthetic", split="odd")
    assert rows[group("synthetic", "moon")].validation.mean == 0.9
    assert rows[group("synthetic", "fedprox")].validation.by_seed == {}
    assert by_group({group(): found[group()]})[group()].chosen is None
    private = {group("synthetic", "private"): {0: replace(judged(0.99, 0.5), personal=True)}}
    assert by_group({**found, **private})[group()].chosen == group("synthetic", "moon"), "not the model that is tested"
    assert by_group(private)[group("synthetic", "private")].chosen is None


def test_a_group_of_which_all_cells_failed_is_an_empty_row() -> None:
    failed = group(strategy="scaffold")
    rows = by_group({failed: {}, group(): {0: outcome(0.5)}})
    assert rows[failed].outcomes == {}
    assert rows[failed].accuracy.mean is None
    assert rows[failed].rounds_to_target == {}
    assert rows[failed].pairs is None
    assert rows[failed].baseline == group()
    nothing = by_group({failed: {}})[failed]
    assert nothing.target is None
    assert nothing.baseline is None


def test_silos_that_train_alone_are_one_outcome() -> None:
    first, second = arm([0.2, 0.6, 0.9]), arm([0.4, 0.8])
    found = outcome_of([first, second])
    assert found.curve == pytest.approx((0.3, 0.7))
    assert found.worst == pytest.approx(0.6)
    assert found.kept == pytest.approx(0.85)
    assert found.validation == pytest.approx((first.validation_curve[-1] + second.validation_curve[-1]) / 2)
    unknown = second.model_copy(update={"validation_curve": [0.5, None]})
    assert outcome_of([first, unknown]).validation is None
    assert found.start == pytest.approx(0.1)
    assert found.bytes_a_round == pytest.approx((10 + 3 * 190) / 3 + (10 + 2 * 190) / 2)
    assert len(found.measures) == 1 + 2, "the start, and the rounds that both have"
    after = found.measures[1]
    assert after["macro_f1"] == pytest.approx(0.3)
    assert after["worst_silo_accuracy"] == pytest.approx(0.2 - 0.1)
    assert (after["silo_seconds"], after["max_silo_seconds"], after["bytes_up"]) == (4.0, 1.5, 180)
    assert found.silo_accuracy[2] == pytest.approx({"north": 0.9, "south": 0.7})


def test_an_arm_that_was_good_enough_before_its_first_round_ends_at_its_start() -> None:
    met = arm([]).model_copy(update={"accuracy": 0.7, "start_accuracy": 0.7, "validation_accuracy": 0.6})
    found = outcome_of([met, arm([0.4, 0.8])])
    assert found.curve == ()
    assert found.worst == pytest.approx(0.1)
    assert found.final == found.start == pytest.approx(0.4)
    assert outcome_of([met]).validation == 0.6, "of the start, which is kept"
    rows = by_group({group(): {0: outcome(0.5)}, group("synthetic"): {0: outcome_of([met])}})
    ours = rows[group("synthetic")]
    assert ours.accuracy.mean == 0.7
    assert ours.rounds_to_target == {0: 0}
    assert ours.bytes_to_target == {0: 0}


def test_what_a_cell_cost() -> None:
    ours = arm([0.2, 0.6])
    cpu = StageCost(device_seconds=7, hardware="CPU, 2 threads")
    both: tuple[ServerStage, ...] = ("generate", "pretrain")
    cost = outcome_of([ours], {"generate": cpu, "pretrain": cpu}, both).cost
    assert (cost.generate, cost.pretrain, cost.silos, cost.bytes) == (7, 7, 4.0, 10 + 2 * 190)
    assert cost.hardware == ("generate: CPU, 2 threads", "pretrain: CPU, 2 threads")
    assert outcome_of([ours], {}, both).cost.pretrain is None, "it was not noted"
    mixing = outcome_of([ours], {"generate": cpu}, ["generate"]).cost
    assert (mixing.generate, mixing.pretrain) == (7, 0), (
        "it hands out synthetic samples, and starts from random weights"
    )
    assert outcome_of([ours]).cost.pretrain == 0, "from random weights nothing is pre-trained"


accuracies = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)
outcomes = st.builds(
    Outcome,
    start=accuracies,
    curve=st.lists(accuracies, max_size=5).map(tuple),
    kept=accuracies,
    worst=accuracies,
    bytes_a_round=st.integers(1, 10**9),
    cost=st.just(Cost(0.0, 0.0, None, 0)),
    measures=st.just(({"bytes_down": 0.0, "bytes_up": 0.0},) * 6),
    silo_accuracy=st.just(()),
    validation=st.none() | accuracies,
)
groups = st.builds(
    Group,
    split=st.sampled_from(["even", "odd"]),
    start=st.sampled_from(["random", "synthetic"]),
    strategy=st.sampled_from(["fedavg", "fedprox", "moon"]),
    silos=st.sampled_from(["all", "alone", "pooled", 3, 5]),
)
matrices = st.dictionaries(groups, st.dictionaries(st.integers(0, 3), outcomes, max_size=4), max_size=12)


@given(matrices)
def test_what_holds_of_every_table(found: dict[Group, dict[int, Outcome]]) -> None:
    rows = rows_of(found, RANDOM)
    assert [row.group for row in rows] == list(found)
    for row in rows:
        if row.chosen is not None:
            assert (row.chosen.split, row.chosen.start, row.chosen.silos) == (row.group.split, "synthetic", "all")
            assert any(one.validation is not None for one in found[row.chosen].values())
        if row.baseline is None:
            assert row.target is None
            assert row.pairs is None
            continue
        assert row.baseline.split == row.group.split
        assert row.baseline.start == "random"
        assert row.target == statistics.fmean((one.start, *one.curve)[-1] for one in found[row.baseline].values())
        for seed, one in row.outcomes.items():
            rounds = row.rounds_to_target[seed]
            assert all(
                accuracy < row.target for accuracy in one.curve[: None if rounds is None else max(rounds - 1, 0)]
            )
            if rounds is not None:
                assert (one.start, *one.curve)[rounds] >= row.target
        if row.pairs is not None:
            assert row.pairs.by_seed.keys() == found[row.group].keys() & found[row.baseline].keys()
            if found[row.group].keys() == found[row.baseline].keys():
                assert row.accuracy.mean is not None
                assert row.pairs.mean == pytest.approx(row.accuracy.mean - row.target)


@given(matrices, groups)
def test_a_group_that_failed_changes_no_other(found: dict[Group, dict[int, Outcome]], failed: Group) -> None:
    others = {group: cells for group, cells in found.items() if group != failed}
    assert [row for row in rows_of({failed: {}, **others}, RANDOM) if row.group != failed] == rows_of(others, RANDOM)

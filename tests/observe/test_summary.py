"""`summary.json`: its fields, its way to the disk and back, and what is counted from the curves."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from finished_run import arm, summary_of, three_arms
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.errors import StorageError
from gptfl_dist.observe.summary import (
    Arms,
    RoundRecord,
    SyntheticArm,
    federated_arm,
    read_summary,
    rounds_to_target,
    write_summary,
)

accuracies = st.floats(0, 1)
curves = st.lists(st.none() | accuracies, max_size=40)


@given(curves, accuracies)
def test_the_round_found_is_the_first_at_the_target(curve: list[float | None], target: float) -> None:
    found = rounds_to_target(curve, target)
    reaching = [number for number, value in enumerate(curve, 1) if value is not None and value >= target]
    assert found == (min(reaching) if reaching else None)


@given(curves.filter(lambda curve: any(value is not None for value in curve)))
def test_a_curve_reaches_its_own_best(curve: list[float | None]) -> None:
    best = max(value for value in curve if value is not None)
    found = rounds_to_target(curve, best)
    assert found is not None
    assert curve[found - 1] == best


@given(curves, accuracies, accuracies)
def test_a_higher_target_is_never_reached_earlier(curve: list[float | None], one: float, other: float) -> None:
    low, high = rounds_to_target(curve, min(one, other)), rounds_to_target(curve, max(one, other))
    assert high is None or (low is not None and low <= high)


@given(curves, curves, accuracies)
def test_later_rounds_do_not_change_what_was_reached(
    curve: list[float | None], more: list[float | None], target: float
) -> None:
    found = rounds_to_target(curve, target)
    assert found is None or rounds_to_target(curve + more, target) == found


def test_the_file_has_the_documented_fields(tmp_path: Path) -> None:
    path = write_summary(tmp_path, three_arms())
    assert path == tmp_path / "summary.json"
    read = json.loads(path.read_text())
    documented = {"run", "transport", "silos", "seed", "target_accuracy", "seconds", "server", "arms"}
    added = {"curve_of", "tuning", "model_bytes", "parameters", "synthetic_images", "choice", "chosen_by"}
    added |= {"started", "finished", "weights"}
    assert set(read) == documented | added
    assert set(read["arms"]) == {"synthetic_only", "fedavg_random", "gptfl"}
    assert read["arms"]["synthetic_only"]["accuracy"] == 0.85
    documented = {"accuracy", "rounds", "rounds_to_target", "bytes_down", "bytes_up", "curve"}
    added = {"final_accuracy", "best_round", "learning_rate", "validation_curve", "start_accuracy"}
    added |= {"seconds_per_round", "validation_accuracy", "updates", "stopped_by", "measures"}
    for name in ("fedavg_random", "gptfl"):
        assert set(read["arms"][name]) == documented | added
    assert read["target_accuracy"] == 0.9
    assert read["arms"]["fedavg_random"]["rounds_to_target"] == 3
    of_rounds = read["arms"]["gptfl"].pop("measures")
    assert len(of_rounds) == 1 + 4
    assert of_rounds[2]["macro_f1"] == 0.92
    assert of_rounds[2]["silo_accuracy"] == {"north": 1.0, "south": pytest.approx(0.82)}
    assert read["arms"]["gptfl"] | {"curve": None, "validation_curve": None} == {
        "accuracy": 0.96,
        "rounds": 4,
        "rounds_to_target": 2,
        "bytes_down": 410,
        "bytes_up": 360,
        "curve": None,
        "final_accuracy": 0.96,
        "validation_accuracy": 0.96,
        "best_round": 4,
        "learning_rate": 0.05,
        "validation_curve": None,
        "start_accuracy": 0.1,
        "seconds_per_round": 2.0,
        "stopped_by": None,
        "updates": {
            "north": {"counted": 4, "mean_staleness": 1.0, "max_staleness": 1},
            "south": {"counted": 4, "mean_staleness": 0.0, "max_staleness": 0},
        },
    }
    assert read["tuning"] == {"gptfl": {"0.05": 0.91, "0.1": 0.88}}
    assert read["weights"] == {"gptfl": {"final": "ab" * 32, "best": "cd" * 32}}
    assert datetime.fromisoformat(read["started"]) == datetime(2025, 11, 3, 10, 2, tzinfo=UTC)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    written = three_arms()
    write_summary(tmp_path, written)
    assert read_summary(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_an_arm_that_was_not_asked_for_is_absent_and_leaves_no_target(tmp_path: Path) -> None:
    arms = Arms(synthetic_only=SyntheticArm(accuracy=0.85), gptfl=arm([0.88, 0.92]))
    write_summary(tmp_path, summary_of(arms))
    read = json.loads((tmp_path / "summary.json").read_text())
    assert set(read["arms"]) == {"synthetic_only", "gptfl"}
    assert read["target_accuracy"] is None
    assert read["arms"]["gptfl"]["rounds_to_target"] is None
    assert "fedavg_random" not in read_summary(tmp_path).arms.federated


def test_a_target_out_of_reach_is_null(tmp_path: Path) -> None:
    arms = Arms(fedavg_random=arm([0.5, 0.9]), gptfl=arm([0.6, 0.7]))
    assert summary_of(arms).arms.federated["gptfl"].rounds_to_target is None


def test_without_test_data_the_curve_is_of_validation_data(tmp_path: Path) -> None:
    arms = Arms(fedavg_random=arm([0.5, 0.7], test=False), gptfl=arm([0.6, 0.8], test=False))
    write_summary(tmp_path, summary_of(arms, curve_of="validation"))
    read = json.loads((tmp_path / "summary.json").read_text())
    gptfl = read["arms"]["gptfl"]
    assert read["curve_of"] == "validation"
    assert gptfl["accuracy"] is gptfl["final_accuracy"] is gptfl["start_accuracy"] is None
    assert gptfl["curve"] == gptfl["validation_curve"] == [0.6, 0.8]
    assert read["target_accuracy"] == 0.7
    assert gptfl["rounds_to_target"] == 2


def test_the_accuracy_is_that_of_the_kept_model_and_not_the_best_on_test_data() -> None:
    records = [RoundRecord(1, 1.0, 1, 1, 0.95, 0.80), RoundRecord(2, 3.0, 1, 1, 0.90, 0.85)]
    start = RoundRecord(0, 0.0, 0, 0, 0.5, 0.5)
    kept = federated_arm(records, best_round=2, learning_rate=0.1, start=start, curve_of="test")
    assert (kept.accuracy, kept.validation_accuracy, kept.seconds_per_round) == (0.90, 0.85, 2.0)
    start_kept = federated_arm(records, best_round=0, learning_rate=0.1, start=start, curve_of="test")
    assert start_kept.accuracy == 0.5


def test_what_came_of_each_silo_is_counted_with_its_staleness() -> None:
    ages = [{"b": 0, "a": 0}, {"b": 1}, {"b": 2, "c": 0}]
    records = [RoundRecord(n, 1.0, 1, 1, 0.9, 0.8, staleness) for n, staleness in enumerate(ages, 1)]
    told = federated_arm(
        records, best_round=3, learning_rate=0.1, start=RoundRecord(0, 0.0, 0, 0, 0.5, 0.5), curve_of="test"
    )
    assert {silo: tuple(updates.model_dump().values()) for silo, updates in told.updates.items()} == {
        "a": (1, 0.0, 0),
        "b": (3, 1.0, 2),
        "c": (1, 0.0, 0),
    }


@pytest.mark.parametrize(
    ("change", "field"),
    [({"silos": "many"}, "silos"), ({"surprise": 1}, "surprise"), ({"arms": {"fedprox": {}}}, "arms.fedprox")],
)
def test_a_file_that_is_no_summary_is_refused_by_name_and_field(
    tmp_path: Path, change: dict[str, object], field: str
) -> None:
    path = write_summary(tmp_path, three_arms())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StorageError) as caught:
        read_summary(tmp_path)
    assert f"{path}: {field}: " in str(caught.value)


def test_a_missing_or_broken_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"folder of a finished run"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text('{"run": "de')
    with pytest.raises(StorageError, match=r"run again"):
        read_summary(tmp_path)


def test_where_it_cannot_be_written_nothing_half_written_is_left(tmp_path: Path) -> None:
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(StorageError, match=r"summary\.json"):
        write_summary(tmp_path, three_arms())
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]

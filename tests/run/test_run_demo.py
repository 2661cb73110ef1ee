"""`gptfl demo`: what it writes, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import ConfigError, StorageError
from gptfl_dist.ledger.lock import locked
from gptfl_dist.run.demo import prepare
from gptfl_dist.run.folder import open_run_folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files; the lock says who looked last."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "ledger.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def demo(folder: Path, *, silos: int = 2, rounds: int = 3, seed: int = 0, fresh: bool = False) -> Path:
    return prepare(folder, silos=silos, rounds=rounds, seed=seed, fresh=fresh)


def leave_a_run(folder: Path) -> None:
    """What a run and a generation would have left."""
    for name in ("ledger.sqlite", "pretrained.json", "synthetic.png", "synthetic/manifest.json", "weights/abc"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("old")


def test_the_files_of_a_demo_are_valid_and_the_same_demo_keeps_them(tmp_path: Path) -> None:
    path = demo(tmp_path)
    assert sorted(silo.name for silo in load_federation(path).silos) == ["silo-1", "silo-2"]
    leave_a_run(tmp_path)
    before = contents(tmp_path)
    assert demo(tmp_path) == path
    assert demo(tmp_path, fresh=True) == path
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("rounds", "tuning", "warm_up"), [(1, 1, 0), (2, 2, 0), (5, 5, 1), (30, 8, 3)])
def test_a_short_demo_tunes_and_warms_up_in_short(rounds: int, tuning: int, warm_up: int, tmp_path: Path) -> None:
    file = load_federation(demo(tmp_path, rounds=rounds))
    assert (file.tuning.rounds, file.training.warm_up_rounds) == (tuning, warm_up)


def test_another_demo_in_the_folder_is_refused_and_nothing_of_it_overwritten(tmp_path: Path) -> None:
    demo(tmp_path)
    leave_a_run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"federation\.yaml") as refused:
        demo(tmp_path, seed=1)
    assert "--fresh" in refused.value.hint
    with locked(tmp_path), pytest.raises(StorageError, match="another coordinator is at work"):
        demo(tmp_path, seed=1, fresh=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("change", "kept"), [({"rounds": 9}, True), ({"silos": 3}, True), ({"seed": 1}, False)])
def test_fresh_replaces_the_demo_and_its_synthetic_set_only_where_that_changed(
    change: dict[str, int], kept: bool, tmp_path: Path
) -> None:
    demo(tmp_path)
    leave_a_run(tmp_path)
    demo(tmp_path, **change, fresh=True)
    left = contents(tmp_path)
    assert not {"ledger.sqlite", "pretrained.json", "synthetic.png", "weights/abc"} & set(left)
    assert ("synthetic/manifest.json" in left) == kept
    assert load_federation(tmp_path / "federation.yaml").seed == change.get("seed", 0)


def test_fresh_keeps_the_synthetic_set_of_a_demo_that_filtered_it_otherwise(tmp_path: Path) -> None:
    path = demo(tmp_path)
    leave_a_run(tmp_path)
    path.write_text(path.read_text().replace("threshold: 0.7", "threshold: 0.9"))
    demo(tmp_path, fresh=True)
    assert load_federation(path).synthesis.filter.threshold == 0.7
    assert "synthetic/manifest.json" in contents(tmp_path)


def test_fresh_deletes_a_run_and_neither_its_data_nor_its_synthetic_set_nor_its_audit_log(tmp_path: Path) -> None:
    path = demo(tmp_path)
    written = contents(tmp_path)
    leave_a_run(tmp_path)
    open_run_folder(path, fresh=True)
    left = contents(tmp_path)
    kept = {*written, "synthetic/manifest.json", "audit.jsonl", "audit.key"}
    assert set(left) - {"logs/coordinator.jsonl"} == kept

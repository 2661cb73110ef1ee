"""The studies in benchmarks/ are valid experiments, and compare what they say they compare."""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gptfl_dist.config.document import read_document
from gptfl_dist.config.load import load_experiment
from gptfl_dist.run.experiment.plan import example_files, groups_of, trials_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STRATEGIES = {"fedavg", "fedprox", "scaffold", "moon", "fedadam"}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion", "speech"])
def test_a_study_is_a_valid_experiment_whose_strategies_are_tuned_alike(
    name: str, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    study = importlib.import_module(f"study_{name}").study(quick)
    path = tmp_path / "experiment.yaml"
    path.write_text(json.dumps(study.experiment(quick=quick)))
    file = load_experiment(path)
    groups = groups_of(file)
    assert list(example_files(file, read_document(path))) == groups
    assert {len(trials_of(file, group)) for group in groups} == {0 if quick else 6}
    if quick:
        return
    assert file.seeds == [0, 1, 2]
    for split in study.splits:
        whole = {(group.start, group.strategy) for group in groups if group.split == split and group.silos == "all"}
        assert whole >= {(start, strategy) for start in ("random", "synthetic") for strategy in STRATEGIES}
    fedavg = {group.silos for group in groups if group.strategy == "fedavg" and group.split == next(iter(study.splits))}
    assert fedavg == {"all", 1, 3, "alone", "pooled"}


def test_no_silo_and_no_test_holds_an_image_of_the_public_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is told by its shade: 1 to 90 are training images, from 101 on test images."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    study = importlib.import_module("study_fashion")
    for name, count in (("POOL", 40), ("PUBLIC", 30), ("TEST", 20)):
        monkeypatch.setattr(study, name, count)
    for part, first, count in (("train", 1, 90), ("t10k", 101, 40)):
        shades = np.arange(first, first + count, dtype=np.uint8)
        contents = {
            "images-idx3": bytes(16) + np.repeat(shades, 28 * 28).tobytes(),
            "labels-idx1": bytes(8) + bytes(count),
        }
        for name, content in contents.items():
            (tmp_path / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: None)  # the generator's training
    study.prepare(tmp_path, argparse.Namespace(data=tmp_path, quick=False))
    held = {}
    for name in ("train", "public", "test"):
        with np.load(tmp_path / f"{name}.npz") as arrays:
            held[name] = {int(image.max()) for image in arrays["images"]}
    assert {name: len(shades) for name, shades in held.items()} == {"train": 40, "public": 30, "test": 20}
    assert held["train"] | held["public"] < set(range(1, 91))
    assert not held["train"] & held["public"]
    assert held["test"] < set(range(101, 141))


def test_a_quick_generator_never_stands_for_that_of_the_whole_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    study = importlib.import_module("study_fashion")
    for part in ("train", "t10k"):
        for name, head, shape in (("images-idx3", 16, (20, 28, 28)), ("labels-idx1", 8, (20,))):
            content = struct.pack(f"{head}x") + np.zeros(shape, np.uint8).tobytes()
            (tmp_path / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))

    def trained(command: list[str], **_: object) -> None:  # what the trainer leaves, without half an hour of training
        out = Path(command[command.index("--out") + 1])
        out.mkdir()
        (out / "how").write_text("quick" if "--quick" in command else "whole")

    monkeypatch.setattr(subprocess, "run", trained)
    for quick in (True, False):
        study.prepare(tmp_path, argparse.Namespace(data=tmp_path, quick=quick))
        source = study.study(quick).settings["synthesis"]["generator"]["source"]
        assert (tmp_path / source / "how").read_text() == ("quick" if quick else "whole")


def test_the_page_of_studies_has_the_tables_of_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    tables = importlib.import_module("study_tables")
    page = (BENCHMARKS.parent / "docs" / "studies.md").read_text()
    committed = sorted((BENCHMARKS / "results").glob("*.json"))
    assert committed
    for path in committed:
        assert path.with_suffix(".html").exists()
        assert "\n".join(tables.tables_of(json.loads(path.read_text()))) in page

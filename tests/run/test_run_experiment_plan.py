"""From an experiment file to its cells: what is run, with which settings, and how often each strategy is tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptfl_dist.config import load_experiment
from gptfl_dist.config.document import read_document
from gptfl_dist.config.experiment import ExperimentFile, Group
from gptfl_dist.errors import ConfigError, DataError, StageFailed
from gptfl_dist.ledger.record import FILE_NAME as LEDGER
from gptfl_dist.run.check import check_file
from gptfl_dist.run.experiment.data import share_out
from gptfl_dist.run.experiment.inputs import keep_inputs
from gptfl_dist.run.experiment.plan import (
    cells_of,
    example_files,
    federation_file_of,
    groups_of,
    overlaid,
    point_text,
    settings_of,
    trials_of,
)
from gptfl_dist.run.experiment.run import best_point
from gptfl_dist.run.folder import make_folder

BLOCK = {"splits": ["a"], "starts": ["random"], "strategies": ["fedavg", "prox"]}
CONTENT: dict[str, Any] = {
    "name": "x",
    "labels": ["no", "yes"],
    "data": {"path": "train.npz"},
    "test_data": "test.npz",
    "seeds": [3, 5],
    "federation": {"training": {"epochs": 2, "momentum": 0.5}, "federation": {"rounds": 9}},
    "splits": {"a": {"kind": "dirichlet", "silos": 2, "alpha": 0.1}},
    "strategies": {"fedavg": {}, "prox": {"settings": {"training": {"proximal": 0.1, "momentum": 0.0}}}},
    "tuning": {"rounds": 2, "grid": [{"training": {"learning_rate": 0.1}}, {"training": {"learning_rate": 0.2}}]},
    "cells": [BLOCK],
}


def loaded(folder: Path, **changes: Any) -> ExperimentFile:
    path = folder / "experiment.yaml"
    path.write_text(json.dumps({**CONTENT, **changes}))
    return load_experiment(path)


def test_a_block_is_every_combination_and_nothing_is_run_twice(tmp_path: Path) -> None:
    more = {**BLOCK, "strategies": ["fedavg"], "silos": ["all", 1, "pooled"]}
    groups = groups_of(loaded(tmp_path, cells=[BLOCK, more]))
    assert [(group.strategy, group.silos) for group in groups] == [
        ("fedavg", "all"),
        ("prox", "all"),
        ("fedavg", 1),
        ("fedavg", "pooled"),
    ]


def test_settings_are_laid_over_each_other_and_the_matrix_has_the_last_word(tmp_path: Path) -> None:
    file = loaded(tmp_path)
    group = Group("a", "random", "prox", 1)
    cell = cells_of(file, group)[1]
    settings = settings_of(file, cell, 1, [{"name": "silo-1"}, {"name": "silo-2"}])
    assert settings["training"] == {"epochs": 2, "momentum": 0.0, "proximal": 0.1, "learning_rate": 0.2}
    assert (settings["federation"]["rounds"], settings["federation"]["cohort"]) == (9, 1)
    assert (settings["seed"], settings["arms"]) == (5, ["fedavg_random"])
    assert settings["federation"]["diversity"], "it is measured unless the file says otherwise"
    assert file.federation["training"] == {"epochs": 2, "momentum": 0.5}  # is not changed by it


def test_every_strategy_is_tried_alike_on_the_first_seed_in_short(tmp_path: Path) -> None:
    file = loaded(tmp_path)
    for group in groups_of(file):
        trials = trials_of(file, group)
        assert [(trial.seed, trial.trial) for trial in trials] == [(3, 0), (3, 1)]
        assert settings_of(file, trials[1], 1, [])["federation"]["rounds"] == 2
        assert not settings_of(file, trials[1], 1, [])["federation"]["diversity"]
    alone = loaded(tmp_path, tuning={"grid": [{}]})
    assert [trials_of(alone, group) for group in groups_of(alone)] == [[], []]


def test_the_first_of_the_best_points_is_taken_of_those_that_could_be_trained_with(tmp_path: Path) -> None:
    file = loaded(tmp_path)
    group, other = groups_of(file)
    trials, others = trials_of(file, group), trials_of(file, other)
    assert best_point(group, [], {}) == 0
    assert best_point(group, [(), (0.4,), (0.7,), (0.7,)], {trials[0]: DataError("no data")}) == 2
    failed = dict.fromkeys(trials, DataError("no data"))
    assert best_point(group, [(), ()], failed) is None
    # Those that came through told nothing, here of one and of both.
    for failures in ({trials[0]: DataError("no data")}, dict.fromkeys(others, DataError("no data"))):
        with pytest.raises(StageFailed, match="no silo told how the weights do on its validation data") as found:
            best_point(group, [(), ()], failures)
        assert "data.validation_share" in str(found.value.hint)


def test_of_points_that_end_alike_the_one_that_was_ahead_the_round_before_is_taken(tmp_path: Path) -> None:
    (group, _) = groups_of(loaded(tmp_path))
    assert best_point(group, [(0.7, 0.3, 0.9), (0.7, 0.5, 0.1), (0.6, 0.6, 0.6)], {}) == 1


def test_a_point_of_the_grid_is_said_by_what_it_sets() -> None:
    assert point_text({"training": {"learning_rate": 0.1, "moon": {"weight": 1}}, "arms": ["gptfl"]}) == (
        'training.learning_rate 0.1, training.moon.weight 1, arms ["gptfl"]'
    )
    assert point_text({}) == "no change"


def test_no_criterion_ends_a_trial_before_another(tmp_path: Path) -> None:
    stops = {"federation": {"patience": 1, "target_accuracy": 0.5, "max_time": "1m"}}
    file = loaded(tmp_path, strategies={"fedavg": {}, "prox": {"settings": stops}})
    group = Group("a", "random", "prox", "all")
    silos = [{"name": "silo-1", "file": "silo-1.yaml"}]
    document = read_document(tmp_path / "experiment.yaml")
    trial, cell = (
        federation_file_of(file, document, one, 0, silos, {}).federation
        for one in (trials_of(file, group)[0], cells_of(file, group)[0])
    )
    assert (trial.rounds, trial.patience, trial.target_accuracy, trial.max_time) == (2, None, None, None)
    assert (cell.rounds, cell.patience, cell.target_accuracy, cell.max_time) == (9, 1, 0.5, 60)


LAYERS = """\
name: x
labels: ["no", "yes"]
data: {path: train.npz}
test_data: test.npz
federation:
  training: {epochs: 2}
splits:
  a: {kind: dirichlet, silos: 2, alpha: 0.1}
starts:
  random: {arm: random}
strategies:
  mine:
    settings: {training: {momentum: 0.5}}
tuning:
  grid:
    - {training: {learning_rate: 0.1}}
    - {training: {learning_rate: 0.2}}
cells:
  - {splits: [a], starts: [random], strategies: [mine], silos: [all]}
"""


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("epochs: 2", "epochs: two", '6:22: training.epochs: found "two" (text), expected a whole number'),
        ("{arm: random}", "{arm: random, settings: {seeed: 1}}", "10:36: seeed: unknown key, the nearest valid"),
        (
            "momentum: 0.5",
            "momentum: -1",
            "13:37: training.momentum: found -1 (a number), expected a number of at least",
        ),
        ("learning_rate: 0.2", "learning_rate: [a]", '17:35: training.learning_rate[0]: found "a" (text), expected'),
        # The deepest layer that sets it is where it stands.
        ("momentum: 0.5", "epochs: 0", "13:35: training.epochs: found 0 (a number), expected a number greater than 0"),
        # A model says of two settings that they do not go together.
        (
            "{epochs: 2}",
            "{epochs: 2}\n  federation: {quorum: 3}",
            "7:24: federation.quorum: federation.quorum is 3, more",
        ),
        # What the matrix sets has no place among the settings.
        (
            "[all]",
            "[3]",
            "the federation of cells/a/random/mine/3/trial-1: federation.cohort is 3, but there are only 2",
        ),
        ("training: {epochs: 2}", "training: 2", "6:3: federation: federation sets training to a single value"),
        ("training: {epochs: 2}", "federation: {cohort: 2}", "federation sets federation.cohort, which the experiment"),
        ("training: {epochs: 2}", "synthesis: {folder: s}", "federation sets synthesis.folder, which the experiment"),
        ("name: x", "name: x\nseeds: [3, 3]", "2:8: seeds: seeds are 3, 3, expected each once"),
        (
            "momentum: 0.5}}",
            "momentum: 0.5}}\n    grid: [{}]",
            "14:11: strategies.mine.grid: strategies.mine.grid has 1",
        ),
    ],
)
def test_a_wrong_setting_is_told_where_it_stands(right: str, wrong: str, told: str, tmp_path: Path) -> None:
    assert right in LAYERS
    path = tmp_path / "experiment.yaml"
    path.write_text(LAYERS.replace(right, wrong))
    with pytest.raises(ConfigError) as found:
        example_files(load_experiment(path), read_document(path))
    assert told in found.value.message


def test_check_tries_what_an_experiment_would_begin_with(tmp_path: Path) -> None:
    images = np.zeros((40, 8, 8), np.uint8)
    for name in ("train.npz", "test.npz"):
        np.savez(tmp_path / name, images=images, labels=np.arange(40) % 2, label_names=np.array(["no", "yes"]))
    path = tmp_path / "experiment.yaml"
    path.write_text(LAYERS)
    found = {finding.checked: finding for finding in check_file(path)}
    assert {finding.status for finding in found.values()} == {"ok"}, found
    assert found["settings"].found == "3 federations, and 2 short ones that choose points of the grids"
    assert found["splits.a"].found.startswith("2 silos of ")
    assert found["test data"].found.startswith("40 images of all 2 labels")
    assert not (tmp_path / "results").exists()
    (tmp_path / "test.npz").unlink()
    path.write_text(LAYERS.replace("alpha: 0.1", "alpha: 0.1, minimum: 30").replace("epochs: 2", "epochs: two"))
    assert of_status("failed", path) == {"settings", "splits.a"}
    path.write_text(LAYERS)
    assert of_status("failed", path) == {"test data"}
    path.write_text(LAYERS.replace("{arm: random}", "{arm: checkpoint, checkpoint: ./nowhere}"))
    assert of_status("failed", path) == {"test data", "model of starts.random"}
    path.write_text(LAYERS.replace("epochs: 2", "epochs: 2, warm_up_rounds: 5"))
    assert of_status("warning", path) == {"settings"}


def of_status(status: str, path: Path) -> set[str]:
    return {finding.checked for finding in check_file(path) if finding.status == status}


def test_a_split_shares_out_only_the_samples_that_the_data_name(tmp_path: Path) -> None:
    labels = np.arange(40) % 2
    names = np.array(["no", "yes"])
    sites = np.array(["north", "north", "south", "south"] * 10)
    np.savez(
        tmp_path / "train.npz", images=np.zeros((40, 8, 8), np.uint8), labels=labels, label_names=names, site=sites
    )
    (tmp_path / "odd.txt").write_text("\n".join(str(number) for number in range(1, 40, 2)))
    path = tmp_path / "experiment.yaml"
    by_site = LAYERS.replace("{kind: dirichlet, silos: 2, alpha: 0.1}", "{kind: key, key: site}")
    path.write_text(by_site.replace("path: train.npz", "path: train.npz, samples: odd.txt"))
    shared = share_out(load_experiment(path), "a", 0, tmp_path / "split")
    shared.write()
    found = {
        silo: {int(line) for line in (tmp_path / f"split/{silo}.txt").read_text().split()} for silo in shared.silos
    }
    assert found == {"north": set(range(1, 40, 4)), "south": set(range(3, 40, 4))}
    assert json.loads((tmp_path / "split/split.json").read_text()) == {"north": [0, 10], "south": [0, 10]}
    (tmp_path / "odd.txt").unlink()
    with pytest.raises(DataError, match=r"odd\.txt cannot be read"):
        share_out(load_experiment(path), "a", 0, tmp_path / "split")
    path.write_text(by_site.replace("key: site", "key: label_names"))
    with pytest.raises(DataError, match=r"the array label_names has the shape \(2,\), expected a key for each of 40"):
        share_out(load_experiment(path), "a", 0, tmp_path / "split")


def test_data_are_held_to_what_they_were_from_the_first_federation_on(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(LAYERS)
    file = load_experiment(path)
    make_folder(file.folder)
    train, test = tmp_path / "train.npz", tmp_path / "test.npz"
    train.write_bytes(b"wrong")
    keep_inputs(file, tmp_path, [])
    train.write_bytes(b"right")  # nothing was made from the wrong ones
    keep_inputs(file, tmp_path, [])
    ledger = file.folder / "cells/a/random/mine/all/trial-1" / LEDGER
    ledger.parent.mkdir(parents=True)
    ledger.touch()
    test.write_bytes(b"was missing")
    keep_inputs(file, tmp_path, [])
    for changed in (train, test):
        before = changed.read_bytes()
        changed.write_bytes(b"other")
        with pytest.raises(ConfigError, match=f"^{changed.name} differs from what the federations in"):
            keep_inputs(file, tmp_path, [])
        changed.write_bytes(before)
    keep_inputs(file, tmp_path, [])


def test_trials_in_which_nobody_trains_are_refused(tmp_path: Path) -> None:
    means = {"fedavg": {"settings": {"training": {"first_round": "means"}}}}
    cells = [{**BLOCK, "strategies": ["fedavg"]}]
    file = loaded(tmp_path, strategies=means, tuning={**CONTENT["tuning"], "rounds": 1}, cells=cells)
    (group,) = groups_of(file)
    with pytest.raises(ConfigError, match=r"a/random/fedavg/all/trial-1: trials are of 1 round, in which .* trains"):
        settings_of(file, trials_of(file, group)[0], 0, [])
    settings_of(file, cells_of(file, group)[0], 0, [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cells": [{**BLOCK, "strategies": ["moon"]}]}, "cells name moon, expected one of strategies: fedavg, prox"),
        ({"strategies": {"fedavg": {}, "prox": {"grid": [{}]}}}, "strategies.prox.grid has 1 points, expected 2"),
        ({"federation": {"seed": 1}}, "federation sets seed, which the experiment sets itself"),
        (
            {"federation": {"model": {"name": "transformers", "source": "m", "pretrained": True}}},
            "federation sets model.pretrained, .* set it in the settings of a start",
        ),
        (
            {"tuning": {"grid": [{"model": {"pretrained": False}}]}, "strategies": {"fedavg": {}, "prox": {}}},
            "tuning.grid sets model.pretrained",
        ),
        ({"splits": {"a": {"kind": "shards", "silos": 2}}}, "kind is shards, which needs shards"),
        ({"splits": {"a": {"kind": "key", "key": "k", "silos": 2}}}, "kind is key, which takes no silos"),
        ({"splits": {"a": {"silos": 2, "alpha": 1.0, "without": ["b"]}}}, "kind is dirichlet, which takes no without"),
    ],
)
def test_what_makes_no_matrix_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        loaded(tmp_path, **changes)


def test_a_start_from_a_public_checkpoint_is_not_random(tmp_path: Path) -> None:
    model = {"name": "transformers", "source": "m", "pretrained": True}
    starts = {"random": {"arm": "random"}, "public": {"arm": "random", "settings": {"model": model}}}
    found = loaded(tmp_path, starts=starts).starts
    assert {name: start.random for name, start in found.items()} == {"random": True, "public": False}


def test_overlaid() -> None:
    assert overlaid({"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"c": [2]}, "d": {"e": 1}}) == {
        "a": {"b": 1, "c": [2]},
        "d": {"e": 1},
    }

"""A federation that starts from a public checkpoint: a `transformers` folder whose weights silos then fine-tune.

The checkpoint is a small ResNet that learnt drawn shapes "in public"; the silos have shapes of their own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from shapes import SHAPES, SIZE, shape_classifier, shapes
from support import RULES, Commands

from gptfl_dist.config.document import dump_yaml
from gptfl_dist.testing.federations import tiny_federation

HEAD = {"classifier.1.weight", "classifier.1.bias"}


def shape_data(path: Path, count: int, seed: int) -> None:
    shown = np.arange(count) % len(SHAPES)
    np.savez(path, images=shapes(shown.tolist(), seed)[..., 0], labels=np.array(SHAPES)[shown])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shape_classifier(tmp_path_factory.mktemp("public") / "resnet", SHAPES)


def from_checkpoint(folder: Path, source: Path, labels: tuple[str, ...] = SHAPES, **settings: Any) -> Path:
    path = tiny_federation(
        folder,
        labels=list(labels),
        task={"size": SIZE, "channels": 1},
        model={"name": "transformers", "source": str(source), "pretrained": True},
        federation={**RULES, "rounds": 1},
        training={"batch_size": 8, "learning_rate": 0.001},
        **settings,
    )
    for number, name in enumerate(("silo-1", "silo-2", "test"), start=2):
        shape_data(folder / f"{name}.npz", 36, number)
    return path


def test_the_start_weights_are_the_checkpoints_and_silos_need_its_config_alone(
    gptfl: Commands, tmp_path: Path, checkpoint: Path
) -> None:
    path = from_checkpoint(tmp_path / "federation", checkpoint)
    config = tmp_path / "config"
    config.mkdir()
    shutil.copy(checkpoint / "config.json", config)
    silo = path.parent / "silo-1.yaml"
    silo.write_text(dump_yaml({**yaml.safe_load(silo.read_text()), "model_source": str(config)}))
    command = gptfl.run("run", path)
    start, public = load_file(path.parent / "run/random.safetensors"), load_file(checkpoint / "model.safetensors")
    assert start.keys() == public.keys()
    assert all(np.array_equal(start[name], public[name]) for name in public)
    assert f"the weights are those of {checkpoint}, with its head, whose outputs it calls disc, frame, bars" in (
        command.stderr.replace("\n", " ")
    )
    arm = json.loads((path.parent / "run/summary.json").read_text())["arms"]["fedavg_random"]
    assert arm["start_accuracy"] > 0.9
    final = load_file(path.parent / "run/models/fedavg_random-final.safetensors")
    assert not all(np.array_equal(final[name], public[name]) for name in public)


def test_a_head_of_another_size_is_drawn_anew_and_that_is_told(
    gptfl: Commands, tmp_path: Path, checkpoint: Path
) -> None:
    path = from_checkpoint(tmp_path / "federation", checkpoint, (*SHAPES, "none"))
    checked = gptfl.start("check", path)
    checked.wait()
    command = gptfl.run("run", path, "--exchange", "memory")
    told = (
        f"the weights are those of {checkpoint} but for classifier.1.bias, classifier.1.weight, drawn anew: it has 3 "
        "labels, the federation 4"
    )
    for said in (command.stderr, checked.stdout):
        assert told.replace(" ", "") in "".join(said.split())
    start, public = load_file(path.parent / "run/random.safetensors"), load_file(checkpoint / "model.safetensors")
    assert all(np.array_equal(start[name], public[name]) for name in public.keys() - HEAD)
    assert start["classifier.1.weight"].shape[0] == 4


def test_an_experiment_compares_it_with_the_same_model_from_random_weights(
    gptfl: Commands, tmp_path: Path, checkpoint: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "resnet")
    shape_data(tmp_path / "train.npz", 60, 2)
    shape_data(tmp_path / "test.npz", 30, 3)
    content = {
        "name": "shapes",
        "labels": list(SHAPES),
        "data": {"path": "train.npz"},
        "test_data": "test.npz",
        "seeds": [0],
        "federation": {"federation": {"rounds": 1}, "task": {"size": SIZE, "channels": 1}},
        "splits": {"even": {"silos": 2, "alpha": 100, "minimum": 10}},
        "starts": {
            "random": {"arm": "random", "settings": {"model": {"name": "transformers", "source": "./resnet"}}},
            "public": {"arm": "checkpoint", "checkpoint": "./resnet"},
        },
        "tuning": {"rounds": 1, "grid": [{"training": {"learning_rate": 0.001}}]},
        "cells": [{"splits": ["even"], "starts": ["random", "public"], "strategies": ["fedavg"]}],
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(json.dumps(content))
    gptfl.run("experiment", path)
    cells = tmp_path / "results" / "cells" / "even"
    starts = {
        start: json.loads((cells / start / "fedavg/all/seed-0/summary.json").read_text())["arms"]["fedavg_random"]
        for start in ("random", "public")
    }
    assert starts["public"]["start_accuracy"] > 0.9 > starts["random"]["start_accuracy"]

"""Whole federations of which every part that can be is on a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import torchrun
from support import RULES, Commands, Federation

from gptfl_dist.run.candidates import PRETRAINED_WEIGHTS
from gptfl_dist.synthesis.generator import EMBEDDED_LABELS

pytestmark = pytest.mark.gpu
Make = Callable[..., Federation]
TRAINING = {"batch_size": 8, "learning_rate": 0.01, "warm_up_rounds": 0, "epochs": 3}
SYNTHESIS = {"generator": {"source": "embedded", "steps": 4}, "images_per_label": 30, "shard_size": 10}


def on_gpu(federation: Federation) -> Federation:
    """With silos that train on what `auto` finds."""
    for silo in federation.silos:
        path = federation.folder / f"{silo}.yaml"
        path.write_text(path.read_text().replace("device: cpu", "device: auto"))
    return federation


def when_written(federation: Federation) -> dict[Path, int]:
    """Of each shard of the synthetic set, and of the pre-trained weights."""
    files = [path for name in ("shard-*.parquet", PRETRAINED_WEIGHTS) for path in Path(federation.folder).rglob(name)]
    return {path: path.stat().st_mtime_ns for path in files}


def both_arms(make: Make, name: str, **settings: Any) -> Federation:
    labels = list(EMBEDDED_LABELS[:2])
    pretraining = {"epochs": 3, "batch_size": 16}
    arms = ["fedavg_random", "gptfl"]
    settings = {"training": TRAINING, "synthesis": SYNTHESIS, "pretraining": pretraining, **settings}
    return on_gpu(make(name, labels=labels, arms=arms, **settings))


@pytest.mark.parametrize("rule", ["mean", "scaffold", "fednova"])
def test_a_run_generates_pretrains_and_trains_on_the_gpu(gptfl: Commands, federation: Make, rule: str) -> None:
    mine = both_arms(federation, rule, strategy={"rule": rule})
    gptfl.run("run", mine.path)
    told = mine.summary()
    assert {len(arm["curve"]) for arm in told["arms"].values()} == {RULES["rounds"]}
    assert told["arms"]["fedavg_random"]["curve"][-1] > 0.9
    costs = [json.loads(path.read_text()) for path in Path(mine.folder).rglob("cost.json")]
    assert costs
    assert not [cost for cost in costs if "CPU" in json.dumps(cost)], costs


def test_moon_under_torchrun_does_as_well_as_over_grpc(gptfl: Commands, federation: Make) -> None:
    curves = []
    for name in ("grpc", "torch"):
        mine = both_arms(federation, name, training={**TRAINING, "contrastive": 1.0})
        command = gptfl.start("run", mine.path) if name == "grpc" else gptfl.torch(2, "run", mine.path)
        assert command.wait() == 0, command.stderr
        curves.append([arm["curve"][-1] for arm in mine.summary()["arms"].values()])
    assert curves[0] == pytest.approx(curves[1], abs=0.07)


def test_trainers_in_their_ranks_sum_what_lies_in_the_memory_of_the_gpu(gptfl: Commands, federation: Make) -> None:
    mine = on_gpu(federation("fast", silos=3, collective={"reduction": "fast"}))
    command = gptfl.torch(4, "run", mine.path)
    assert command.wait() == 0, command.stderr
    assert mine.summary()["arms"]["fedavg_random"]["curve"][-1] > 0.9


def test_ranks_on_the_gpu_make_one_set_and_one_model(gptfl: Commands, federation: Make) -> None:
    mine = both_arms(federation, "ranks")
    for stage in ("generate", "pretrain"):
        command = gptfl.start(stage, mine.path, program=[*torchrun(2), "-m", "gptfl_dist"])
        assert command.wait() == 0, command.stderr
    of_the_ranks = when_written(mine)
    assert {path.suffix for path in of_the_ranks} == {".parquet", ".safetensors"}
    gptfl.run("run", mine.path)
    assert when_written(mine) == of_the_ranks
    assert mine.summary()["arms"]["gptfl"]["curve"]

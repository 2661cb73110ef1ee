"""An ordinary training script becomes a silo by five added lines; and what happens where it does not fit."""

from __future__ import annotations

import asyncio
import difflib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Commands

from gptfl_dist.config.load import load_federation, load_silo
from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.errors import TrainerError
from gptfl_dist.federation.orders import Order
from gptfl_dist.launch.base import unheard
from gptfl_dist.launch.start import open_trainer
from gptfl_dist.run.runner import OrderFiles, ProcessRunner, Result
from gptfl_dist.weights import WeightsFile
from gptfl_dist.weights.flat import FlatModel

EXAMPLE = Path(__file__).parents[2] / "examples" / "five_lines"
SCRIPT = "train_federated.py"


def test_the_scripts_differ_by_five_added_lines_at_most() -> None:
    plain, federated = ((EXAMPLE / name).read_text().splitlines() for name in ("train_plain.py", SCRIPT))
    difference = [line for line in difflib.ndiff(plain, federated) if not line.startswith("  ")]
    assert all(line.startswith("+ ") for line in difference), difference
    assert len(difference) <= 5


def test_the_plain_script_trains_alone(example: Callable[..., Path]) -> None:
    folder = example("five_lines", ("train_plain.py", "EPOCHS = 20", "EPOCHS = 5"))
    done = subprocess.run([sys.executable, "train_plain.py"], cwd=folder, capture_output=True, text=True, timeout=120)
    accuracies = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(accuracies) == 5, done.stderr
    assert accuracies[-1] > accuracies[0]


def test_the_federated_script_started_by_hand_says_what_to_do(example: Callable[..., Path]) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT], cwd=example("five_lines"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    last_lines = "\n".join(done.stderr.splitlines()[-2:])
    assert "was not started by a silo's agent" in last_lines
    assert "code.script" in last_lines


def test_script_and_built_in_training_federate(example: Callable[..., Path], gptfl: Commands) -> None:
    folder = example("five_lines")
    command = gptfl.run("run", folder / "federation.yaml", "--format", "json")
    arm = json.loads(command.stdout)["arms"]["fedavg_random"]
    assert arm["final_accuracy"] > arm["start_accuracy"] + 0.3
    assert arm["validation_curve"][-1] > 0.5
    assert "epoch 8: accuracy" in (folder / "run" / "silos" / "hospital" / "trainer.log").read_text()


def test_what_a_script_prints_stays_at_the_silo(example: Callable[..., Path], gptfl: Commands) -> None:
    folder = example(
        "five_lines",
        (SCRIPT, "    model.train()\n", '    raise SystemExit("no file for patient 4711")\n'),
        ("federation.yaml", "  - {name: clinic, file: clinic.yaml}\n", ""),
    )
    command = gptfl.start("run", folder / "federation.yaml")
    assert command.wait() == 8
    assert "hospital: TrainerError: the trainer ended with code 1" in command.stderr
    assert "4711" not in command.stderr
    assert "4711" in (folder / "run" / "silos" / "hospital" / "agent.log").read_text()
    assert b"4711" not in b"".join(path.read_bytes() for path in (folder / "run").glob("ledger.sqlite*"))


def _rounds(folder: Path, count: int) -> list[Result]:
    """Has the hospital's script train so many rounds from the same weights, and then evaluate them."""
    file = load_federation(folder / "federation.yaml")
    spec = importlib.util.spec_from_file_location("network", folder / "network.py")
    assert spec is not None
    assert spec.loader is not None
    network = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(network)
    weights, update = folder / "weights.safetensors", folder / "update.safetensors"
    FlatModel(network.Network()).save(weights)
    training = LocalTraining.of(file, 0.05, 1)

    async def run() -> list[Result]:
        silo = load_silo(folder / "hospital.yaml")
        runner = ProcessRunner(silo, folder, await open_trainer(silo, folder, folder))
        try:
            with WeightsFile(weights) as received:
                await runner.setup("run", Plan.of(file), received.layout)
            results = []
            for round_ in range(1, count + 1):
                order = Order("train", f"{round_}", "gptfl", round_, "", 60.0, training)
                results.append(await runner.run(order, OrderFiles(weights, update), unheard))
            order = Order("evaluate", "last", "gptfl", count + 1, "", 60.0, None)
            return [*results, await runner.run(order, OrderFiles(weights, update), unheard)]
        finally:
            await runner.stop()

    return asyncio.run(run())


def test_a_script_whose_own_loop_is_shorter_than_the_federation_is_started_again(example: Callable[..., Path]) -> None:
    folder = example("five_lines", (SCRIPT, "EPOCHS = 20", "EPOCHS = 2"))
    results = _rounds(folder, 3)
    # The weights that it started from are the same, so its new start did the same again.
    assert results[2].digest == results[0].digest != results[1].digest
    assert (folder / "trainer.log").read_text().count("epoch 1:") == 2
    # What it finds on its validation data weighs as much as its updates do.
    assert results[3].samples == results[0].samples > 1
    assert results[3].metrics == {"accuracy": results[0].metrics["accuracy"]}


def test_a_model_that_was_moved_after_join_is_refused(example: Callable[..., Path]) -> None:
    folder = example("five_lines", (SCRIPT, "for epoch in", "model.double()\nfor epoch in"))
    with pytest.raises(TrainerError, match="moved or converted after"):
        _rounds(folder, 1)

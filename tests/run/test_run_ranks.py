"""One party in several processes: `torchrun ... pretrain`, and a trainer that is a group under `mpiexec`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import mpiexec, torchrun
from shapes import SHAPES, SIZE, shape_set
from support import Commands, numbers, wait_for
from torch import nn

import gptfl_dist
from gptfl_dist.config.load import load_federation, load_silo
from gptfl_dist.config.mixing import HandedOut
from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.config.silo import Data
from gptfl_dist.config.task import Model
from gptfl_dist.errors import DataError, LaunchError, ModelError, PolicyError, TrainerError
from gptfl_dist.launch.trainer import TrainerProcess
from gptfl_dist.learning.data import load_images
from gptfl_dist.learning.group import RENDEZVOUS
from gptfl_dist.learning.mixing import write_samples
from gptfl_dist.run.trainer import Trainer
from gptfl_dist.testing.federations import tiny_federation

SETTINGS = LocalTraining(
    epochs=2, batch_size=7, learning_rate=0.1, momentum=0.5, weight_decay=0.01, clip_norm=1.0, augmentation=True,
    threads=1,
)  # fmt: skip


# Pre-training


def shape_federation(folder: Path, epochs: int, per_label: int = 20) -> Path:
    shape_set(folder / "synthetic", per_label)
    return tiny_federation(
        folder,
        labels=list(SHAPES),
        task={"size": SIZE, "channels": 1},
        arms=["synthetic_only"],
        pretraining={"epochs": epochs, "batch_size": 16, "threads": 1, "device": "cpu"},
        synthesis={"images_per_label": per_label},
    )


def test_two_ranks_pretrain_the_model_of_one(gptfl: Commands, tmp_path: Path) -> None:
    alone, together = (shape_federation(tmp_path / name, epochs=4) for name in ("alone", "together"))
    gptfl.run("pretrain", alone)
    command = gptfl.start("pretrain", together, "--format", "json", program=[*torchrun(2), "-m", "gptfl_dist"])
    assert command.wait() == 0, command.stderr
    told, known = json.loads(command.stdout), json.loads((alone.parent / "run/pretrained.json").read_text())
    assert (told["ranks"], known["ranks"]) == (2, 1)
    assert told["request"] == known["request"]
    for mine, other in zip(told["curve"], known["curve"], strict=True):
        assert mine == pytest.approx(other, abs=1e-4)
    mine, other = (numbers(path.parent / "run" / "pretrained.safetensors") for path in (together, alone))
    assert np.allclose(mine, other, atol=1e-4)
    assert command.stderr.count("pretrain: done") == 1

    # A run by one process takes it as its own.
    written = (tmp_path / "together/run/pretrained.safetensors").stat().st_mtime_ns
    gptfl.run("pretrain", together)
    assert (tmp_path / "together/run/pretrained.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_pretraining_comes_to_the_weights_of_an_undisturbed_one(
    gptfl: Commands, tmp_path: Path, ranks: int
) -> None:
    program = [*torchrun(ranks), "-m", "gptfl_dist"]
    disturbed, undisturbed = (shape_federation(tmp_path / name, 30, 40) for name in ("disturbed", "undisturbed"))
    assert gptfl.start("pretrain", undisturbed, program=program).wait() == 0
    state = disturbed.parent / "run" / "pretraining.safetensors"
    command = gptfl.start("pretrain", disturbed, program=program)
    wait_for(state.exists)
    os.kill(command.rank(str(ranks - 1)), signal.SIGKILL)
    assert command.wait(30) != 0
    command.wait_until_gone()
    assert state.exists()
    assert not (disturbed.parent / "run" / "pretrained.json").exists()
    again = gptfl.start("pretrain", disturbed, program=program)
    assert again.wait() == 0, again.stderr
    assert not state.exists()
    facts, expected = (
        json.loads((path.parent / "run" / "pretrained.json").read_text()) for path in (disturbed, undisturbed)
    )
    assert facts == expected


# A silo's training


class Silo:
    """A silo whose trainer is two processes, which `launcher` starts: mpiexec if it is not given."""

    def __init__(self, folder: Path, launcher: Sequence[str] | None = None, **silo: Any) -> None:
        self.folder = folder
        path = tiny_federation(folder)
        self.plan = Plan.of(load_federation(path))
        file = folder / "silo-1.yaml"
        file.write_text(file.read_text() + "".join(f"{name}: {json.dumps(value)}\n" for name, value in silo.items()))
        self.file = load_silo(file)
        self.meeting = folder / "meeting"
        launcher = mpiexec(2, self.meeting) if launcher is None else ["env", f"{RENDEZVOUS}={self.meeting}", *launcher]
        command = [*launcher, "-m", "gptfl_dist.run.trainer"]
        self.process = TrainerProcess(command, folder / "trainer.log", cwd=folder)
        self.weights, self.update = folder / "weights.safetensors", folder / "update.safetensors"

    def play(self, scene: Callable[[], Awaitable[None]]) -> None:
        """Runs `scene` with the trainer started."""

        async def whole() -> None:
            await self.process.start()
            try:
                await scene()
            finally:
                await self.process.stop()

        asyncio.run(asyncio.wait_for(whole(), 120))

    async def setup(self) -> dict[str, Any]:
        told = {"plan": self.plan.model_dump(mode="json"), "silo": self.file.model_dump(mode="json")}
        return await self.process.ask({"type": "setup", "folder": str(self.folder), **told}, "ready")

    async def train(self, progress: Callable[[int, int], None], settings: LocalTraining = SETTINGS) -> dict[str, Any]:
        told = {"round": 3, "training": settings.model_dump(mode="json"), "update": str(self.update)}
        return await self.process.ask({"type": "train", "weights": str(self.weights), **told}, "result", progress)

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        marks = {f"{RENDEZVOUS}={self.meeting}".encode(), f"PMI_RANK={number}".encode()}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if marks <= set((folder / "environ").read_bytes().split(b"\0")):
                    return int(folder.name)
            except OSError:  # gone meanwhile, or somebody else's
                continue
        raise AssertionError(f"no rank {number}")


def ignored(done: int, total: int) -> None:
    """Progress that nobody watches."""


def test_a_silo_of_two_ranks_trains_as_one_rank_would(tmp_path: Path) -> None:
    silo = Silo(tmp_path)
    alone = Trainer(silo.plan, silo.file, tmp_path)
    alone.flat.save(silo.weights)
    expected = alone.train(
        round_=3, settings=SETTINGS, weights=silo.weights, update=tmp_path / "expected", progress=ignored
    )
    seen: list[tuple[int, int]] = []

    async def scene() -> None:
        ready = await silo.setup()
        assert ready["layout"] == alone.layout.to_json()
        answer = await silo.train(lambda *step: seen.append(step))
        assert answer["samples"] == expected.samples
        for name, value in expected.metrics.items():
            assert name == "seconds" or answer["metrics"][name] == pytest.approx(value, rel=1e-5)
        evaluated = await silo.process.ask({"type": "evaluate", "weights": str(silo.weights)}, "result")
        assert evaluated["metrics"]["loss"] == pytest.approx(alone.evaluate(silo.weights).metrics["loss"], rel=1e-5)
        with pytest.raises(ModelError, match="silo-1"):  # an error of rank 0 alone; the group goes on
            await silo.process.ask({"type": "evaluate", "weights": str(tmp_path / "silo-1.npz")}, "result")
        with pytest.raises(TrainerError, match="training loss became"):
            await silo.train(ignored, SETTINGS.model_copy(update={"learning_rate": 1e30, "clip_norm": None}))
        assert await silo.train(ignored)
        await silo.process.finish({"type": "finish"})
        assert not silo.process.running

    silo.play(scene)
    assert len(seen) == seen[-1][1] == seen[-1][0]
    assert np.allclose(numbers(silo.update), numbers(tmp_path / "expected"), rtol=1e-5, atol=1e-6)
    assert "13,186 parameters" in (tmp_path / "trainer.log").read_text()


def test_synthetic_samples_reach_every_rank_though_one_alone_reads_them(tmp_path: Path) -> None:
    silo = Silo(tmp_path)
    alone = load_images(Data(path=tmp_path / "silo-2.npz"), silo.plan.task, silo.plan.labels)
    write_samples(tmp_path / "samples.safetensors", alone)
    given = HandedOut(digest="0" * 64, count=len(alone), use="all", per_label=len(alone))
    silo.plan = silo.plan.model_copy(update={"samples": given})
    trainer = Trainer(silo.plan, silo.file, tmp_path)
    trainer.flat.save(silo.weights)
    expected = trainer.train(
        round_=3, settings=SETTINGS, weights=silo.weights, update=tmp_path / "expected", progress=ignored,
        samples=tmp_path / "samples.safetensors",
    )  # fmt: skip

    async def scene() -> None:
        await silo.setup()
        told = {"round": 3, "training": SETTINGS.model_dump(mode="json"), "update": str(silo.update)}
        told |= {"weights": str(silo.weights), "samples": str(tmp_path / "silo-1.npz")}
        with pytest.raises(ModelError, match="silo-1"):  # of rank 0 alone; the group goes on
            await silo.process.ask({"type": "train", **told}, "result")
        told["samples"] = str(tmp_path / "samples.safetensors")
        answer = await silo.process.ask({"type": "train", **told}, "result")
        assert answer["samples"] == answer["metrics"]["samples"] == expected.samples == 18
        assert answer["metrics"]["train_loss"] == pytest.approx(expected.metrics["train_loss"], rel=1e-5)

    silo.play(scene)
    assert np.allclose(numbers(silo.update), numbers(tmp_path / "expected"), rtol=1e-5, atol=1e-6)


SHELL = ("env", "PMI_SIZE=2", "sh", "-c", 'PMI_RANK=1 "$@" & PMI_RANK=0 exec "$@"', "sh", sys.executable)
"""A launcher that minds nothing."""


@pytest.mark.parametrize("idle", [False, True])
def test_a_rank_that_is_killed_ends_the_trainer_without_a_launchers_help(tmp_path: Path, idle: bool) -> None:
    silo = Silo(tmp_path, SHELL)
    Trainer(silo.plan, silo.file, tmp_path).flat.save(silo.weights)
    endless = SETTINGS.model_copy(update={"epochs": 100_000})

    async def scene() -> None:
        await silo.setup()
        if idle:
            os.kill(silo.rank(1), signal.SIGKILL)
            assert silo.process._process is not None
            await asyncio.wait_for(silo.process._process.wait(), 15)
            return
        victims = [silo.rank(1)]
        with pytest.raises(TrainerError, match="before it answered"):
            await asyncio.wait_for(
                silo.train(lambda done, total: victims and os.kill(victims.pop(), signal.SIGKILL), endless), 15
            )

    silo.play(scene)
    assert "RankLost: rank 0 of 2 lost another" in (tmp_path / "trainer.log").read_text()


CRASHES = """
def local_training(model, data, settings, task, *, seed, device, progress, group):
    if group.rank == 1:
        raise ValueError("a defect at one rank")
    group.tell({"waits": "for the other"})
    group.gather(b"")
    return {}
"""
ALONE = """
def local_training(model, data, settings, task, *, seed, device, progress):
    return {}
"""


def test_a_function_that_takes_the_group_gets_it_and_its_defect_at_one_rank_ends_the_group(tmp_path: Path) -> None:
    (tmp_path / "crashing_code.py").write_text(CRASHES)
    silo = Silo(tmp_path, code={"function": "crashing_code:local_training"})

    async def scene() -> None:
        await silo.setup()
        Trainer(silo.plan, silo.file.model_copy(update={"code": None}), tmp_path).flat.save(silo.weights)
        with pytest.raises(TrainerError, match="before it answered"):
            await asyncio.wait_for(silo.train(ignored), 15)

    silo.play(scene)
    log = (tmp_path / "trainer.log").read_text()
    assert "ValueError: a defect at one rank" in log
    assert "RankLost: rank 0 of 2 lost another" in log


def test_a_function_that_knows_of_no_group_is_refused_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "lonely_code.py").write_text(ALONE)
    silo = Silo(tmp_path, code={"function": "lonely_code:local_training"})

    async def scene() -> None:
        with pytest.raises(PolicyError, match="takes no argument `group`, and this silo trains with 2 ranks"):
            await silo.setup()
        (tmp_path / "silo-1.npz").unlink()
        silo.file = silo.file.model_copy(update={"code": None})
        with pytest.raises(DataError, match=r"silo-1\.npz"):
            await silo.setup()

    silo.play(scene)


def test_only_rank_0_of_a_script_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=r"rank 1 of 2 called gptfl_dist\.join"):
        gptfl_dist.join(nn.Linear(1, 1))


MODEL = """
import os
from torch import nn
def build(label_count, task):
    from gptfl_dist.errors import DataError
    if os.environ["PMI_RANK"] == "1":
        raise DataError("not at this rank")
    return nn.Sequential(nn.Flatten(), nn.Linear(task.size ** 2, label_count))
"""


def test_what_one_rank_alone_finds_wrong_is_answered(tmp_path: Path) -> None:
    (tmp_path / "picky_code.py").write_text(MODEL)
    silo = Silo(tmp_path, code={"model": "picky_code:build"})
    silo.plan = silo.plan.model_copy(update={"model": Model(name="function", source="picky_code:build")})

    async def scene() -> None:
        with pytest.raises(ModelError, match=r"rank 1: .* not at this rank"):
            await silo.setup()

    silo.play(scene)

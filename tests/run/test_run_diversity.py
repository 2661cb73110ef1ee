"""`federation.diversity`: how far the updates of each round agree stands in the ledger, whoever sent them and when."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federated import ARM, DEADLINE, STEPS, World, in_loop
from safetensors.torch import load_file
from support import RULES, Commands, Federation
from trained import TrainedWorld

from gptfl_dist.aggregation.diversity import Diversity
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.ledger.records import ArmRecord
from gptfl_dist.testing.clock import advance
from gptfl_dist.weights.flat import FlatModel


def found(record: ArmRecord) -> list[Diversity | None]:
    return [r.diversity for r in record.rounds if r.kind == "train"]


def of(silos: str) -> Diversity:
    """Of updates that hold one number four times, over those alone: the counter beside them has no part."""
    steps = [STEPS[silo] for silo in silos]
    signs = [math.copysign(1, step) for step in steps]
    n = len(steps)
    return Diversity(
        updates=n,
        diversity=sum(step**2 for step in steps) / sum(steps) ** 2,
        mean_cosine=(sum(signs) ** 2 - n) / (n * (n - 1)) if n > 1 else None,
        mean_norm=sum(2 * abs(step) for step in steps) / n,
        max_norm=max(2 * abs(step) for step in steps),
    )


@in_loop
async def test_it_is_of_the_updates_that_counted(tmp_path: Path) -> None:
    async with World(tmp_path, diversity=True, quorum=2) as world:
        world.join("a", "b", "c")
        slow = world.network.hold("c", "upload", round=2)
        run = asyncio.create_task(world.federate_with())
        await slow.reached.wait()
        await world.until(lambda: world.committed(2) == {"a", "b"})
        advance(DEADLINE)
        await world.until(lambda: (ARM, 2) in world.notes.closed)
        slow.release()
        record = await run
    assert found(record) == [of("abc"), of("ab"), of("abc")]
    assert record.rounds[-1].kind == "evaluate"
    assert record.rounds[-1].diversity is None


@in_loop
async def test_nothing_is_measured_unless_asked_for(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        assert found(await world.federate()) == [None, None, None]


@in_loop
async def test_an_asynchronous_round_is_of_the_updates_in_its_buffer(tmp_path: Path) -> None:
    async with World(tmp_path, diversity=True, mode="asynchronous", buffer=2, quorum="all") as world:
        record = await world.federate()
    assert found(record) == [of("".join(u.silo for u in r.updates)) for r in record.rounds if r.kind == "train"]


@in_loop
async def test_a_round_that_was_broken_off_has_it_after_the_restart(tmp_path: Path) -> None:
    async with World(tmp_path, diversity=True) as world:
        world.join("a", "b", "c")
        slow = world.network.hold("c", "upload", round=2)
        running = asyncio.create_task(world.federate_with())
        await slow.reached.wait()
        await world.until(lambda: world.committed(2) == {"a", "b"})
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        slow.release()
        record = await world.federate_with()
    assert found(record) == [of("abc")] * 3


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaffold": {"strategy": {"rule": "scaffold"}},
    "clipped": {"strategy": {"clip_norm": 0.01}},
    "half the bits": {"compression": {"up": "fp16"}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@in_loop
async def test_it_is_over_the_parameters_of_updates_as_they_came(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Of real training, seen at the silos: neither what a strategy clips has a part nor what travels beside."""
    rows: list[np.ndarray] = []

    def look(flat: FlatModel, received: Path) -> None:
        before = load_file(received)
        with torch.no_grad():
            moved = [(value - before[name]).double().ravel() for name, value in flat.model.named_parameters()]
        rows.append(torch.cat(moved).numpy())

    parts = {"a": np.arange(200), "b": np.arange(200, 500)}
    rules = {"rounds": 1, "diversity": True}
    async with TrainedWorld(
        tmp_path, parts, np.arange(600, 700), dict.fromkeys(parts, look), federation=rules, **settings
    ) as world:
        (diversity,) = found(await world.federate())
    norms, together = np.linalg.norm(rows, axis=1), np.linalg.norm(np.sum(rows, axis=0))
    assert diversity is not None
    assert diversity.updates == 2
    assert diversity.diversity == pytest.approx((norms**2).sum() / together**2, rel=2e-3)
    assert diversity.mean_cosine == pytest.approx(rows[0] @ rows[1] / norms.prod(), rel=2e-3)
    assert (diversity.mean_norm, diversity.max_norm) == pytest.approx((norms.mean(), norms.max()), rel=2e-3)


def test_it_is_the_same_over_every_exchange(gptfl: Commands, tmp_path: Path) -> None:
    rules = {**RULES, "rounds": 2, "diversity": True}
    told = []
    for name in ("grpc", "memory", "mpi"):
        federation = Federation(tmp_path / name, epochs=1, federation=rules)
        command = (
            gptfl.mpi(3, "run", federation.path)
            if name == "mpi"
            else gptfl.start("run", federation.path, "--exchange", name)
        )
        assert command.wait() == 0, command.stderr
        rounds = federation.summary()["arms"]["fedavg_random"]["measures"]
        told.append([{name: one[name] for name in one if name != "silo_seconds"} for one in rounds])
    assert told[0] == told[1] == told[2]
    start, *rounds = told[0]
    assert start["diversity"] is None
    for one in rounds:
        assert one["diversity"] >= 0.5
        assert one["log_n_diversity"] == pytest.approx(math.log(2 * one["diversity"]))
        assert 0 < one["mean_norm"] <= one["max_norm"]
        assert set(one["silo_accuracy"]) == {"silo-1", "silo-2"}


def test_where_updates_are_seen_as_a_sum_it_is_refused() -> None:
    settings = {
        "name": "fed",
        "labels": ["a", "b"],
        "silos": [{"name": "one"}],
        "collective": {"reduction": "fast"},
        "federation": {"diversity": True},
    }
    with pytest.raises(ValueError, match=r"but federation\.diversity is true: set collective\.reduction to exact"):
        FederationFile.model_validate(settings)

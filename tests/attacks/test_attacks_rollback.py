"""A false coordinator that holds the coordinator's own certificate and key, and wants a silo to go back.

Over the real wire, against a real silo whose memory is on its disk: the silo is started anew for each coordinator that
it meets, as after a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from exchange_world import AUTHORITY, COORDINATOR, SILOS, SMALL, World, dial, in_loop, random_weights, train_order

from gptfl_dist.config.silo import Data, SiloFile
from gptfl_dist.exchange.base import Answered, OrderFailed
from gptfl_dist.federation.orders import Order
from gptfl_dist.run.freshness import SEEN, Freshness
from gptfl_dist.run.silo import Silo
from gptfl_dist.security.authority import Credentials
from gptfl_dist.security.epoch import FIRST, Epoch, begun
from gptfl_dist.testing.exchange import ScriptedTrainer
from gptfl_dist.weights import WeightsFile

KEPT = replace(FIRST, kept=True)
"""The first epoch of a federation that keeps an authority of its own."""


def next_epoch(signer: Credentials | None, number: int = 2, *, kept: bool = True, reason: str = "") -> Epoch:
    rounds = {"gptfl": 2}
    return begun(number, signer, federation="fed", run="run-1", rounds=rounds, reason=reason, kept=kept)


class Victim:
    """The silo alice, and what the coordinators that it meets can make of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self.trainer = ScriptedTrainer(SMALL, 10, lambda order: (bytes(SMALL.nbytes), {}))

    async def asked(self, round_: int, epoch: Epoch = KEPT, *, weights: int = 0, said: int | None = None) -> str:
        """What a coordinator hears of an order: why it failed, "" where the silo trained and delivered.

        `weights` are those of the round where 0; `said` is the order's own epoch, where that is another.
        """
        self._count += 1
        file, digest, _ = random_weights(self._folder / f"{self._count}.safetensors", SMALL, weights or round_)
        order = replace(train_order(f"n{self._count}", digest, round_), epoch=epoch.number if said is None else said)
        with file:
            async with World(self._folder / str(self._count), epoch=epoch) as world, self._at(world):
                return await self._answer(world, order, digest, file)

    async def _answer(self, world: World, order: Order, digest: str, file: WeightsFile) -> str:
        await world.event()
        await world.server.publish({digest: file})
        await world.give("alice", order)
        event = await world.event()
        assert isinstance(event, Answered | OrderFailed)
        return event.reason if isinstance(event, OrderFailed) else ""

    @contextlib.asynccontextmanager
    async def _at(self, world: World) -> AsyncIterator[None]:
        exchange = dial(world.server.port, SILOS["alice"])
        home = self._folder / "alice"
        silo = Silo(
            silo=SiloFile(name="alice", data=Data(path=self._folder)),
            exchange=exchange,
            runner=self.trainer,
            folder=home,
            fresh=Freshness(home, "fed", lambda: exchange.credentials.authority),
        )
        running = asyncio.create_task(silo.run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@in_loop
async def test_a_false_coordinator_cannot_set_a_silo_back(tmp_path: Path) -> None:
    victim = Victim(tmp_path)
    assert await victim.asked(1) == ""
    assert await victim.asked(3) == ""
    assert await victim.asked(3) == ""  # the same round again, as after a restart
    refused = {
        "an earlier round": await victim.asked(2),
        "other weights for the round": await victim.asked(3, weights=99),
        "an epoch that nobody began": await victim.asked(2, replace(KEPT, number=2)),
        "its own epoch, not signed": await victim.asked(2, next_epoch(None)),
        "signed by its own certificate": await victim.asked(2, next_epoch(COORDINATOR)),
        "though it says that no authority is kept": await victim.asked(2, next_epoch(COORDINATOR, kept=False)),
        "signed by a silo": await victim.asked(2, next_epoch(SILOS["bob"])),
        "an order of another epoch than the run's": await victim.asked(4, said=2),
        "another first epoch": await victim.asked(4, replace(next_epoch(None), number=1)),
    }
    for attack, reason in refused.items():
        assert reason.startswith("PolicyError: rollback: "), attack
    assert "round 2 of gptfl is asked for, and round 3 was seen in epoch 1" in refused["an earlier round"]
    assert [order.round for order in victim.trainer.orders] == [1, 3, 3]


@in_loop
async def test_the_authority_can_and_nothing_of_the_older_epoch_is_taken_after_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    victim = Victim(tmp_path)
    assert await victim.asked(5) == ""
    second = next_epoch(AUTHORITY.own, reason="disk\nlost")
    assert "rollback" in await victim.asked(1, second)  # it goes on from round 2
    assert await victim.asked(2, second, weights=99) == ""
    assert "rounds that are asked for again: from 2 of gptfl" in caplog.text
    assert "'disk\\nlost'" in caplog.text
    for older in (KEPT, next_epoch(AUTHORITY.own, reason="another second epoch")):
        assert "rollback" in await victim.asked(6, older)
    assert await victim.asked(3, next_epoch(AUTHORITY.own, 4)) == ""  # it was away in the third
    assert "the coordinator is in epoch 2, and epoch 4 was seen" in await victim.asked(9, second)


@in_loop
async def test_where_no_authority_is_kept_the_coordinators_certificate_begins_an_epoch(tmp_path: Path) -> None:
    victim = Victim(tmp_path)
    assert await victim.asked(3, FIRST) == ""
    assert "rollback" in await victim.asked(2, next_epoch(None, kept=False))
    assert await victim.asked(2, next_epoch(COORDINATOR, kept=False)) == ""
    # Once it has heard that there is an authority, it takes the authority's word alone.
    assert await victim.asked(2, next_epoch(AUTHORITY.own, 3)) == ""
    assert "rollback" in await victim.asked(2, next_epoch(COORDINATOR, 4, kept=False))


@in_loop
async def test_another_run_is_another_matter_and_what_is_remembered_is_its_owners_alone(tmp_path: Path) -> None:
    victim = Victim(tmp_path)
    assert await victim.asked(3) == ""
    memory = tmp_path / "alice" / SEEN
    assert memory.stat().st_mode & 0o077 == 0
    memory.write_text(memory.read_text().replace("run-1", "run-0"))
    assert await victim.asked(1) == ""

"""A coordinator that is killed at any step and started again comes to the same weights, and asks for nothing twice."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from federated import (
    ARM,
    LAYOUT,
    SAMPLES,
    START,
    Metrics,
    World,
    answered,
    failing,
    flat,
    in_loop,
    mean_step,
)

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.errors import StorageError, TrainerError
from gptfl_dist.exchange.inbox import Inbox
from gptfl_dist.exchange.memory import Fault
from gptfl_dist.federation.orders import Order
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.run import evaluator
from gptfl_dist.run.arms import run_arms
from gptfl_dist.run.evaluation import RANDOM_WEIGHTS
from gptfl_dist.testing.exchange import MemoryCoordinatorExchange
from gptfl_dist.weights import WeightsFile, write_weights


class Killed(StorageError):
    """Stands for a kill: from here on nothing of this coordinator has any effect."""


class Life:
    """Ends at the `count`-th time that it comes to an instant: just before or after a step that leaves a trace.

    An empty `instant` means any.
    """

    def __init__(self, instant: str, count: int, die: Callable[[], object]) -> None:
        self.instants: list[str] = []
        self.over = False
        self._instant = instant
        self._count = count
        self._die = die

    def live(self, instant: str) -> None:
        if not self.over:
            self.instants.append(instant)
            self._count -= self._instant in ("", instant)
            self.over = self._count == 0
        if self.over:
            self._die()
            raise Killed(f"killed {instant}")


class MortalLedger(Ledger):
    """A real ledger of a coordinator that may be killed before and after each write."""

    life: Life | None = None

    def step(self, name: str, *arguments: Any) -> Any:
        if self.life is None:
            return getattr(Ledger, name)(self, *arguments)
        self.life.live(f"before {name}")
        result = getattr(Ledger, name)(self, *arguments)
        self.life.live(f"after {name}")
        return result


def _mortal(name: str) -> Callable[..., Any]:
    return lambda self, *arguments: self.step(name, *arguments)


WRITES = [
    name
    for name in vars(Ledger)
    if not name.startswith("_")
    and name not in ("folder", "close", "fact", "seconds", "arm", "arms", "add_seconds")
    and name not in ("weights_path", "state_path", "incoming_state", "require_weights", "require_state")
]
for _name in WRITES:
    setattr(MortalLedger, _name, _mortal(_name))


class MortalExchange(MemoryCoordinatorExchange):
    """Notes each order that is given under a nonce whose answer the ledger has, and may be killed at each step."""

    def __init__(self, life: Life, ledger: Ledger, asked_twice: list[Order], **settings: Any) -> None:
        super().__init__(**settings)
        self._life, self._ledger, self._asked_twice = life, ledger, asked_twice

    async def publish(self, bases: Mapping[str, WeightsFile]) -> None:
        self._life.live("before publish")
        await super().publish(bases)

    async def send(self, silo: str, order: Order) -> None:
        self._life.live("before send")
        record = self._ledger.arm(order.arm)
        assert record is not None
        for given in (given for r in record.rounds for given in r.orders if given.nonce == order.nonce):
            if given.digest is not None or given.failure is not None:
                self._asked_twice.append(order)
        await super().send(silo, order)
        self._life.live("after send")


async def live(world: World, asked_twice: list[Order], instant: str = "", count: int = 0) -> Life:
    """Runs a coordinator to its end, or up to an instant of its life."""
    loop = asyncio.get_running_loop()
    made: list[MemoryCoordinatorExchange] = []

    def die() -> None:
        for exchange in made:  # this coordinator's, not that of the next one
            loop.call_soon_threadsafe(exchange.vanish)

    life = Life(instant, count, die)
    ledger = MortalLedger(world.file.run_folder, "request")

    def make_exchange(inbox: Inbox) -> MemoryCoordinatorExchange:
        silos = tuple(world.trainers)
        made.append(MortalExchange(life, ledger, asked_twice, network=world.network, silos=silos, inbox=inbox))
        return made[0]

    with contextlib.suppress(Killed):
        async with world.coordinator(ledger, make_exchange) as federator:
            ledger.life = life
            await run_arms(federator)
    return life


def disturbed(folder: Path) -> World:
    """A federation in which one silo fails in the first round."""
    return World(folder, rounds=2, quorum="majority", script=failing("b", 1), strategy={"momentum": 0.5})


DISTURBED = START + mean_step("ac") + (0.5 * mean_step("ac") + mean_step("abc"))


@in_loop
async def test_the_start_that_is_tested_is_that_of_the_arm(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=1, accuracy=lambda value: value) as world:
        world.join(*world.trainers)
        assert (await live(world, [], "after begin_arm", 1)).over
        write_weights(world.file.run_folder / RANDOM_WEIGHTS, LAYOUT, [flat(0.75)])
        assert not (await live(world, [])).over
        record = world.record()
    assert record.start_tested is not None
    assert record.start_tested.accuracy == START


def test_random_start_weights_that_are_there_stay(tmp_path: Path) -> None:
    written = tmp_path / RANDOM_WEIGHTS
    content = []
    for seed in (0, 1):  # as another release of torch might draw others from one seed
        file = FederationFile.model_validate(
            {
                "name": "fed", "run_folder": tmp_path, "labels": ["a", "b"], "seed": seed, "arms": ["fedavg_random"],
                "silos": [{"name": "s"}], "task": {"size": 8},
            }
        )  # fmt: skip
        evaluator.Tester(file, tmp_path).save(written)
        content.append(written.read_bytes())
    assert content[0] == content[1]


@in_loop
async def test_a_coordinator_that_is_killed_at_any_step_comes_to_the_same_weights(tmp_path: Path) -> None:
    async with disturbed(tmp_path / "undisturbed") as world:
        world.join(*world.trainers)
        whole = await live(world, [])
        undisturbed = world.record()
    times = Counter(whole.instants)
    steps = ("add_weights", "begin_arm", "open_round", "publish", "send", "commit", "fail", "keep_state", "close_round")
    assert {f"before {step}" for step in steps} <= set(times)
    for instant, count in sorted({(name, count) for name in times for count in (1, times[name])}):
        asked_twice: list[Order] = []
        where = f"killed {instant}, time {count}"
        async with disturbed(tmp_path / where) as world:
            world.join(*world.trainers)
            async with asyncio.timeout(20):
                killed = await live(world, asked_twice, instant, count)
                if killed.over:  # the last of several at once may come a time less
                    await live(world, asked_twice)
            record = world.record()
        assert asked_twice == [], where
        assert (record.final, record.best_round) == (undisturbed.final, undisturbed.best_round), where
        assert [r.cohort for r in record.rounds] == [r.cohort for r in undisturbed.rounds], where
        assert [answered(record, r) for r in (1, 2)] == [{"a", "c"}, {"a", "b", "c"}], where
        assert world.value() == DISTURBED, where
        assert [world.trained(silo) for silo in "ac"] == [[(ARM, 1), (ARM, 2)]] * 2, where


@pytest.mark.parametrize("every", [37, 47])  # fewer are spent before a life comes to anything new
@in_loop
async def test_a_coordinator_that_is_killed_again_and_again_comes_to_the_same_weights(
    tmp_path: Path, every: int
) -> None:
    asked_twice: list[Order] = []
    async with disturbed(tmp_path) as world:
        world.join(*world.trainers)
        lives = 1
        while (await live(world, asked_twice, count=every)).over:
            lives += 1
            assert lives < 50
    assert lives > 2
    assert asked_twice == []
    assert world.value() == DISTURBED


@in_loop
async def test_in_asynchronous_mode_a_kill_at_any_step_loses_nothing_and_counts_nothing_twice(tmp_path: Path) -> None:
    def world_of(folder: Path) -> World:
        rules = {"rounds": 3, "mode": "asynchronous", "buffer": 2, "cohort": 2, "staleness": 0.0}
        return World(folder, step=lambda *_: 1.0, script=failing("b", 1), **rules)  # any two updates make a step of 1

    async with world_of(tmp_path / "undisturbed") as world:
        world.join(*world.trainers)
        times = Counter((await live(world, [])).instants)
    steps = ("open_round", "enlist", "publish", "send", "commit", "fail", "keep_state", "close_round")
    assert {f"before {step}" for step in steps} <= set(times)
    for instant, count in sorted({(name, count) for name in times for count in (1, 2, times[name])}):
        asked_twice: list[Order] = []
        where = f"killed {instant}, time {count}"
        async with world_of(tmp_path / where) as world:
            world.join(*world.trainers)
            async with asyncio.timeout(20):
                killed = await live(world, asked_twice, instant, count)
                if killed.over:
                    await live(world, asked_twice)
            record = world.record()
        assert asked_twice == [], where
        assert world.value() == START + 3, where
        assert all(len(r.updates) >= 2 for r in record.rounds[:3]), where
        assert sum(len(r.updates) for r in record.rounds) == sum(
            order.counted is not None for r in record.rounds for order in r.orders
        ), where
        for silo in "ac":  # nothing that was trained is trained again
            assert len(world.trained(silo)) == len(set(world.trained(silo))), where


@contextlib.asynccontextmanager
async def at_work_until(world: World, held: Fault) -> AsyncIterator[None]:
    """A coordinator that comes to where `held` stops a silo, and is gone with the end of the block."""
    async with world.coordinator() as federator:
        run = asyncio.create_task(run_arms(federator))
        await held.reached.wait()
        yield
        world.network.drop_coordinator()
        run.cancel()
        await asyncio.wait([run])


@in_loop
async def test_a_silo_that_failed_before_the_restart_is_not_asked_again(tmp_path: Path) -> None:
    failures = iter([TrainerError("out of memory")])

    def once(silo: str, order: Order) -> Metrics:
        if silo == "b" and order.round == 1 and (error := next(failures, None)):
            raise error
        return {}

    async with World(tmp_path, quorum="majority", rounds=1, script=once) as world:
        held = world.network.hold("c", "upload", round=1)
        world.join(*world.trainers)
        async with at_work_until(world, held):
            await world.until(lambda: world.committed(1) == {"a"})
            await world.until(lambda: any("b failed" in text for text in world.notes.texts))
        held.release()
        record = await world.federate()
    assert world.trained("b") == [(ARM, 1)]
    assert answered(record, 1) == {"a", "c"}
    assert world.value() == START + mean_step("ac")


@in_loop
async def test_an_update_that_came_before_the_restarted_coordinator_asked_for_it_is_sent_again(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=2) as world:
        early = world.network.hold("c", "upload", round=2)
        world.join(*world.trainers)
        async with at_work_until(world, early):
            await world.until(lambda: world.committed(2) == {"a", "b"})
        told_late = world.network.hold("c", "refused", round=2)
        async with world.coordinator() as federator:
            await world.until(lambda: "c" in federator.exchange._lines)
            early.release()
            await told_late.reached.wait()  # the coordinator is there, and expects nothing yet
            known = len(world.notes.texts)
            run = asyncio.create_task(run_arms(federator))
            await world.until(lambda: any("going on in round 2" in text for text in world.notes.texts[known:]))
            await world.until(lambda: any("(3 of 3 are here)" in text for text in world.notes.texts[known:]))
            await asyncio.sleep(0.05)  # the order is given again while the silo still waits to be told
            told_late.release()
            await world.until(lambda: run.done())
            await run
    assert world.trained("c") == [(ARM, 1), (ARM, 2)]
    assert world.value() == START + 2 * mean_step(SAMPLES)


@in_loop
async def test_the_bytes_of_a_round_are_counted_over_a_restart(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=1) as world:
        held = world.network.hold("c", "upload", round=1)
        world.join(*world.trainers)
        async with at_work_until(world, held):
            await world.until(lambda: world.committed(1) == {"a", "b"})
        held.release()
        record = await world.federate()
    assert (record.rounds[0].bytes_down, record.rounds[0].bytes_up) == (3 * LAYOUT.nbytes, 3 * LAYOUT.nbytes)


@pytest.mark.parametrize("folder", ["weights", "strategy"])
@pytest.mark.parametrize("damage", ["a byte", "its end", "all"])
@in_loop
async def test_damaged_weights_and_strategy_state_are_named_and_not_gone_on_from(
    tmp_path: Path, folder: str, damage: str
) -> None:
    async with World(tmp_path, rounds=2, strategy={"momentum": 0.5}) as world:
        held = world.network.hold("c", "upload", round=2)
        world.join(*world.trainers)
        async with at_work_until(world, held):
            pass
        path = world.file.run_folder / folder / f"{world.record().final}.safetensors"
        content = path.read_bytes()
        if damage == "a byte":
            path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        elif damage == "its end":
            path.write_bytes(content[:-3])
        else:
            path.unlink()
        held.release()
        async with world.coordinator() as federator:
            with pytest.raises(StorageError, match=re.escape(str(path))) as error:
                await run_arms(federator)
    assert "--fresh" in error.value.hint
    assert world.trained("c") == [(ARM, 1), (ARM, 2)]

"""The federator and its deadlines: who is late is recalled, and what was committed in time counts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from blake3 import blake3
from federated import (
    ARM,
    DEADLINE,
    LAYOUT,
    ROUNDS,
    START,
    STEPS,
    World,
    answered,
    flat,
    in_loop,
    mean_step,
)

from gptfl_dist.exchange.base import Goodbye, Recalled, UpdateHeader
from gptfl_dist.exchange.inbox import Spool
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.testing.clock import advance
from gptfl_dist.testing.exchange import MemorySiloExchange
from gptfl_dist.weights import WeightsFile, write_weights


@in_loop
async def test_at_the_deadline_the_late_silo_is_recalled_and_a_quorum_counts(tmp_path: Path) -> None:
    async with World(tmp_path, quorum="majority") as world:
        late = world.network.hold("c", "upload", round=2)
        run = asyncio.create_task(world.federate())
        await late.reached.wait()
        await world.until(lambda: world.committed(2) == {"a", "b"})
        advance(DEADLINE)
        record = await run
    assert world.value() == START + 2 * mean_step("abc") + mean_step("ab")
    assert answered(record, 2) == {"a", "b"}
    assert any("c recalled: the deadline" in text for text in world.notes.texts)
    assert record.rounds[1].bytes_up == 2 * LAYOUT.nbytes


@in_loop
async def test_an_update_that_comes_after_the_recall_is_refused(tmp_path: Path) -> None:
    async with World(tmp_path, quorum="majority", rounds=1) as world:
        world.join("a", "b")
        stubborn = MemorySiloExchange(network=world.network, silo="c")
        run = asyncio.create_task(world.federate_with())
        await stubborn.connect()
        await stubborn.ready()
        order = await stubborn.receive()
        assert isinstance(order, Order)
        await world.until(lambda: world.committed(1) == {"a", "b"})
        advance(DEADLINE)
        assert isinstance(await stubborn.receive(), Recalled)
        content = flat(STEPS["c"])
        digest = write_weights(tmp_path / "late.safetensors", LAYOUT, [content])
        assert digest == blake3(content).hexdigest()
        with WeightsFile(tmp_path / "late.safetensors") as update:
            header = UpdateHeader(Report(order.nonce, 4, {}), order.base, LAYOUT.digest, digest, LAYOUT.nbytes)
            receipt = await stubborn.upload(header, update)
        assert not receipt.committed
        assert "answers no order that is open" in receipt.reason
        final = await stubborn.receive()
        assert isinstance(final, Order)
        await stubborn.report(Report(final.nonce, 4, {}))
        record = await run
        assert await stubborn.receive() == Goodbye(True, "finished")
    assert world.value() == START + mean_step("ab")
    assert answered(record, 1) == {"a", "b"}


@in_loop
async def test_a_late_silo_takes_part_in_the_next_round(tmp_path: Path) -> None:
    async with World(tmp_path, quorum="majority") as world:
        late = world.network.hold("c", "download", round=1)
        run = asyncio.create_task(world.federate())
        await late.reached.wait()
        await world.until(lambda: world.committed(1) == {"a", "b"})
        advance(DEADLINE)
        record = await run
    assert [answered(record, r) for r in (1, 2, 3)] == [{"a", "b"}, {"a", "b", "c"}, {"a", "b", "c"}]
    assert world.value() == START + mean_step("ab") + 2 * mean_step("abc")


@in_loop
async def test_the_join_deadline_says_nothing_to_a_round_that_has_begun(tmp_path: Path) -> None:
    async with World(tmp_path, deadline="10000s", join_deadline="10s") as world:
        slow = world.network.hold("c", "upload", round=2)
        run = asyncio.create_task(world.federate())
        await slow.reached.wait()
        advance(20)
        await asyncio.sleep(0.01)
        slow.release()
        record = await asyncio.wait_for(run, 10_000)
    assert answered(record, 2) == {"a", "b", "c"}
    assert world.value() == START + ROUNDS * mean_step("abc")


@in_loop
async def test_a_commit_that_comes_before_the_deadline_counts_though_nobody_was_told_yet(tmp_path: Path) -> None:
    async with World(tmp_path, quorum="majority") as world:
        racing = world.network.hold("c", "committed", round=2)
        run = asyncio.create_task(world.federate())
        await racing.reached.wait()
        await world.until(lambda: world.committed(2) == {"a", "b", "c"})
        advance(DEADLINE)
        await world.until(lambda: (ARM, 2) in world.notes.closed)
        racing.release()
        record = await run
    assert world.value() == START + ROUNDS * mean_step("abc")
    assert [order.failure for order in record.rounds[1].orders] == [None] * 3


@in_loop
async def test_a_recall_that_comes_before_the_commit_wins_wholly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, loop = Spool.norm, asyncio.get_running_loop()
    checking, recalled = asyncio.Event(), asyncio.Event()
    slow = (tmp_path / "run" / "spools" / "c.spool").resolve()

    async def wait_for_the_recall() -> None:
        checking.set()
        await recalled.wait()

    def check(spool: Spool) -> float:
        if spool.path.resolve() == slow and not recalled.is_set():
            asyncio.run_coroutine_threadsafe(wait_for_the_recall(), loop).result(30)
        return real(spool)

    monkeypatch.setattr(Spool, "norm", check)
    async with World(tmp_path, quorum="majority", rounds=1) as world:
        run = asyncio.create_task(world.federate())
        await checking.wait()
        await world.until(lambda: world.committed(1) == {"a", "b"})
        advance(DEADLINE)
        await world.until(lambda: any("c recalled" in text for text in world.notes.texts))
        recalled.set()
        record = await run
    assert world.value() == START + mean_step("ab")
    (of_c,) = [order for order in record.rounds[0].orders if order.silo == "c"]
    assert (of_c.samples, of_c.metrics, of_c.digest) == (None, None, None)
    assert of_c.failure is not None

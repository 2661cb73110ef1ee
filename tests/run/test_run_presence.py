"""Silos that are missing: who is waited for and named, also after a revocation, and when that is given up."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

import pytest
from federated import (
    ARM,
    DEADLINE,
    JOIN_DEADLINE,
    START,
    World,
    answered,
    failing,
    in_loop,
    mean_step,
)

from gptfl_dist.errors import FederationError
from gptfl_dist.ledger.record import FILE_NAME
from gptfl_dist.ledger.requests import ask_to_pause, ask_to_resume
from gptfl_dist.run.arms import run_arms
from gptfl_dist.run.federate import Federator
from gptfl_dist.testing.clock import advance
from gptfl_dist.testing.exchange import MemoryCoordinatorExchange


@in_loop
async def test_who_is_missing_is_said_once_and_again_when_that_changes(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=1) as world:
        run = asyncio.create_task(world.federate_with())
        await world.until(lambda: len(world.notes.texts) == 1)
        for number, name in enumerate("cab", start=2):
            world.join(name)
            await world.until(lambda number=number: len(world.notes.texts) >= number)
        await run
    assert world.notes.texts[:4] == [
        "waiting for a, b, c (0 of 3 are here)",
        "c joined, waiting for a, b (1 of 3 are here)",
        "a joined, waiting for b (2 of 3 are here)",
        "b joined (3 of 3 are here)",
    ]
    assert not any("waiting" in text for text in world.notes.texts[4:])
    assert world.notes.missing == [("a", "b", "c"), ("a", "b"), ("b",), ()]


@in_loop
async def test_a_silo_that_leaves_in_mid_round_is_waited_for_by_name(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=1) as world:
        world.network.cut("b", "upload", round=1)
        await world.federate()
    came_and_went = [text for text in world.notes.texts if text.startswith("b ")]
    assert came_and_went[1:] == ["b left, waiting for b (2 of 3 are here)", "b joined (3 of 3 are here)"]


@in_loop
async def test_of_a_silo_that_has_answered_nothing_more_is_shown(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=2, quorum=1, script=failing("b", 2)) as world:
        late = world.network.hold("c", "upload", round=2)
        run = asyncio.create_task(world.federate())
        await late.reached.wait()
        await world.until(lambda: len(world.notes.done) == 5)
        assert sorted(world.notes.done[:3]) == ["a", "b", "c"]
        assert sorted(world.notes.done[3:]) == ["a", "b"]  # one delivered, one failed
        advance(DEADLINE)
        await world.until(lambda: world.notes.done[5:6] == ["c"])  # recalled
        late.release()
        await run


@in_loop
async def test_too_few_silos_at_the_join_deadline_end_the_run_and_are_named(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        world.join("a", "c")
        run = asyncio.create_task(world.federate_with())
        await world.until(lambda: any("waiting for b" in text for text in world.notes.texts))
        advance(JOIN_DEADLINE)
        with pytest.raises(FederationError, match="missing: b"):
            await run


async def _revoke(world: World, federator: Federator, silo: str) -> None:
    """A silo's certificates are revoked, and it ends."""
    exchange = federator.exchange
    assert isinstance(exchange, MemoryCoordinatorExchange)
    exchange.bar(silo, "its certificate was revoked")
    await world.kill(silo)


@in_loop
async def test_a_silo_that_is_revoked_between_rounds_is_waited_for_where_all_are_needed(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=2, silos={"a": 1, "b": 3}) as world:
        with contextlib.suppress(FederationError):
            async with world.coordinator() as federator:
                ask_to_pause(world.file.run_folder)
                await world.until(lambda: any("a pause was asked for" in text for text in world.notes.texts))
                world.join("a", "b")
                run = asyncio.create_task(run_arms(federator))
                await world.until(lambda: any("b joined" in text for text in world.notes.texts))
                await _revoke(world, federator, "b")
                ask_to_resume(world.file.run_folder)
                await world.until(lambda: world.notes.missing[-1:] == [("b",)])
                assert any("no quorum without b, which gptfl invite lets in" in text for text in world.notes.texts)
                advance(JOIN_DEADLINE)
                await run
        ended = run.exception()
        assert isinstance(ended, FederationError)
        assert "round 1: 1 silos are connected and 2 are needed; missing: b (revoked)" in ended.message
        assert "invite b anew" in ended.hint
        assert world.record().rounds == ()
        await world.federate()
    assert world.value() == START + 2 * mean_step("ab")


@in_loop
async def test_a_silo_that_is_revoked_in_mid_round_is_waited_for_and_a_restart_waits_on(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=2) as world:
        late = {round_: world.network.hold("c", "upload", round=round_) for round_ in (1, 2)}
        world.join("a", "b", "c")
        with contextlib.suppress(asyncio.CancelledError):
            async with world.coordinator() as federator:
                run = asyncio.create_task(run_arms(federator))
                for round_ in (1, 2):
                    await late[round_].reached.wait()
                    await world.until(lambda round_=round_: world.committed(round_) == {"a", "b"})
                    await _revoke(world, federator, "c")
                    await world.until(lambda: world.notes.missing[-1:] == [("c",)])
                    advance(DEADLINE)  # which is no longer that of the round
                    if round_ == 1:
                        world.join("c")
                run.cancel()
                await run
        await world.federate()
    assert world.value() == START + 2 * mean_step("abc")
    assert world.trained("a") == [(ARM, 1), (ARM, 2)]  # its committed updates were not asked for again
    assert [answered(world.record(), r) for r in (1, 2)] == [{"a", "b", "c"}] * 2


@in_loop
async def test_a_round_that_was_begun_below_its_quorum_is_filled_up_at_the_next_start(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=2, silos={"a": 1, "b": 3}) as world:
        world.join("a", "b")
        late = world.network.hold("b", "order", round=2)
        with contextlib.suppress(asyncio.CancelledError):
            async with world.coordinator() as federator:
                run = asyncio.create_task(run_arms(federator))
                await late.reached.wait()
                await world.until(lambda: world.committed(2) == {"a"})
                run.cancel()
                await run
        await world.kill("b")
        with sqlite3.connect(world.file.run_folder / FILE_NAME) as ledger:  # as if b had been revoked by then
            ledger.execute("UPDATE rounds SET cohort = '[\"a\"]' WHERE round = 2")
            ledger.execute("DELETE FROM orders WHERE round = 2 AND silo = 'b'")
        record = await world.federate()
    assert world.value() == START + 2 * mean_step("ab")
    assert [r.cohort for r in record.rounds] == [("a", "b")] * 3
    assert world.trained("a") == [(ARM, 1), (ARM, 2)]

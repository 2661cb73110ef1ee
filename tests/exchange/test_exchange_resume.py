"""Weights and updates over connections that break: either goes on at the byte where it was cut."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
from exchange_world import LARGE, SMALL, World, flat_of, header_of, in_loop, random_weights, train_order, whole

from gptfl_dist.exchange.base import (
    Answered,
    Disconnected,
    Receipt,
    SiloLeft,
)
from gptfl_dist.exchange.inbox import Spool
from gptfl_dist.testing.proxy import TcpProxy
from gptfl_dist.weights import Layout

LONG = Layout.of([("w", (6 << 20,), "F32")])  # 24 MiB
UNDER_WAY = 14 << 20  # what gRPC may have in its buffers when a connection breaks, and sends again


@pytest.mark.parametrize("cut_at", [50_000, 3 << 20, 20 << 20, LONG.nbytes + 3_000])
@in_loop
async def test_a_download_goes_on_where_the_connection_was_cut(tmp_path, cut_at):
    base, digest, flat = random_weights(tmp_path / "base", LONG, 1)
    async with World(tmp_path, LONG) as world, TcpProxy(world.server.port) as proxy:
        await world.server.publish({digest: base})
        silo = await world.joined(port=proxy.port)
        proxy.cut_down = proxy.down + cut_at
        with contextlib.suppress(Disconnected):  # the last of the cuts may come after the last byte
            await silo.download(digest, LONG, tmp_path / "got")
        assert (tmp_path / "got").exists() <= (cut_at > LONG.nbytes)
        await silo.connect()
        await silo.download(digest, LONG, tmp_path / "got")
        assert proxy.cuts == 1
        assert flat_of(tmp_path / "got") == flat
        if cut_at < LONG.nbytes:
            assert proxy.down < LONG.nbytes + UNDER_WAY


@in_loop
async def test_what_lies_of_other_weights_is_not_taken_for_the_beginning(tmp_path):
    first, first_digest, _ = random_weights(tmp_path / "first", LARGE, 1)
    second, second_digest, flat = random_weights(tmp_path / "second", LARGE, 2)
    async with World(tmp_path, LARGE) as world, TcpProxy(world.server.port) as proxy:
        await world.server.publish({first_digest: first})
        silo = await world.joined(port=proxy.port)
        proxy.cut_down = proxy.down + (3 << 20)
        with pytest.raises(Disconnected):
            await silo.download(first_digest, LARGE, tmp_path / "got")
        await silo.connect()
        await world.server.publish({second_digest: second})
        with pytest.raises(Disconnected, match="not handed out"):
            await silo.download(first_digest, LARGE, tmp_path / "got")
        await silo.download(second_digest, LARGE, tmp_path / "got")
        assert flat_of(tmp_path / "got") == flat


@in_loop
async def test_weights_of_several_rounds_are_handed_out_side_by_side(tmp_path):
    first, first_digest, first_flat = random_weights(tmp_path / "first", LARGE, 1)
    second, second_digest, second_flat = random_weights(tmp_path / "second", LARGE, 2)
    async with World(tmp_path, LARGE) as world:
        await world.server.publish({first_digest: first})
        alice, bob = await world.joined("alice"), await world.joined("bob")
        loading = asyncio.create_task(alice.download(first_digest, LARGE, tmp_path / "alice"))
        await asyncio.sleep(0)
        await world.server.publish({first_digest: first, second_digest: second})
        await bob.download(second_digest, LARGE, tmp_path / "bob")
        await loading
        assert flat_of(tmp_path / "alice") == first_flat
        assert flat_of(tmp_path / "bob") == second_flat


@pytest.mark.parametrize("cut_at", [1_000, 50_000, 3 << 20, 20 << 20])
@in_loop
async def test_an_upload_goes_on_where_the_connection_was_cut(tmp_path, cut_at):
    update, digest, flat = random_weights(tmp_path / "update", LONG, 1)
    order = train_order("n1", "00" * 32)
    async with World(tmp_path, LONG) as world, TcpProxy(world.server.port) as proxy:
        silo = await world.joined(port=proxy.port)
        await world.give("alice", order)
        proxy.cut_up = proxy.up + cut_at
        with pytest.raises(Disconnected):
            await silo.upload(header_of(order, LONG, digest), update)
        await silo.connect()
        assert await silo.upload(header_of(order, LONG, digest), update) == Receipt(True)
        assert proxy.cuts == 1
        assert world.server.traffic.up == LONG.nbytes
        assert proxy.up < LONG.nbytes + UNDER_WAY
        assert whole(world.inbox.updates(("alice",))["alice"]) == flat
        events = await world.settled()
        assert [e for e in events if not isinstance(e, SiloLeft)] == [Answered("alice", "n1")]


@in_loop
async def test_an_update_committed_after_its_silo_hung_up_still_counts(tmp_path, monkeypatch):
    reached, opened = threading.Event(), threading.Event()

    def held(spool):
        reached.set()
        opened.wait(20)
        return 0.0

    monkeypatch.setattr(Spool, "norm", held)
    update, digest, _ = random_weights(tmp_path / "update", SMALL, 1)
    order = train_order("n1", "00" * 32)
    header = header_of(order, SMALL, digest)
    async with World(tmp_path) as world:
        silo = await world.joined()
        await world.give("alice", order)
        upload = asyncio.create_task(silo.upload(header, update))
        await asyncio.to_thread(reached.wait, 20)
        await silo.close()
        with pytest.raises(Disconnected):  # and not a CancelledError, which would end the silo
            await upload
        await silo.connect()
        with pytest.raises(Disconnected, match="being checked"):
            await silo.upload(header, update)
        opened.set()
        events = await world.settled(0.5)
        assert [e for e in events if isinstance(e, Answered)] == [Answered("alice", "n1")]
        assert len(world.commits) == 1
        assert await silo.upload(header, update) == Receipt(True)
        assert await world.settled() == []


@pytest.mark.parametrize("next_round", [True, False], ids=["next round", "end of the arm"])
@in_loop
async def test_weights_that_give_way_end_the_download(tmp_path, caplog, next_round):
    first, first_digest, _ = random_weights(tmp_path / "first", LARGE, 1)
    second, second_digest, _ = random_weights(tmp_path / "second", LARGE, 2)
    async with World(tmp_path, LARGE, chunk=4096) as world:
        await world.server.publish({first_digest: first})
        silo = await world.joined()
        download = asyncio.create_task(silo.download(first_digest, LARGE, tmp_path / "got"))
        while world.server.traffic.down == 0:
            await asyncio.sleep(0)
        if next_round:
            await world.server.publish({second_digest: second})
        first.close()
        with pytest.raises(Disconnected, match="not handed out any more"):
            await download
        # asyncio tells of a line of an earlier test whose loop is closed.
        assert [record for record in caplog.records if record.exc_info and record.name != "asyncio"] == []
        assert not (tmp_path / "got").exists()

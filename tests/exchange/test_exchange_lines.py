"""Lines in trouble: cut again and again, silent for long, or forgotten by a box in between."""

from __future__ import annotations

import asyncio
import random

import pytest
from exchange_world import World, header_of, in_loop, random_weights, train_order

from gptfl_dist.exchange.base import Answered, Disconnected, Receipt, SiloJoined, SiloLeft
from gptfl_dist.testing.proxy import TcpProxy
from gptfl_dist.weights import Layout

BIG = Layout.of([("w", (100_000_000,), "F32")])  # 400 MB


@in_loop
async def test_an_upload_of_400_mb_cut_ten_times_sends_at_most_a_tenth_twice(tmp_path):
    update, digest, _ = random_weights(tmp_path / "update", BIG, 1)
    order = train_order("n1", "00" * 32)
    header = header_of(order, BIG, digest)
    gaps = random.Random(4)
    async with World(tmp_path, BIG) as world, TcpProxy(world.server.port) as proxy:
        silo = await world.joined(port=proxy.port)
        await world.give("alice", order)
        for _ in range(10):
            proxy.cut_up = proxy.up + gaps.randrange(1000, BIG.nbytes // 12)
            with pytest.raises(Disconnected):
                await silo.upload(header, update)
            await silo.connect()
        assert await silo.upload(header, update) == Receipt(True)
        assert proxy.cuts == 10
        assert proxy.up < 1.1 * BIG.nbytes
        assert world.inbox.updates(("alice",))["alice"].digest() == digest
        events = await world.settled()
        assert [e for e in events if not isinstance(e, SiloLeft)] == [Answered("alice", "n1")]


@in_loop
async def test_a_silent_stream_stays_open_through_many_pings_and_an_order_comes_at_once(tmp_path):
    """An hour at the usual 30 s is 120 pings in each direction; too many of them once made servers hang up."""
    async with World(tmp_path, keepalive=0.05) as world, TcpProxy(world.server.port) as proxy:
        silo = await world.joined(port=proxy.port)
        quiet = proxy.up, proxy.down
        await asyncio.sleep(6)
        pinged = proxy.up - quiet[0], proxy.down - quiet[1]
        assert min(pinged) > 17 * 5  # a ping is a frame of 17 bytes, and more in its TLS record
        assert await world.settled(0) == []
        word = asyncio.create_task(silo.receive())
        await world.give("alice", train_order("n1", "00" * 32))
        assert (await asyncio.wait_for(word, 1)).nonce == "n1"


@in_loop
async def test_a_line_that_a_box_in_between_forgot_is_found_dead_and_made_anew(tmp_path):
    """A NAT that drops its table closes nothing: both ends go on waiting for packets that nobody carries."""
    async with World(tmp_path, keepalive=0.5) as world, TcpProxy(world.server.port) as proxy:
        silo = await world.joined(port=proxy.port)
        proxy.freeze()
        with pytest.raises(Disconnected):
            await asyncio.wait_for(silo.receive(), 60)
        await silo.connect()
        await silo.ready()
        while (event := await world.event()) != SiloJoined("alice"):
            assert event == SiloLeft("alice")  # which is not told where the silo was back sooner
        await world.give("alice", train_order("n1", "00" * 32))
        assert (await silo.receive()).nonce == "n1"

"""Who is connected: one process a silo, who came is told, and who is gone has left."""

from __future__ import annotations

import asyncio

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from exchange_world import (
    SILOS,
    SMALL,
    World,
    header_of,
    in_loop,
    random_weights,
    train_order,
)

from gptfl_dist.exchange.base import (
    Disconnected,
    Recalled,
    SiloJoined,
    SiloLeft,
)
from gptfl_dist.federation.orders import Report
from gptfl_dist.testing.proxy import TcpProxy


@in_loop
async def test_a_second_process_with_the_same_certificate_is_refused_with_the_reason(tmp_path):
    async with World(tmp_path) as world:
        silo = await world.joined()
        second = world.silo()
        with pytest.raises(Disconnected, match=r"alice is connected already, from ipv4:127.* does a second process"):
            await second.connect()
        await world.server.recall("alice", "n", "still there")
        assert await silo.receive() == Recalled("n", "still there")
        await silo.close()
        assert await world.event() == SiloLeft("alice")
        await second.connect()  # the first is gone


@in_loop
async def test_who_connects_is_told_with_the_certificate_and_the_address(tmp_path):
    async with World(tmp_path) as world:
        await world.joined("alice")
        await world.joined("bob")
        for name, told in zip(("alice", "bob"), world.connected, strict=True):
            certificate = x509.load_pem_x509_certificate(SILOS[name].certificate)
            assert (told.silo, told.origin.identity) == (name, f"gptfl://fed/silo/{name}")
            assert int(told.origin.serial, 16) == certificate.serial_number
            assert told.origin.fingerprint == certificate.fingerprint(hashes.SHA256()).hex()
            assert told.origin.address.startswith("ipv4:127.0.0.1:")


@in_loop
async def test_the_same_process_may_come_back_before_its_dead_connection_is_noticed(tmp_path):
    async with World(tmp_path) as world, TcpProxy(world.server.port) as proxy:
        silo = await world.joined(port=proxy.port)
        proxy.freeze()
        await silo.connect()
        await silo.ready()
        assert await world.event() == SiloJoined("alice")
        await world.server.recall("alice", "n", "on the new stream")
        assert await silo.receive() == Recalled("n", "on the new stream")
        assert await world.settled() == []  # nobody left


@in_loop
async def test_a_silo_that_is_gone_has_left(tmp_path):
    async with World(tmp_path) as world, TcpProxy(world.server.port) as proxy:
        silo = await world.joined(port=proxy.port)
        receiving = asyncio.create_task(silo.receive())
        await asyncio.sleep(0.05)
        proxy.cut()
        with pytest.raises(Disconnected):
            await receiving
        assert await world.event() == SiloLeft("alice")


@in_loop
async def test_nothing_but_disconnected_comes_of_a_wire_that_is_closed(tmp_path):
    update, digest, _ = random_weights(tmp_path / "update", SMALL, 1)
    header = header_of(train_order("n1", digest), SMALL, digest)
    async with World(tmp_path) as world:
        silo = world.silo()

        async def all_raise_disconnected():
            for call in (
                silo.ready(),
                silo.receive(),
                silo.progress("n1", 1, 2),
                silo.fail("n1", "x"),
                silo.report(Report("n1", 1)),
                silo.upload(header, update),
                silo.download(digest, SMALL, tmp_path / "got"),
            ):
                with pytest.raises(Disconnected):
                    await call

        await all_raise_disconnected()  # never connected
        await silo.connect()
        waiting = asyncio.create_task(silo.receive())
        await asyncio.sleep(0.05)
        await silo.close()
        with pytest.raises(Disconnected):
            await waiting
        await all_raise_disconnected()
        await silo.connect()
        waiting = asyncio.create_task(silo.receive())
        await asyncio.sleep(0.05)
        waiting.cancel()  # our own cancellation stays one
        with pytest.raises(asyncio.CancelledError):
            await waiting

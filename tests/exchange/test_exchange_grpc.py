"""Orders and weights over gRPC, from welcome to goodbye: what arrives is what was sent."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest
from exchange_world import (
    COORDINATOR,
    HOST,
    LARGE,
    PLAN,
    SILOS,
    SMALL,
    World,
    flat_of,
    header_of,
    in_loop,
    port_of,
    random_weights,
    train_order,
    whole,
)

from gptfl_dist.errors import LaunchError
from gptfl_dist.exchange.base import (
    Answered,
    Disconnected,
    Goodbye,
    OrderFailed,
    Recalled,
    Receipt,
    SiloJoined,
    SiloLeft,
    SiloProgress,
    Welcome,
)
from gptfl_dist.exchange.grpc.server import GrpcCoordinatorExchange
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.security.handshake import is_loopback
from gptfl_dist.security.trust import FixedTrust
from gptfl_dist.weights import WeightsFile, write_weights


@in_loop
async def test_this_machine_is_not_dialled_through_a_proxy(tmp_path, monkeypatch):
    for name in ("https_proxy", "http_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://{HOST}:9")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with World(tmp_path) as world:
        await world.joined()


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("localhost:1", True),
        ("127.8.9.1:1", True),
        ("[::1]:1", True),
        ("silo.example.org:1", False),
        ("10.0.0.1:1", False),
    ],
)
def test_a_proxy_is_left_out_for_this_machine_alone(address, here):
    assert is_loopback(address) == here


@in_loop
async def test_a_round_from_welcome_to_goodbye(tmp_path):
    base, digest, flat = random_weights(tmp_path / "base", SMALL, 1)
    update, update_digest, update_flat = random_weights(tmp_path / "update", SMALL, 2)
    async with World(tmp_path) as world:
        silo = world.silo()
        assert await silo.connect() == Welcome("run-1", PLAN, SMALL)
        assert await world.settled() == []  # connected is not ready
        await silo.ready()
        assert await world.event() == SiloJoined("alice")
        await world.server.publish({digest: base})

        order = dataclasses.replace(train_order("n1", digest), follows="n0")
        await world.give("alice", order)
        assert await silo.receive() == order
        await silo.download(digest, SMALL, tmp_path / "got")
        assert flat_of(tmp_path / "got") == flat
        await silo.progress("n1", 3, 10)
        assert await world.event() == SiloProgress("alice", "n1", 3, 10)
        await silo.progress("n1", 0, 0, "Slurm job 12 is queued\x1b[2J")
        assert await world.event() == SiloProgress("alice", "n1", 0, 0, "Slurm job 12 is queued [2J")
        header = header_of(order, SMALL, update_digest, loss=0.25)
        assert await silo.upload(header, update) == Receipt(True)
        assert await world.event() == Answered("alice", "n1")
        assert world.commits == [("alice", order, header.report, update_digest)]
        assert whole(world.inbox.updates(("alice",))["alice"]) == update_flat
        assert (world.server.traffic.down, world.server.traffic.up) == (SMALL.nbytes, SMALL.nbytes)
        assert await silo.upload(header, update) == Receipt(True)  # a second copy
        assert world.server.traffic.up == SMALL.nbytes

        evaluation = Order("evaluate", "n2", "gptfl", 2, digest, 60.0)
        await world.give("alice", evaluation)
        assert await silo.receive() == evaluation
        await silo.report(Report("n2", 0, {"accuracy": 0.5}))
        assert await world.event() == Answered("alice", "n2")
        assert world.commits[1:] == [("alice", evaluation, Report("n2", 0, {"accuracy": 0.5}), "")]

        await world.server.recall("alice", "n2", "too late")
        assert await silo.receive() == Recalled("n2", "too late")
        await world.server.send("bob", order)  # not connected: nothing happens
        goodbye = asyncio.create_task(world.server.close(Goodbye(True, "done")))
        assert await silo.receive() == Goodbye(True, "done")
        await goodbye
        with pytest.raises(Disconnected):
            await silo.receive()
        with pytest.raises(Disconnected):
            await silo.connect()
        assert await world.settled(0) == [SiloLeft("alice")]


@in_loop
async def test_the_end_is_heard_by_a_silo_that_is_not_ready_yet(tmp_path):
    async with World(tmp_path) as world:
        silo = world.silo()
        await silo.connect()
        goodbye = asyncio.create_task(world.server.close(Goodbye(True, "done")))
        await asyncio.sleep(0.5)
        await silo.ready()
        assert await silo.receive() == Goodbye(True, "done")
        await goodbye


@in_loop
async def test_two_silos_answer_apart(tmp_path):
    update, update_digest, _ = random_weights(tmp_path / "update", SMALL, 2)
    async with World(tmp_path) as world:
        silos = {name: await world.joined(name) for name in SILOS}
        for name, silo in silos.items():
            await world.give(name, train_order(f"n-{name}", "00" * 32))
            assert (await silo.receive()).nonce == f"n-{name}"
        # One silo's order is no other's.
        stolen = header_of(train_order("n-bob", "00" * 32), SMALL, update_digest)
        receipt = await silos["alice"].upload(stolen, update)
        assert not receipt.committed
        assert "answers no order" in receipt.reason
        for name, silo in silos.items():
            header = header_of(train_order(f"n-{name}", "00" * 32), SMALL, update_digest)
            assert await silo.upload(header, update) == Receipt(True)
        assert await world.settled() == [Answered(name, f"n-{name}") for name in SILOS]


@pytest.mark.parametrize("chunk", [4096, 1 << 24])
@in_loop
async def test_any_chunk_size_of_the_federation_file_carries_both_ways(tmp_path, chunk):
    base, digest, flat = random_weights(tmp_path / "base", LARGE, 1)
    order = train_order("n1", digest)
    async with World(tmp_path, LARGE, chunk=chunk) as world:
        await world.server.publish({digest: base})
        silo = await world.joined()
        await world.give("alice", order)
        await silo.download(digest, LARGE, tmp_path / "got")
        assert flat_of(tmp_path / "got") == flat
        assert await silo.upload(header_of(order, LARGE, digest), base) == Receipt(True)


@in_loop
async def test_the_owner_of_a_refused_update_reads_why_and_the_order_is_over(tmp_path):
    bad = np.zeros(SMALL.nbytes, np.uint8)
    bad[:4] = np.array([np.nan], "<f4").view(np.uint8)
    digest = write_weights(tmp_path / "bad", SMALL, [bad.tobytes()])
    order = train_order("n1", "00" * 32)
    async with World(tmp_path) as world:
        silo = await world.joined()
        await world.give("alice", order)
        with WeightsFile(tmp_path / "bad") as update:
            header = header_of(order, SMALL, digest)
            assert await silo.upload(header, update) == Receipt(False, "the update holds NaN or infinite values")
            assert await world.event() == OrderFailed("alice", "n1", "refused: the update holds NaN or infinite values")
            again = await silo.upload(header, update)
            assert "answers no order that is open" in again.reason
        assert await world.settled() == []
        assert world.commits == []


@in_loop
async def test_a_silo_that_cannot_carry_out_an_order_says_so_once(tmp_path):
    order = train_order("n1", "00" * 32)
    update, digest, _ = random_weights(tmp_path / "update", SMALL, 1)
    async with World(tmp_path) as world:
        silo = await world.joined()
        await world.give("alice", order)
        await silo.fail("other", "not mine")
        await silo.fail("n1", "out of \x1b[31mmemory\n[/red]")
        await silo.fail("n1", "again")
        assert await world.event() == OrderFailed("alice", "n1", "out of  [31mmemory\n[/red]")
        assert not (await silo.upload(header_of(order, SMALL, digest), update)).committed
        assert await world.settled() == []


@in_loop
async def test_a_port_in_use_is_a_launch_error(tmp_path):
    async with World(tmp_path) as world:
        port = port_of(FixedTrust(COORDINATOR), listen=f"{HOST}:{world.server.port}")
        second = GrpcCoordinatorExchange(port=port, inbox=world.inbox, chunk=1 << 20)
        with pytest.raises(LaunchError, match=f"cannot listen on {HOST}:{world.server.port}"):
            await second.open(Welcome("run-2", PLAN, SMALL))
        await second.close(Goodbye(False, "never opened"))
        await world.joined()  # the first serves on

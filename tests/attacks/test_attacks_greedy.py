"""A silo that takes more than its share, beside one that does not: the greedy one alone is slowed or refused."""

from __future__ import annotations

import asyncio
import contextlib
import time

import grpc
import grpc.aio
import pytest
from exchange_world import HOST, SILOS, World, header_of, in_loop, train_order

from gptfl_dist.config.wire import Limits
from gptfl_dist.exchange.base import PROTOCOL_VERSION, Answered, Disconnected, Receipt
from gptfl_dist.exchange.grpc import exchange_pb2 as pb
from gptfl_dist.exchange.grpc.health import EXCHANGE
from gptfl_dist.exchange.grpc.server import NONCE
from gptfl_dist.weights import Layout, WeightsFile, write_weights

LAYOUT = Layout.of([("w", (64 << 10,), "F32")])  # 256 KiB


def line_of(world, name="alice"):
    """A connection of its own; gRPC would share one otherwise."""
    own = SILOS[name]
    secrets = grpc.ssl_channel_credentials(own.authority, own.key, own.certificate)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    return grpc.aio.secure_channel(f"{HOST}:{world.server.port}", secrets, options=options)


@contextlib.asynccontextmanager
async def asked_to_train(folder, limits):
    """Alice and Bob, each with an order and the update that answers it; gives the world, Bob, and what he sends."""
    digest = write_weights(folder / "u", LAYOUT, [bytes(LAYOUT.nbytes)])
    async with World(folder, LAYOUT, limits=limits) as world:
        bob = await world.joined("bob")
        orders = {name: train_order(f"n-{name}", "b" * 64) for name in SILOS}
        for name, order in orders.items():
            await world.give(name, order)
        yield world, bob, {name: header_of(order, LAYOUT, digest) for name, order in orders.items()}


async def delivered(world, bob, header, folder):
    """Bob's round, as if nobody else were there."""
    with WeightsFile(folder / "u") as update:
        assert await asyncio.wait_for(bob.upload(header, update), 20) == Receipt(True)
    assert Answered("bob", "n-bob") in await world.settled()


async def refused(call) -> str:
    """Why a call is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await asyncio.wait_for(call, 10)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    return str(error.value.details())


@in_loop
async def test_connections_beyond_the_limit_are_refused_with_a_reason(tmp_path):
    async with (
        asked_to_train(tmp_path, Limits(connections=3)) as (world, bob, headers),
        contextlib.AsyncExitStack() as stack,
    ):
        lines = [await stack.enter_async_context(line_of(world)) for _ in range(8)]
        held = [line.stream_stream(f"/{EXCHANGE}/Work")() for line in lines[:3]]  # which say nothing
        await asyncio.sleep(0.5)
        assert not any(call.done() for call in held)
        for line in lines[3:]:
            reason = await refused(line.stream_stream(f"/{EXCHANGE}/Work")().read())
            assert reason == "alice is refused: it has 3 connections already, and exchange.limits.connections is 3"
        silo = world.silo("alice")
        with pytest.raises(Disconnected, match=r"exchange\.limits\.connections is 3"):  # as its operator reads it
            await silo.connect()
        await delivered(world, bob, headers["bob"], tmp_path)
        for call in held:
            call.cancel()
        await asyncio.sleep(0.3)
        await silo.connect()  # there is room again


@in_loop
async def test_uploads_that_are_never_finished_are_refused_beyond_the_limit(tmp_path):
    async with asked_to_train(tmp_path, Limits(transfers=2)) as (world, bob, headers), line_of(world) as line:

        async def never():
            await asyncio.sleep(3600)
            yield b""

        upload = line.stream_unary(f"/{EXCHANGE}/Upload", response_deserializer=pb.Receipt.FromString)
        world.inbox.announce("alice", headers["alice"])
        held = [upload(never(), metadata=((NONCE, "n-alice"),)) for _ in range(2)]
        await asyncio.sleep(0.5)
        for _ in range(3):
            reason = await refused(upload(never(), metadata=((NONCE, "n-alice"),)))
            assert "2 of its uploads and downloads are not finished, and exchange.limits.transfers is 2" in reason
        await delivered(world, bob, headers["bob"], tmp_path)
        for call in held:
            call.cancel()


@in_loop
async def test_more_bytes_a_second_than_allowed_are_slowed_down_and_others_are_not(tmp_path):
    async with asked_to_train(tmp_path, Limits(rate="64KiB/s")) as (world, bob, headers):
        alice = await world.joined("alice")
        started = time.monotonic()
        with WeightsFile(tmp_path / "u") as update:
            sending = asyncio.create_task(alice.upload(headers["alice"], update))
            await asyncio.sleep(0.2)
            assert (await asyncio.wait_for(bob.receive(), 1)).nonce == "n-bob"
            await world.give("bob", train_order("n-next", "b" * 64))
            assert (await asyncio.wait_for(bob.receive(), 1)).nonce == "n-next"
            assert not sending.done()
            assert await sending == Receipt(True)
        assert time.monotonic() - started > 2.5  # four seconds' worth, of which one is free


@in_loop
async def test_calls_and_messages_without_end_are_slowed_down_and_others_are_not(tmp_path):
    async with asked_to_train(tmp_path, Limits(calls=50)) as (world, bob, headers), line_of(world) as line:
        answered = []

        async def flood():
            opened = line.unary_unary(f"/{EXCHANGE}/OpenUpload")
            while True:
                await opened(pb.UpdateHeader(report=pb.Report(nonce="other")).SerializeToString())
                answered.append(time.monotonic())

        work = line.stream_stream(f"/{EXCHANGE}/Work")()
        hello = pb.Hello(oldest_version=PROTOCOL_VERSION, newest_version=PROTOCOL_VERSION, instance="x")
        await work.write(pb.FromSilo(hello=hello).SerializeToString())
        assert await work.read()

        async def talk():
            while True:
                await work.write(
                    pb.FromSilo(progress=pb.Progress(nonce="n-alice", done=1, total=2)).SerializeToString()
                )

        started = time.monotonic()
        greedy = [asyncio.create_task(flood()) for _ in range(12)] + [asyncio.create_task(talk())]
        await asyncio.sleep(2)
        await delivered(world, bob, headers["bob"], tmp_path)
        for task in greedy:
            task.cancel()
        seconds = time.monotonic() - started
        assert len(answered) <= 50 * (seconds + 1) + 12


@in_loop
async def test_what_a_greedy_silo_leaves_behind_is_no_memory(tmp_path):
    async with World(tmp_path, limits=Limits(connections=2)) as world:
        for _ in range(30):
            async with line_of(world) as line:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await line.unary_unary(f"/{EXCHANGE}/OpenUpload")(b"")
        limiter = world.port.callers.limiter
        assert limiter.accounts == 1
        (account,) = limiter._accounts.values()
        assert account.calls_on == {}
        assert account.transfers == 0

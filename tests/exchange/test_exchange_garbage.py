"""What no silo of ours would send: it is refused, fills no memory, and the coordinator serves on."""

from __future__ import annotations

import dataclasses

import grpc
import grpc.aio
import pytest
from exchange_world import (
    HOST,
    LARGE,
    SILOS,
    SMALL,
    World,
    header_of,
    in_loop,
    random_weights,
    train_order,
)

from gptfl_dist.config.wire import Limits
from gptfl_dist.errors import ProtocolError
from gptfl_dist.exchange.base import (
    PROTOCOL_VERSION,
    OrderFailed,
    SiloJoined,
)
from gptfl_dist.exchange.grpc import convert
from gptfl_dist.exchange.grpc import exchange_pb2 as pb
from gptfl_dist.exchange.grpc.frames import encode_chunk
from gptfl_dist.exchange.grpc.health import EXCHANGE
from gptfl_dist.exchange.grpc.server import NONCE
from gptfl_dist.federation.orders import Report
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.signing import sign


def raw_channel(port: int, name: str = "alice") -> grpc.aio.Channel:
    """What a silo that keeps to no rules has in its hands."""
    own = SILOS[name]
    secrets = grpc.ssl_channel_credentials(own.authority, own.key, own.certificate)
    return grpc.aio.secure_channel(f"{HOST}:{port}", secrets, options=[("grpc.max_send_message_length", 1 << 26)])


async def raw_work(channel: grpc.aio.Channel, instance: str = "x") -> grpc.aio.StreamStreamCall:
    """A Work stream that was welcomed."""
    call = channel.stream_stream(f"/{EXCHANGE}/Work")()
    hello = pb.Hello(oldest_version=PROTOCOL_VERSION, newest_version=PROTOCOL_VERSION, instance=instance)
    await call.write(pb.FromSilo(hello=hello).SerializeToString())
    assert pb.ToSilo.FromString(await call.read()).WhichOneof("message") == "welcome"
    return call


@in_loop
async def test_garbage_is_refused_and_the_coordinator_serves_on(tmp_path):
    junk = b"\xff\xff\xff"
    async with World(tmp_path) as world:
        await world.give("alice", train_order("n1", "00" * 32))
        async with raw_channel(world.server.port) as channel:

            async def chunks(*frames):
                for frame in frames:
                    yield frame

            for call in (
                channel.unary_unary(f"/{EXCHANGE}/OpenUpload")(junk),
                channel.unary_stream(f"/{EXCHANGE}/Download")(junk).read(),
                channel.stream_stream(f"/{EXCHANGE}/Work")(chunks(junk)).read(),
                channel.stream_stream(f"/{EXCHANGE}/Work")(chunks()).read(),
                channel.stream_stream(f"/{EXCHANGE}/Work")(chunks(pb.FromSilo().SerializeToString())).read(),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call
                assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary(f"/{EXCHANGE}/NoSuchMethod")(b"")
            assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
            upload = channel.stream_unary(f"/{EXCHANGE}/Upload", response_deserializer=pb.Receipt.FromString)
            for metadata in ((), ((NONCE, "n2"),), ((NONCE, "n" * 5000),)):
                receipt = await upload(chunks(junk), metadata=metadata)
                assert receipt.reason == "no such update was announced"
            work = await raw_work(channel)
            await work.write(junk)
            assert await work.read() is grpc.aio.EOF
        silo = world.silo()
        await silo.connect()
        await silo.ready()
        events = await world.settled()
        assert SiloJoined("alice") in events
        assert not [e for e in events if isinstance(e, OrderFailed)]


@in_loop
async def test_a_broken_or_endless_upload_message_is_refused(tmp_path):
    update, digest, _ = random_weights(tmp_path / "update", LARGE, 1)
    order = train_order("n1", "00" * 32)
    async with World(tmp_path, LARGE) as world:
        silo = await world.joined()
        await world.give("alice", order)
        header = header_of(order, LARGE, digest)
        signature = sign(header.statement(Identity("fed", "silo", "alice"), "run-1"), SILOS["alice"].key)
        announcement = convert.header_to_message(header, signature)
        async with raw_channel(world.server.port) as channel:

            async def send(*frames):
                async def chunks():
                    for frame in frames:
                        yield frame

                await channel.unary_unary(f"/{EXCHANGE}/OpenUpload")(announcement.SerializeToString())
                method = channel.stream_unary(f"/{EXCHANGE}/Upload", response_deserializer=pb.Receipt.FromString)
                return await method(chunks(), metadata=((NONCE, "n1"),))

            # A message above the limit, and an upload that ends early, end the call and not the order.
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await send(encode_chunk(0, bytes(2 << 20)))
            assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            with pytest.raises(grpc.aio.AioRpcError, match="ended after 5 of"):
                await send(encode_chunk(0, b"hello"))
            assert await world.settled() == []
            assert world.inbox.awaits("alice", "n1")
            # Bytes in the wrong place, or beyond the end, are the silo's fault.
            receipt = await send(encode_chunk(77, b"x"))
            assert "bytes 77 to 78 sent, expected from" in receipt.reason
            assert isinstance(await world.event(), OrderFailed)
        assert not (await silo.upload(header_of(order, LARGE, digest), update)).committed


@in_loop
async def test_a_silo_that_talks_without_end_fills_no_queue(tmp_path):
    async with World(tmp_path, limits=Limits(calls=10_000)) as world:
        await world.give("alice", train_order("n1", "00" * 32))
        async with raw_channel(world.server.port) as channel:
            work = await raw_work(channel)
            for _ in range(300):
                for message in (
                    pb.FromSilo(ready=pb.Ready()),
                    pb.FromSilo(progress=pb.Progress(nonce="other" * 1000, done=1, total=2)),
                    pb.FromSilo(failure=pb.Failure(nonce="other", reason="x" * 10_000)),
                    pb.FromSilo(report=pb.Report(nonce="other", samples=1)),
                    pb.FromSilo(hello=pb.Hello()),
                    pb.FromSilo(),
                ):
                    await work.write(message.SerializeToString())
            await work.write(pb.FromSilo(failure=pb.Failure(nonce="n1", reason="x" * 10_000)).SerializeToString())
            opened = channel.unary_unary(f"/{EXCHANGE}/OpenUpload")
            for _ in range(20):
                await opened(pb.UpdateHeader(report=pb.Report(nonce="n1")).SerializeToString())
            while not (events := await world.settled()):
                pass
            assert events[0] == SiloJoined("alice")
            (failed,) = events[1:]
            assert isinstance(failed, OrderFailed)
            assert len(failed.reason) <= 4000


@in_loop
async def test_metrics_without_end_are_refused(tmp_path):
    async with World(tmp_path) as world:
        silo = await world.joined()
        await world.give("alice", dataclasses.replace(train_order("n1", "00" * 32), kind="evaluate"))
        await silo.report(Report("n1", 1, {f"m{i}": 1.0 for i in range(20_000)}))
        failed = await world.event()
        assert failed == OrderFailed("alice", "n1", "refused: sends 20000 metrics, expected at most 64")


@in_loop
async def test_a_download_of_other_content_than_announced_is_a_protocol_error(tmp_path):
    base, digest, _ = random_weights(tmp_path / "base", SMALL, 1)
    async with World(tmp_path) as world:
        silo = await world.joined()
        await world.server.publish({"ff" * 32: base})
        with pytest.raises(ProtocolError, match="do not have the digest"):
            await silo.download("ff" * 32, SMALL, tmp_path / "got")
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith("got")] == []
        await world.server.publish({digest: base})
        await silo.download(digest, SMALL, tmp_path / "got")

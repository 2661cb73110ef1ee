"""Orders and weights over gRPC: what arrives is what was sent, however often the connection breaks."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading

import grpc
import grpc.aio
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from exchange_world import (
    COORDINATOR,
    HOST,
    LARGE,
    PLAN,
    SILOS,
    SMALL,
    World,
    header_of,
    in_loop,
    port_of,
    random_weights,
    train_order,
    whole,
)

from gptfl_dist.config.federation import Limits
from gptfl_dist.errors import LaunchError, ProtocolError
from gptfl_dist.exchange.base import (
    PROTOCOL_VERSION,
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
from gptfl_dist.exchange.grpc import convert
from gptfl_dist.exchange.grpc import exchange_pb2 as pb
from gptfl_dist.exchange.grpc.frames import encode_chunk
from gptfl_dist.exchange.grpc.health import EXCHANGE
from gptfl_dist.exchange.grpc.server import NONCE, GrpcCoordinatorExchange
from gptfl_dist.exchange.inbox import Spool
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.security.handshake import is_loopback
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.signing import sign
from gptfl_dist.security.trust import FixedTrust
from gptfl_dist.testing.proxy import TcpProxy
from gptfl_dist.weights import Layout, WeightsFile, write_weights

LONG = Layout.of([("w", (6 << 20,), "F32")])  # 24 MiB
UNDER_WAY = 14 << 20  # what gRPC may have in its buffers when a connection breaks, and sends again


def flat_of(path) -> bytes:
    with WeightsFile(path) as file:
        return file.read(0, file.nbytes)


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


@in_loop
async def test_a_port_in_use_is_a_launch_error(tmp_path):
    async with World(tmp_path) as world:
        port = port_of(FixedTrust(COORDINATOR), listen=f"{HOST}:{world.server.port}")
        second = GrpcCoordinatorExchange(port=port, inbox=world.inbox, chunk=1 << 20)
        with pytest.raises(LaunchError, match=f"cannot listen on {HOST}:{world.server.port}"):
            await second.open(Welcome("run-2", PLAN, SMALL))
        await second.close(Goodbye(False, "never opened"))
        await world.joined()  # the first serves on


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

"""The federation's port under load from people who have no business there, and from a silo that goes too far."""

from __future__ import annotations

import asyncio
import socket
import ssl

import grpc
import grpc.aio
import pytest
from exchange_world import HOST, SILOS, World, in_loop, train_order

from gptfl_dist.exchange.base import PROTOCOL_VERSION
from gptfl_dist.exchange.grpc import exchange_pb2 as pb
from gptfl_dist.exchange.grpc.health import EXCHANGE


def channel_of(port, name="alice"):
    own = SILOS[name]
    return grpc.aio.secure_channel(
        f"{HOST}:{port}", grpc.ssl_channel_credentials(own.authority, own.key, own.certificate)
    )


@in_loop
async def test_a_thousand_connections_that_say_nothing_or_half_a_word_keep_no_silo_out(tmp_path):
    async with World(tmp_path) as world:
        lines = []
        for number in range(1000):
            line = socket.create_connection((HOST, world.server.port), timeout=20)
            if number % 2:
                line.send(b"\x16\x03\x01\x02\x00\x01\x00")  # the beginning of a TLS hello
            lines.append(line)
        try:
            silo = await world.joined()
            await world.give("alice", train_order("n1", "b" * 64))
            assert (await silo.receive()).nonce == "n1"
        finally:
            for line in lines:
                line.close()


@in_loop
async def test_headers_without_end_are_refused_and_the_port_goes_on(tmp_path):
    async with World(tmp_path) as world, channel_of(world.server.port) as channel:
        call = channel.unary_unary(f"/{EXCHANGE}/OpenUpload")
        for value in ("x" * (1 << 20), "x" * (16 << 20)):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call(b"", metadata=(("gptfl-nonce", value),))
            assert error.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
        await world.joined("bob")


@in_loop
async def test_a_control_message_above_the_limit_is_refused(tmp_path):
    async with World(tmp_path) as world, channel_of(world.server.port) as channel:
        work = channel.stream_stream(f"/{EXCHANGE}/Work")()
        hello = pb.Hello(
            oldest_version=PROTOCOL_VERSION, newest_version=PROTOCOL_VERSION, release="x" * (40 << 20), instance="i"
        )
        await work.write(pb.FromSilo(hello=hello).SerializeToString())
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await work.read()
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await world.settled() == []


@in_loop
async def test_what_speaks_http_1_or_another_protocol_over_tls_is_hung_up_on(tmp_path):
    async with World(tmp_path) as world:
        context = ssl.create_default_context(cadata=SILOS["alice"].authority.decode())
        (tmp_path / "pem").write_bytes(SILOS["alice"].certificate + SILOS["alice"].key)
        context.load_cert_chain(tmp_path / "pem")

        def ask() -> bytes:
            with (
                socket.create_connection((HOST, world.server.port), timeout=20) as line,
                context.wrap_socket(line, server_hostname=HOST) as secured,
            ):
                secured.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                return secured.recv(100)

        try:
            answer = await asyncio.to_thread(ask)
        except OSError:
            answer = b""
        assert b"HTTP/1" not in answer
        silo = await world.joined()
        assert silo is not None
        assert await world.settled() == []

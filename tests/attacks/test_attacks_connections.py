"""Who is let in, and what each side is told when it is not: a wrong identity ends a silo, a broken wire does not."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import socket
import ssl
import subprocess
import sys
from datetime import timedelta

import grpc
import grpc.aio
import pytest
from exchange_world import AUTHORITY, COORDINATOR, HOST, PLAN, SILOS, SMALL, World, dial, in_loop, train_order

from gptfl_dist.errors import ConnectionFailed, IdentityError, ProtocolError
from gptfl_dist.exchange.base import PROTOCOL_VERSION, Disconnected, Recalled, Welcome
from gptfl_dist.exchange.grpc import client as client_module
from gptfl_dist.exchange.grpc import convert
from gptfl_dist.exchange.grpc import exchange_pb2 as pb
from gptfl_dist.exchange.grpc.client import GrpcSiloExchange
from gptfl_dist.exchange.grpc.health import EXCHANGE
from gptfl_dist.security.authority import Authority, Credentials

OTHER = Authority.new("other", valid=timedelta(days=1))
FORGED = Authority.new("fed", valid=timedelta(days=1))


async def refusal(port: int, credentials: Credentials = SILOS["alice"], host: str = HOST) -> Exception:
    """What `connect` raises."""
    silo = dial(port, credentials, host)
    try:
        await silo.connect()
    except (ConnectionFailed, ProtocolError, Disconnected) as error:
        return error
    finally:
        await silo.close()
    pytest.fail("connected")


@pytest.mark.parametrize(
    "credentials",
    [
        OTHER.issue_silo("alice"),
        FORGED.issue_silo("alice"),
        Credentials(FORGED.roots, SILOS["alice"].certificate, SILOS["alice"].key),
    ],
    ids=["another federation", "same name, another authority", "wrong authority file"],
)
@in_loop
async def test_a_coordinator_that_our_authority_did_not_sign_ends_the_silo(tmp_path, credentials):
    async with World(tmp_path) as world:
        error = await refusal(world.server.port, credentials)
        assert type(error) is IdentityError
        assert error.message.startswith(f"the certificate of {HOST}:{world.server.port} is not one to trust: ")
        assert "coordinator.authority" in error.hint
        assert await world.settled() == []


@pytest.mark.parametrize(
    "intruder",
    [OTHER.issue_silo("alice"), FORGED.issue_silo("alice"), COORDINATOR],
    ids=["another federation", "same name, another authority", "the coordinator's certificate"],
)
@in_loop
async def test_a_certificate_that_the_coordinator_does_not_take_is_no_silo(tmp_path, intruder):
    async with World(tmp_path) as world:
        error = await refusal(world.server.port, Credentials(AUTHORITY.roots, intruder.certificate, intruder.key))
        # TLS 1.3 gives the silo no word of it, so it cannot be told from a coordinator that stops.
        assert isinstance(error, Disconnected)
        assert f"{HOST}:{world.server.port} hangs up after the TLS handshake" in str(error)
        assert await world.settled() == []


@pytest.mark.parametrize(
    ("federation", "silo", "said"),
    [("fed", "eve", "which is no silo of the federation fed"), ("neighbour", "alice", "")],
    ids=["not named in the file", "another federation under the same authority"],
)
@in_loop
async def test_a_silo_that_does_not_belong_here_is_told_so(tmp_path, federation, silo, said):
    authority = copy.copy(AUTHORITY)
    authority.federation = federation
    async with World(tmp_path) as world:
        error = await refusal(world.server.port, authority.issue_silo(silo))
    assert type(error) is IdentityError
    assert f"gptfl://{federation}/silo/{silo}" in error.message
    assert said in error.message


@in_loop
async def test_every_method_asks_who_calls(tmp_path):
    async with World(tmp_path) as world:
        eve = AUTHORITY.issue_silo("eve")
        secrets = grpc.ssl_channel_credentials(eve.authority, eve.key, eve.certificate)

        async def nothing():
            return
            yield

        async with grpc.aio.secure_channel(f"{HOST}:{world.server.port}", secrets) as channel:
            for call in (
                channel.stream_stream(f"/{EXCHANGE}/Work")(nothing()).read(),
                channel.unary_unary(f"/{EXCHANGE}/OpenUpload")(b""),
                channel.unary_stream(f"/{EXCHANGE}/Download")(b"").read(),
                channel.stream_unary(f"/{EXCHANGE}/Upload")(nothing()),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call
                assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED


@in_loop
async def test_a_silos_certificate_cannot_serve(tmp_path):
    async with World(tmp_path, credentials=SILOS["bob"]) as world:
        error = await refusal(world.server.port)
        assert type(error) is IdentityError
        assert "certificate purpose" in error.message


@in_loop
async def test_a_coordinator_of_another_address_ends_the_silo(tmp_path):
    async with World(tmp_path, credentials=AUTHORITY.issue_coordinator(["10.0.0.9", "host.example"])) as world:
        error = await refusal(world.server.port)
        assert type(error) is IdentityError
        assert "is not one to trust: IP address mismatch" in error.message
        assert f"gptfl credentials with --host {HOST}" in error.hint


@in_loop
async def test_certificates_that_are_out_of_date_end_the_silo(tmp_path):
    late = copy.copy(AUTHORITY)
    late._valid = timedelta(seconds=-10)
    async with World(tmp_path) as world:
        error = await refusal(world.server.port, late.issue_silo("alice"))
        assert type(error) is IdentityError
        assert "this silo's certificate: valid" in error.message
    async with World(tmp_path, credentials=late.issue_coordinator([HOST])) as world:
        error = await refusal(world.server.port)
        assert type(error) is IdentityError
        assert "is not one to trust: certificate has expired: valid " in error.message
        assert error.message.endswith(" s too late")
        assert "this machine's clock" in error.hint
        assert "the coordinator's operator" in error.hint


@in_loop
async def test_nobody_gets_in_without_a_certificate(tmp_path):
    async with World(tmp_path) as world:
        secrets = grpc.ssl_channel_credentials(AUTHORITY.roots)
        async with grpc.aio.secure_channel(f"{HOST}:{world.server.port}", secrets) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary(f"/{EXCHANGE}/OpenUpload")(b"")
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.insecure_channel(f"{HOST}:{world.server.port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary(f"/{EXCHANGE}/OpenUpload")(b"")
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        await world.joined()


def tls(tmp_path, purpose: ssl.Purpose, credentials: Credentials) -> ssl.SSLContext:
    credentials.save(tmp_path / "tls")
    context = ssl.create_default_context(purpose, cadata=credentials.authority.decode())
    context.load_cert_chain(tmp_path / "tls" / "certificate.pem", tmp_path / "tls" / "key.pem")
    context.set_alpn_protocols(["h2"])
    return context


@in_loop
async def test_the_coordinator_speaks_tls_1_3_only(tmp_path):
    def shake_hands(context: ssl.SSLContext, port: int) -> str | None:
        with (
            socket.create_connection((HOST, port), timeout=20) as plain,
            context.wrap_socket(plain, server_hostname=HOST) as wrapped,
        ):
            wrapped.recv(1)  # the server's first HTTP/2 frame: it took our certificate
            return wrapped.version()

    async with World(tmp_path) as world:
        context = tls(tmp_path, ssl.Purpose.SERVER_AUTH, SILOS["alice"])
        assert await asyncio.to_thread(shake_hands, context, world.server.port) == "TLSv1.3"
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.to_thread(shake_hands, context, world.server.port)


def refuse_two(context: ssl.SSLContext, listener: socket.socket) -> list[str]:
    """Why the handshakes of gRPC and of the silo's own look for the reason fail, as a server that is none of ours."""
    errors = []
    for _ in range(2):
        connection, _ = listener.accept()
        with connection, pytest.raises(ssl.SSLError) as error:
            context.wrap_socket(connection, server_side=True)
        errors.append(str(error.value).upper())
    return errors


@in_loop
async def test_a_silo_speaks_tls_1_3_only(tmp_path):
    context = tls(tmp_path, ssl.Purpose.CLIENT_AUTH, COORDINATOR)
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    with socket.create_server((HOST, 0)) as listener:
        serving = asyncio.create_task(asyncio.to_thread(refuse_two, context, listener))
        error = await refusal(listener.getsockname()[1])
        ours, theirs = await serving
    assert "NO_SHARED_CIPHER" in ours
    assert "UNSUPPORTED_PROTOCOL" in theirs
    assert type(error) is IdentityError
    assert "no TLS 1.3 connection with" in error.message


def test_grpc_loaded_before_tls_1_2_was_shut_out_is_refused():
    code = "import grpc, gptfl_dist.exchange.grpc.client"
    environment = {k: v for k, v in os.environ.items() if k != "GRPC_SSL_CIPHER_SUITES"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "LaunchError: grpc was imported before" in done.stderr
    code = "import gptfl_dist.exchange.grpc.client, grpc"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@in_loop
async def test_a_wire_that_breaks_or_a_coordinator_that_is_not_there_is_worth_another_try(tmp_path):
    async def hang_up(reader, writer):
        with contextlib.suppress(OSError):
            await reader.read(1)
        writer.close()

    server = await asyncio.start_server(hang_up, HOST, 0)
    port = server.sockets[0].getsockname()[1]
    assert isinstance(await refusal(port), Disconnected)
    server.close()
    await server.wait_closed()
    error = await refusal(port)
    assert isinstance(error, Disconnected)
    assert str(error).startswith(f"{HOST}:{port} does not answer: Connection refused (check coordinator.address")
    error = await refusal(1, host="no-such-host.invalid")
    assert isinstance(error, Disconnected)
    assert str(error).startswith("no-such-host.invalid cannot be resolved: ")


@in_loop
async def test_what_speaks_no_tls_is_no_coordinator(tmp_path):
    async def web_server(reader, writer):
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(web_server, HOST, 0)
    port = server.sockets[0].getsockname()[1]
    error = await refusal(port)
    assert type(error) is ConnectionFailed
    assert error.message == f"what answers at {HOST}:{port} speaks no TLS"
    assert "coordinator.address" in error.hint
    server.close()


@contextlib.asynccontextmanager
async def http_proxy(target: int, answer: bytes = b"HTTP/1.1 200 OK"):
    """A CONNECT proxy that leads to a port of this machine whatever was asked for; gives its port and the requests."""
    asked: list[bytes] = []
    pumps = []

    async def pump(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 14):
                writer.write(data)
        writer.close()

    async def connect(reader, writer):
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer + b"\r\n\r\n")
        if not answer.endswith(b"200 OK"):
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection(HOST, target)
        pumps.extend(asyncio.create_task(pump(*way)) for way in ((reader, far_writer), (far_reader, writer)))

    server = await asyncio.start_server(connect, HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1], asked
    finally:
        server.close()
        for task in pumps:
            task.cancel()


@in_loop
async def test_through_a_proxy_the_reason_is_told_as_well(tmp_path, monkeypatch):
    for name in ("grpc_proxy", "http_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    host, credentials = "coordinator.example", AUTHORITY.issue_coordinator(["coordinator.example"])
    async with World(tmp_path, credentials=credentials) as world, http_proxy(world.server.port) as (port, asked):
        monkeypatch.setenv("https_proxy", f"http://ward:s%2Fo@{HOST}:{port}")
        silo = dial(1, SILOS["alice"], host)
        await silo.connect()
        await silo.close()
        error = await refusal(1, FORGED.issue_silo("alice"), host)
        assert type(error) is IdentityError
        assert f"the certificate of {host}:1 is not one to trust" in error.message
        ours, theirs = (request.decode().lower() for request in asked[-2:])
        login = "proxy-authorization: basic d2fyzdpzl28="  # ward:s/o
        assert all(part.startswith(f"connect {host}:1 http/1.1\r\n") and login in part for part in (ours, theirs))
        async with http_proxy(world.server.port, b"HTTP/1.1 403 Forbidden") as (port, _):
            monkeypatch.setenv("https_proxy", f"http://{HOST}:{port}")
            error = await refusal(1, host=host)
            assert isinstance(error, Disconnected)
            assert f"the proxy {HOST} gives no way to {host}:1: HTTP/1.1 403 Forbidden" in str(error)
        error = await refusal(1, host=host)
        assert isinstance(error, Disconnected)
        assert f"the proxy {HOST} does not answer: Connection refused" in str(error)


@in_loop
async def test_a_certificate_that_is_refused_aloud_ends_the_silo(tmp_path):
    context = tls(tmp_path, ssl.Purpose.CLIENT_AUTH, COORDINATOR)
    context.verify_mode = ssl.CERT_REQUIRED

    intruder = FORGED.issue_silo("alice")
    credentials = Credentials(AUTHORITY.roots, intruder.certificate, intruder.key)
    with socket.create_server((HOST, 0)) as listener:
        serving = asyncio.create_task(asyncio.to_thread(refuse_two, context, listener))
        error = await refusal(listener.getsockname()[1], credentials)
        await serving
    assert type(error) is IdentityError
    assert "does not take this side's certificate: " in error.message


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1, 7])
@in_loop
async def test_releases_without_a_common_protocol_refuse_each_other_clearly(tmp_path, monkeypatch, version):
    async with World(tmp_path) as world:
        monkeypatch.setattr(client_module, "PROTOCOL_VERSION", version)
        error = await refusal(world.server.port)
        assert type(error) is ConnectionFailed
        assert f"speaks protocol {version} to {version}" in error.message
        assert "install matching releases" in error.message
        assert await world.settled() == []


# A coordinator that does not keep to the protocol.


OF_A_LATER_RELEASE = PLAN.model_dump_json().replace('"up":"none"', '"up":"int4"').encode()
"""A plan with a codec that this release does not know."""


def welcome(**changes: object) -> pb.Welcome:
    message = convert.welcome_to_message(Welcome("run", PLAN, SMALL), PROTOCOL_VERSION, "1.0")
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def order(**changes: object) -> pb.Order:
    message = convert.order_to_message(train_order("n1", "00" * 32))
    for name, value in changes.items():
        setattr(message, name, value)
    return message


@contextlib.asynccontextmanager
async def impostor(*words: pb.ToSilo, chunks: tuple[bytes, ...] = ()):
    """A silo that dials a server which says these words and hands out these chunks."""

    async def work(requests, context):
        for word in words:
            yield word.SerializeToString()
        await asyncio.sleep(60)

    async def download(request, context):
        for chunk in chunks:
            yield chunk

    server = grpc.aio.server()
    methods = {
        "Work": grpc.stream_stream_rpc_method_handler(work),
        "Download": grpc.unary_stream_rpc_method_handler(download),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(EXCHANGE, methods),))
    secrets = grpc.ssl_server_credentials([(COORDINATOR.key, COORDINATOR.certificate)])
    port = server.add_secure_port(f"{HOST}:0", secrets)
    await server.start()
    silo = GrpcSiloExchange(address=f"{HOST}:{port}", credentials=SILOS["alice"], keepalive=30.0)
    try:
        yield silo
    finally:
        await silo.close()
        await server.stop(None)


@pytest.mark.parametrize(
    ("word", "kind", "said"),
    [
        (pb.ToSilo(order=order()), ProtocolError, "no welcome"),
        (pb.ToSilo(), ProtocolError, "no welcome"),
        (pb.ToSilo(welcome=welcome(version=PROTOCOL_VERSION + 1)), ConnectionFailed, "speaks protocol"),
        (pb.ToSilo(welcome=welcome(plan=b"{}")), ProtocolError, "does not validate"),
        (pb.ToSilo(welcome=welcome(plan=b"\xff")), ProtocolError, "does not validate"),
        (pb.ToSilo(welcome=welcome(plan=OF_A_LATER_RELEASE)), ProtocolError, r"compression\.up"),
        (pb.ToSilo(welcome=welcome(layout=b"[1]")), ProtocolError, "does not validate"),
        (pb.ToSilo(welcome=welcome(layout=b'[["w",[Infinity],"F32"]]')), ProtocolError, "does not validate"),
        (pb.ToSilo(welcome=welcome(layout=b"[" * 100_000)), ProtocolError, "does not validate"),
        (pb.ToSilo(welcome=welcome(layout=b'[["w",[-1],"F32"]]')), ProtocolError, "does not validate"),
    ],
)
@in_loop
async def test_a_wrong_welcome_ends_the_silo_with_a_reason(word, kind, said):
    async with impostor(word) as silo:
        with pytest.raises(kind, match=said):
            await silo.connect()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (pb.ToSilo(order=order(kind=0)), "unknown kind 0"),
        (pb.ToSilo(order=order(kind=9)), "unknown kind 9"),
        (pb.ToSilo(order=order(nonce="")), "nonce"),
        (pb.ToSilo(order=order(nonce="a\nb")), "nonce"),
        (pb.ToSilo(order=order(nonce="ä")), "nonce"),
        (pb.ToSilo(order=order(nonce="n" * 65)), "nonce"),
        (pb.ToSilo(order=order(follows="../n")), "nonce"),
        (pb.ToSilo(order=order(follows="n" * 65)), "nonce"),
        (pb.ToSilo(order=order(training=b"")), "training settings"),
        (pb.ToSilo(order=order(training=b'{"epochs": -1}')), "training settings"),
        (pb.ToSilo(welcome=welcome()), "unexpected welcome"),
        (pb.ToSilo(), "unexpected None"),
    ],
)
@in_loop
async def test_a_wrong_order_is_a_protocol_error(word, said):
    async with impostor(pb.ToSilo(welcome=welcome()), word) as silo:
        await silo.connect()
        with pytest.raises(ProtocolError, match=said):
            await silo.receive()


@in_loop
async def test_what_would_steer_the_silos_terminal_is_taken_out(tmp_path):
    recall = pb.ToSilo(recall=pb.Recall(nonce="n", reason="\x1b]0;title\x07late" + "!" * 10_000))
    async with impostor(pb.ToSilo(welcome=welcome()), recall) as silo:
        await silo.connect()
        word = await silo.receive()
        assert isinstance(word, Recalled)
        assert word.reason.startswith(" ]0;title late!!!")
        assert len(word.reason) == 4000


CHUNK = pb.Chunk(offset=0, data=bytes(SMALL.nbytes)).SerializeToString()


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ((), "do not have the digest"),
        ((CHUNK,), "do not have the digest"),
        ((CHUNK, CHUNK), "sent bytes from 0"),
        ((CHUNK, pb.Chunk(offset=SMALL.nbytes, data=b"x").SerializeToString()), "sent bytes from"),
        ((pb.Chunk(offset=1, data=b"x").SerializeToString(),), "sent bytes from 1, expected from 0"),
        ((b"\xff",), "no chunk"),
        ((b"",), "no chunk"),
    ],
)
@in_loop
async def test_weights_that_are_not_what_was_announced_never_reach_their_place(tmp_path, chunks, said):
    async with impostor(pb.ToSilo(welcome=welcome()), chunks=chunks) as silo:
        await silo.connect()
        with pytest.raises(ProtocolError, match=said):
            await silo.download("00" * 32, SMALL, tmp_path / "got")
        assert not (tmp_path / "got").exists()

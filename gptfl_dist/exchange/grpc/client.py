"""A silo's end of the gRPC exchange: it dials out, keeps one stream open for orders, and moves payloads beside it."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar

import grpc
import grpc.aio
from blake3 import blake3

from gptfl_dist import __version__
from gptfl_dist.errors import ConnectionFailed, GptflError, IdentityError, ProtocolError, StorageError
from gptfl_dist.exchange.base import (
    PROTOCOL_VERSION,
    Disconnected,
    Goodbye,
    Recalled,
    Receipt,
    UpdateHeader,
    Welcome,
)
from gptfl_dist.exchange.buffers import keep_buffers
from gptfl_dist.exchange.grpc import convert, frames
from gptfl_dist.exchange.grpc import exchange_pb2 as pb
from gptfl_dist.exchange.grpc.health import EXCHANGE
from gptfl_dist.exchange.grpc.options import WIDEST, line_options
from gptfl_dist.exchange.grpc.port import UPLOAD_CHUNK
from gptfl_dist.exchange.grpc.server import NONCE
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.files import storage_error
from gptfl_dist.security.authority import Credentials
from gptfl_dist.security.credentials import identity_in, require_own_current
from gptfl_dist.security.handshake import Unreachable, is_loopback, shake_hands
from gptfl_dist.security.signing import sign
from gptfl_dist.weights import Layout, WeightsFile
from gptfl_dist.weights.file import header_of
from gptfl_dist.weights.sealed import Writer, writer

_SMALLEST_CHUNK = 4096
_LARGEST_MESSAGE = 64 << 20  # a welcome with a very large layout
_LARGEST_CHUNK = 16 << 20  # that exchange.chunk may ask for

_FINAL = {
    grpc.StatusCode.PERMISSION_DENIED: IdentityError,
    grpc.StatusCode.UNAUTHENTICATED: IdentityError,
    grpc.StatusCode.FAILED_PRECONDITION: ConnectionFailed,
    grpc.StatusCode.INVALID_ARGUMENT: ConnectionFailed,
    grpc.StatusCode.UNIMPLEMENTED: ConnectionFailed,
}
"""Status codes after which trying again is of no use."""

_Work: TypeAlias = "grpc.aio.StreamStreamCall[pb.FromSilo, pb.ToSilo]"
_T = TypeVar("_T")


@dataclass
class _Partial:
    """A download that may break off: its digest, what writes it, the bytes that are there, and their hash."""

    digest: str = ""
    out: Writer | None = None
    received: int = 0
    hasher: blake3 = field(default_factory=blake3)


class GrpcSiloExchange:
    """See `SiloExchange`. One object serves any number of connections in turn."""

    def __init__(self, *, address: str, credentials: Credentials, keepalive: float) -> None:
        self._address = address
        self._credentials = credentials
        self._shown = credentials  # by the connection that is open
        self._own = identity_in(credentials.certificate, "this silo's certificate")
        self._keepalive = keepalive
        self._instance = secrets.token_hex(8)
        self._channel: grpc.aio.Channel | None = None
        self._call: _Work | None = None
        self._packed = False  # whether chunks are
        self._partial = _Partial()
        self._writing = asyncio.Lock()  # a stream takes one write at a time
        self._idle = asyncio.Condition()
        self._transfers = 0
        self._moving = asyncio.Lock()  # held while the stream moves to another connection
        self._welcome: Welcome | None = None

    async def connect(self) -> Welcome:
        async with self._moving:
            await self.close()
            keep_buffers()
            self._welcome = await self._dial()
            return self._welcome

    async def _dial(self) -> Welcome:
        """Opens a connection, and takes it into use once the coordinator has said welcome."""
        shown = self._credentials
        # The coordinator would hang up without a word.
        require_own_current(shown.certificate, "this silo's certificate")
        channel = channel_to(self._address, shown, self._keepalive)
        try:
            call, welcome = await self._greet(channel)
        except BaseException:
            await channel.close()
            raise
        self._channel, self._call, self._shown = channel, call, shown
        self._packed = welcome.plan.compression.lossless == "zstd"
        return welcome

    async def _greet(self, channel: grpc.aio.Channel) -> tuple[_Work, Welcome]:
        """Opens the stream of a connection; returns it with the coordinator's first word."""
        work: grpc.aio.StreamStreamMultiCallable[pb.FromSilo, pb.ToSilo] = channel.stream_stream(
            f"/{EXCHANGE}/Work", pb.FromSilo.SerializeToString, pb.ToSilo.FromString
        )
        call = work()
        hello = pb.Hello(
            oldest_version=PROTOCOL_VERSION,
            newest_version=PROTOCOL_VERSION,
            release=__version__,
            instance=self._instance,
        )
        try:
            await _write(call, pb.FromSilo(hello=hello))
            message = await _read(call)
        except Disconnected as broken:
            raise await self._why(broken) from None
        if message.WhichOneof("message") != "welcome":
            raise ProtocolError("the coordinator's first message is no welcome", hint="install matching releases")
        if message.welcome.version != PROTOCOL_VERSION:
            raise ConnectionFailed(
                f"the coordinator speaks protocol {message.welcome.version}, this silo (release {__version__}) speaks "
                f"{PROTOCOL_VERSION}",
                hint="install matching releases",
            )
        return call, convert.welcome_from_message(message.welcome)

    async def ready(self) -> None:
        await self._say(pb.FromSilo(ready=pb.Ready()))

    async def receive(self) -> Order | Recalled | Goodbye:
        message = await self._next()
        kind = message.WhichOneof("message")
        if kind == "order":
            return convert.order_from_message(message.order)
        if kind == "recall":
            return Recalled(message.recall.nonce, convert.legible(message.recall.reason))
        if kind == "goodbye":
            return Goodbye(message.goodbye.finished, convert.legible(message.goodbye.reason))
        raise ProtocolError(f"the coordinator sent an unexpected {kind}", hint="install matching releases")

    async def download(self, digest: str, layout: Layout, path: Path) -> None:
        async with self._transfer():
            await self._download(digest, layout, path)

    async def _download(self, digest: str, layout: Layout, path: Path) -> None:
        header, part = header_of(layout), path.with_name(path.name + ".next")
        try:
            with suppress(FileNotFoundError):
                path.replace(part)  # to write over the pages of the weights before costs less than to write fresh ones
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                size = len(header) + layout.nbytes
                out = self._partial.out
                if self._partial.digest != digest or out is None or os.fstat(fd).st_size != out.stored:
                    out = writer(size)
                    self._partial = _Partial(digest, out)
                    os.ftruncate(fd, out.stored)
                    out.write(fd, 0, memoryview(header))
                await self._receive_into(fd, out, len(header), layout.nbytes, self._partial)
                if self._partial.received == layout.nbytes:
                    out.finish(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise storage_error(error, path) from None
        arrived, self._partial = self._partial, _Partial()
        if arrived.received != layout.nbytes or arrived.hasher.hexdigest() != digest:
            part.unlink()
            raise ProtocolError("the weights that arrived do not have the digest that was announced")
        part.replace(path)

    async def _receive_into(self, fd: int, out: Writer, start: int, size: int, partial: _Partial) -> None:
        """Goes on with a download that is to be `size` bytes from byte `start` of the file."""
        chunks = _guard_stream(
            lambda: self._stream_of(pb.DownloadRequest(digest=partial.digest, offset=partial.received))
        )
        try:
            async for frame in chunks:
                offset, data, _ = frames.decode_chunk(frame, _LARGEST_CHUNK if self._packed else 0)
                if offset != partial.received or offset + len(data) > size:
                    raise ProtocolError(f"the coordinator sent bytes from {offset}, expected from {partial.received}")
                out.write(fd, start + offset, data)
                partial.hasher.update(data)
                partial.received += len(data)
        finally:
            await chunks.aclose()

    async def upload(self, header: UpdateHeader, update: WeightsFile) -> Receipt:
        async with self._transfer():
            return await self._upload(header, update)

    async def _upload(self, header: UpdateHeader, update: WeightsFile) -> Receipt:
        channel = self._open_channel
        announce: grpc.aio.UnaryUnaryMultiCallable[pb.UpdateHeader, pb.UploadOffset] = channel.unary_unary(
            f"/{EXCHANGE}/OpenUpload", pb.UpdateHeader.SerializeToString, pb.UploadOffset.FromString
        )
        assert self._welcome is not None
        signature = sign(header.statement(self._own, self._welcome.run), self._shown.key)
        answer = await guard(lambda: announce(convert.header_to_message(header, signature)))
        if answer.refused:
            return Receipt(False, convert.legible(answer.refused))
        if answer.committed:
            return Receipt(True)

        width = frames.width_of(update.layout)
        unreadable: list[StorageError] = []

        chunk = max(_SMALLEST_CHUNK, min(UPLOAD_CHUNK, answer.chunk))

        async def chunks() -> AsyncIterator[bytes]:
            for offset in range(answer.offset, update.nbytes, chunk):
                size = min(chunk, update.nbytes - offset)
                try:
                    if self._packed:
                        frame, _ = frames.pack_chunk(offset, update.read(offset, size), width)
                    else:
                        frame = frames.read_chunk(update, offset, size)
                except StorageError as error:
                    unreadable.append(error)  # gRPC would tell it as a broken connection, which trying again mends
                    raise
                yield frame

        send: grpc.aio.StreamUnaryMultiCallable[bytes, pb.Receipt] = channel.stream_unary(
            f"/{EXCHANGE}/Upload", response_deserializer=pb.Receipt.FromString
        )
        try:
            receipt = await guard(lambda: send(chunks(), metadata=((NONCE, header.report.nonce),)))
        except Disconnected:
            if unreadable:
                raise unreadable[0] from None
            raise
        return Receipt(receipt.committed, convert.legible(receipt.reason))

    async def report(self, report: Report) -> None:
        await self._say(pb.FromSilo(report=convert.report_to_message(report)))

    async def progress(self, nonce: str, done: int, total: int, note: str = "") -> None:
        await self._say(pb.FromSilo(progress=pb.Progress(nonce=nonce, done=done, total=total, note=note)))

    async def fail(self, nonce: str, reason: str) -> None:
        await self._say(pb.FromSilo(failure=pb.Failure(nonce=nonce, reason=reason)))

    @property
    def credentials(self) -> Credentials:
        """Those that the next connection shows."""
        return self._credentials

    async def renew(self, request: bytes) -> tuple[bytes, bytes]:
        """A new certificate for a certificate request, with its chain, and the roots to trust, as PEM.

        Raises Disconnected, or IdentityError where the coordinator makes none.
        """
        ask: grpc.aio.UnaryUnaryMultiCallable[pb.RenewRequest, pb.Renewed] = self._open_channel.unary_unary(
            f"/{EXCHANGE}/Renew", pb.RenewRequest.SerializeToString, pb.Renewed.FromString
        )
        answer = await guard(lambda: ask(pb.RenewRequest(request=request)))
        if answer.refused:
            raise IdentityError(f"the coordinator refuses: {convert.legible(answer.refused)}")
        return answer.certificate, answer.authority

    async def show(self, credentials: Credentials) -> None:
        """From now on these credentials are shown.

        The stream moves to a connection that shows them once no transfer is under way; the coordinator knows the silo
        again. Where none comes about, the stream stays where it is, and the next connection shows them.
        """
        self._credentials = credentials
        async with self._moving:
            async with self._idle:
                await self._idle.wait_for(lambda: not self._transfers)
            old = self._channel
            if old is None:
                return
            try:
                welcome = await self._dial()
            except (Disconnected, GptflError):
                return  # and not hang up: what keeps the coordinator from answering may be its end, which it tells
            if welcome == self._welcome:
                with suppress(Disconnected):  # `receive` meets it too
                    await self.ready()
            else:
                await self.close()  # the coordinator has another run
            await old.close()

    @asynccontextmanager
    async def _transfer(self) -> AsyncIterator[None]:
        async with self._moving:  # on the connection that is left, it would be cut
            self._transfers += 1
        try:
            yield
        finally:
            self._transfers -= 1
            async with self._idle:
                self._idle.notify_all()

    async def close(self) -> None:
        channel, self._channel, self._call = self._channel, None, None
        if channel is not None:
            await channel.close()

    async def _why(self, broken: Disconnected) -> Exception:
        """What keeps a connection from coming about, in better words than gRPC's where a handshake finds them."""
        try:
            await shake_hands(self._address, self._credentials)
        except Unreachable as error:
            return Disconnected(f"{error.message} ({error.hint})")
        except ConnectionFailed as error:
            return error
        return broken

    @property
    def _open_channel(self) -> grpc.aio.Channel:
        if self._channel is None:
            raise Disconnected("not connected")
        return self._channel

    def _stream_of(self, request: pb.DownloadRequest) -> grpc.aio.UnaryStreamCall[pb.DownloadRequest, bytes]:
        method: grpc.aio.UnaryStreamMultiCallable[pb.DownloadRequest, bytes] = self._open_channel.unary_stream(
            f"/{EXCHANGE}/Download", pb.DownloadRequest.SerializeToString
        )
        return method(request)

    async def _say(self, message: pb.FromSilo) -> None:
        call = self._call
        if call is None:
            raise Disconnected("not connected")
        async with self._writing:
            await _write(call, message)

    async def _next(self) -> pb.ToSilo:
        while (call := self._call) is not None:
            try:
                return await _read(call)
            except Disconnected:
                async with self._moving:
                    if self._call is call:
                        raise
        raise Disconnected("not connected")


def channel_to(address: str, credentials: Credentials, keepalive: float) -> grpc.aio.Channel:
    """A connection with a coordinator, which comes about with the first call."""
    return grpc.aio.secure_channel(
        address,
        grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate),
        options=[
            ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
            ("grpc.max_send_message_length", UPLOAD_CHUNK + frames.MAX_OVERHEAD),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.enable_retries", 0),
            *line_options(keepalive, WIDEST),
            # A proxy of the environment leads out, and would take this machine's own address for its own.
            ("grpc.enable_http_proxy", int(not is_loopback(address))),
        ],
    )


async def _write(call: _Work, message: pb.FromSilo) -> None:
    try:
        await guard(lambda: call.write(message))
    except asyncio.InvalidStateError:
        await _read(call)  # the call is over, and only reading tells why
        raise Disconnected("the stream is closed") from None


async def _read(call: _Work) -> pb.ToSilo:
    message = await guard(call.read)
    if not isinstance(message, pb.ToSilo):  # grpc.aio.EOF
        raise Disconnected("the coordinator closed the stream")
    return message


def _translate(error: grpc.aio.AioRpcError) -> Exception:
    """What a failed call means: Disconnected, or an error that trying again does not mend."""
    details = convert.legible(error.details() or error.code().name)
    kind = _FINAL.get(error.code())
    if kind is not None:
        return kind(f"the coordinator refuses: {details}", hint="ask the coordinator's operator")
    if error.code() is grpc.StatusCode.UNAVAILABLE:  # the words are gRPC's; all others are the coordinator's
        return Disconnected(f"the connection broke ({details.partition('last error: ')[2] or details})")
    return Disconnected(details)


@contextmanager
def _translated() -> Iterator[None]:
    """Turns what gRPC raises in the block into our errors.

    gRPC raises CancelledError too where a channel is closed under a call; that is none meant for this task.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise _translate(error) from None
    except grpc.aio.UsageError as error:
        raise Disconnected(str(error)) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling() > 0:
            raise
        raise Disconnected("the connection was closed") from None


async def guard(call: Callable[[], Awaitable[_T]]) -> _T:
    """Makes a call, awaits it and translates its errors."""
    with _translated():
        return await call()


async def _guard_stream(
    call: Callable[[], grpc.aio.UnaryStreamCall[pb.DownloadRequest, bytes]],
) -> AsyncGenerator[bytes, None]:
    """Makes a call, passes its frames on and translates its errors. The call ends with the generator."""
    with _translated():
        stream = call()
        try:
            async for frame in stream:
                yield frame
        finally:
            stream.cancel()

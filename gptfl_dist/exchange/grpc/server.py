"""The coordinator's end of the gRPC exchange.

Five methods (see `exchange.proto`) behind the coordinator's port. The peer is known by its certificate; each call
checks it (`callers`), and each message whether it still counts: gRPC itself asks only when a connection is made.
Control messages pass through a queue a silo, so an order reaches the wire the moment it is given. Weights are read from
their file as they are sent, updates written to their spool as they arrive: neither is held in memory.
"""

from __future__ import annotations

import asyncio
import logging
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from gptfl_dist import __version__
from gptfl_dist.errors import IdentityError, ProtocolError, StorageError
from gptfl_dist.exchange.base import (
    PROTOCOL_VERSION,
    Answered,
    ExchangeEvent,
    ExchangeFailed,
    Goodbye,
    OrderFailed,
    Origin,
    SiloBarred,
    SiloConnected,
    SiloJoined,
    SiloLeft,
    SiloProgress,
    Traffic,
    UpdateHeader,
    Welcome,
)
from gptfl_dist.exchange.buffers import keep_buffers
from gptfl_dist.exchange.grpc import convert, frames
from gptfl_dist.exchange.grpc import exchange_pb2 as pb
from gptfl_dist.exchange.grpc.callers import Context
from gptfl_dist.exchange.grpc.health import EXCHANGE
from gptfl_dist.exchange.grpc.port import UPLOAD_CHUNK, Port
from gptfl_dist.exchange.grpc.shared import SharedFrames
from gptfl_dist.exchange.inbox import Busy, Inbox, Refused, Superseded
from gptfl_dist.federation.orders import Order
from gptfl_dist.ledger.records import Signed
from gptfl_dist.security.identity import Peer
from gptfl_dist.security.registry import serial_text
from gptfl_dist.security.signing import require_signed
from gptfl_dist.weights import WeightsFile

_log = logging.getLogger(__name__)

NONCE = "gptfl-nonce"
_PART = "take part"
_LOOK_EVERY = 0.2  # seconds between two looks at the certificates of silos that say nothing
_PREPARING = 10.0  # seconds in which a silo that has just connected says that it is ready, and hears of the end

_Message = TypeVar("_Message", bound=Message)


@dataclass(eq=False)
class _Line:
    """One silo's open Work stream."""

    instance: str
    address: str
    peer: Peer
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # the silo said that it is ready, or left
    outgoing: asyncio.Queue[pb.ToSilo | None] = field(default_factory=asyncio.Queue)


class GrpcCoordinatorExchange:
    """See `CoordinatorExchange`."""

    transport = "grpc+mtls"

    def __init__(self, *, port: Port, inbox: Inbox, chunk: int) -> None:
        self.events: asyncio.Queue[ExchangeEvent] = asyncio.Queue()
        self.traffic = Traffic()
        self._port = port
        self._callers = port.callers
        self._trust = port.trust
        self._inbox = inbox
        self._chunk = port.chunk(chunk)
        self._lines: dict[str, _Line] = {}
        self._published: dict[str, WeightsFile] = {}
        self._welcome: Welcome | None = None
        self._packed = False  # whether chunks are
        self._frames = SharedFrames(self._chunk, packed=False)
        self._closing = False
        self._checks: set[asyncio.Task[pb.Receipt]] = set()
        self._watch: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The number of the port in use."""
        return self._port.number

    async def open(self, welcome: Welcome) -> None:
        """Takes silos from now on; `port` is where. Raises LaunchError where its address cannot be had."""
        keep_buffers()
        self._welcome = welcome
        self._packed = welcome.plan.compression.lossless == "zstd"
        self._frames = SharedFrames(self._chunk, packed=self._packed)
        self._callers.failed = lambda error: self.events.put_nowait(ExchangeFailed(error))
        answering, streaming = partial(self._callers.answering, _PART), partial(self._callers.streaming, _PART)
        # Requests arrive as bytes and are parsed by the methods, once they know who sent them.
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Work": grpc.stream_stream_rpc_method_handler(
                streaming(self._work), response_serializer=pb.ToSilo.SerializeToString
            ),
            "OpenUpload": grpc.unary_unary_rpc_method_handler(
                answering(self._open_upload), response_serializer=pb.UploadOffset.SerializeToString
            ),
            "Download": grpc.unary_stream_rpc_method_handler(streaming(self._download, transfer=True)),
            "Upload": grpc.stream_unary_rpc_method_handler(
                answering(self._upload, transfer=True), response_serializer=pb.Receipt.SerializeToString
            ),
            "Renew": grpc.unary_unary_rpc_method_handler(
                answering(self._renew), response_serializer=pb.Renewed.SerializeToString
            ),
        }
        self._port.serve(EXCHANGE, methods)
        await self._port.open()
        self._watch = asyncio.create_task(self._watch_certificates())
        await self._port.health.takes_silos(True)

    async def publish(self, bases: Mapping[str, WeightsFile]) -> None:
        self._published = dict(bases)

    async def send(self, silo: str, order: Order) -> None:
        if silo in self._lines:
            self._lines[silo].outgoing.put_nowait(pb.ToSilo(order=convert.order_to_message(order)))

    async def recall(self, silo: str, nonce: str, reason: str) -> None:
        if silo in self._lines:
            self._lines[silo].outgoing.put_nowait(pb.ToSilo(recall=pb.Recall(nonce=nonce, reason=reason)))

    async def close(self, goodbye: Goodbye) -> None:
        self._closing = True
        if self._watch is not None:
            self._watch.cancel()
        message = pb.ToSilo(goodbye=pb.Goodbye(finished=goodbye.finished, reason=goodbye.reason))
        patience = _PREPARING if goodbye.finished else 0.0  # else the silo dials again, and hears it another time
        await asyncio.gather(*(_dismiss(line, message, patience) for line in self._lines.values()))
        await self._port.close()
        # A check reads its spool in a thread, which nothing can stop; its caller closes the spools next.
        await asyncio.gather(*self._checks, return_exceptions=True)

    async def _watch_certificates(self) -> None:
        """Ends the streams of silos whose certificate was revoked or expired, and what a revoked silo owes."""
        told: dict[str, str] = {}
        while True:
            try:
                barred = self._trust.barred()
                for silo in sorted(barred.keys() - told.keys()):
                    self.events.put_nowait(SiloBarred(silo, barred[silo]))  # first, for it says why the order fails
                    if (nonce := self._inbox.owed(silo)) is not None:
                        self._fail(silo, nonce, f"refused: {barred[silo]}")
                told = dict(barred)
                for line in list(self._lines.values()):
                    if self._callers.why_not(line.peer):
                        line.outgoing.put_nowait(None)
            except StorageError as error:
                self.events.put_nowait(ExchangeFailed(error))
                return
            await asyncio.sleep(_LOOK_EVERY)

    async def _work(
        self, peer: Peer, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncGenerator[pb.ToSilo, None]:
        silo = peer.identity.name
        first = await _parse(pb.FromSilo, await anext(aiter(requests), b""), context)
        if first.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello")
        hello = first.hello
        if not hello.oldest_version <= PROTOCOL_VERSION <= hello.newest_version:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the silo (release {hello.release[:40]}) speaks protocol {hello.oldest_version} to "
                f"{hello.newest_version}, the coordinator (release {__version__}) speaks {PROTOCOL_VERSION}: "
                "install matching releases",
            )
        if self._closing:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the coordinator is stopping")
        old = self._lines.get(silo)
        if old is not None and old.instance != hello.instance:
            await context.abort(
                grpc.StatusCode.ALREADY_EXISTS,
                f"{silo} is connected already, from {old.address}: does a second process use its certificate?",
            )
        origin = Origin(context.peer(), peer.identity.uri, serial_text(peer.serial), peer.fingerprint)
        line = self._lines[silo] = _Line(hello.instance, origin.address, peer)
        if old is not None:
            old.outgoing.put_nowait(None)  # the same process came back before its old connection was found dead
        self.events.put_nowait(SiloConnected(silo, origin))
        assert self._welcome is not None
        line.outgoing.put_nowait(
            pb.ToSilo(welcome=convert.welcome_to_message(self._welcome, PROTOCOL_VERSION, __version__))
        )
        listener = asyncio.create_task(self._listen_to(silo, line, requests))
        try:
            while (message := await line.outgoing.get()) is not None:
                await self._callers.admit(peer, context)
                yield message
            await self._callers.admit(peer, context)
        finally:
            listener.cancel()
            if self._lines.get(silo) is line:
                del self._lines[silo]
                self.events.put_nowait(SiloLeft(silo))

    async def _listen_to(self, silo: str, line: _Line, requests: AsyncIterator[bytes]) -> None:
        """Hears a silo out, until the stream ends or cannot be understood."""
        try:
            async for request in requests:
                if self._callers.why_not(line.peer):
                    return
                await self._callers.message_came(line.peer, len(request))
                self._hear(silo, line, pb.FromSilo.FromString(request))
        except DecodeError:
            _log.warning("silo %s sent what is no message; its connection is closed", silo)
        except StorageError as error:
            self.events.put_nowait(ExchangeFailed(error))
        except grpc.aio.BaseError:
            pass  # the connection broke
        finally:
            line.settled.set()
            line.outgoing.put_nowait(None)

    def _hear(self, silo: str, line: _Line, message: pb.FromSilo) -> None:
        """Turns what a silo says into events: only once that it is ready, and nothing of orders that it was not given.

        So a silo that talks without end fills no queue. Raises StorageError.
        """
        kind = message.WhichOneof("message")
        if kind == "ready" and not line.settled.is_set():
            line.settled.set()
            self.events.put_nowait(SiloJoined(silo))
        elif kind == "progress" and self._inbox.awaits(silo, message.progress.nonce):
            progress = message.progress
            note = convert.legible(progress.note)
            self.events.put_nowait(SiloProgress(silo, progress.nonce, progress.done, progress.total, note))
        elif kind == "failure":
            self._fail(silo, message.failure.nonce, message.failure.reason)
        elif kind == "report":
            report = convert.report_from_message(message.report)
            awaited = self._inbox.awaits(silo, report.nonce)
            try:
                self._inbox.accept(silo, report)
            except Refused as refusal:
                self._fail(silo, report.nonce, f"refused: {refusal}")
            else:
                if awaited:
                    self.events.put_nowait(Answered(silo, report.nonce))

    async def _download(self, peer: Peer, data: bytes, context: Context) -> AsyncGenerator[bytes, None]:
        request = await _parse(pb.DownloadRequest, data, context)
        weights = self._published.get(request.digest)
        if weights is None or weights.closed:  # closed: between two arms
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"the weights {request.digest[:12]!r} are not handed out now"
            )
        if request.offset > weights.nbytes:
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, f"the weights end at byte {weights.nbytes}")
        for offset in range(request.offset, weights.nbytes, self._chunk):
            await self._callers.admit(peer, context)
            if self._closing or weights.closed or self._published.get(request.digest) is not weights:
                await context.abort(grpc.StatusCode.ABORTED, "the weights are not handed out any more")
            frame, carried = self._frames.frame(request.digest, weights, offset)
            await self._callers.sending(peer, len(frame))
            yield frame
            self.traffic.down += carried

    async def _open_upload(self, peer: Peer, data: bytes, context: Context) -> pb.UploadOffset:
        silo = peer.identity.name
        message = await _parse(pb.UpdateHeader, data, context)
        header = convert.header_from_message(message)
        try:
            signed = self._signed(peer, header, message.signature)
            offset, committed = self._inbox.announce(silo, header, signed)
        except Refused as refusal:
            self._fail(silo, header.report.nonce, f"refused: {refusal}")
            return pb.UploadOffset(refused=str(refusal))
        except Busy:
            await context.abort(grpc.StatusCode.ABORTED, "an upload of this update is being checked; ask again")
        except StorageError as error:
            self.events.put_nowait(ExchangeFailed(error))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the coordinator cannot store the update")
        return pb.UploadOffset(offset=offset, committed=committed, chunk=self._port.upload_chunk)

    def _signed(self, peer: Peer, header: UpdateHeader, signature: bytes) -> Signed:
        """What shows later that it was this silo which announced an update. Raises Refused."""
        assert self._welcome is not None
        text = header.statement(peer.identity, self._welcome.run)
        try:
            require_signed(text, signature, peer.certificate)
        except IdentityError as error:
            raise Refused(f"the update {error.message}") from None
        return Signed(text, b64encode(signature).decode(), peer.fingerprint, peer.certificate.decode())

    async def _upload(self, peer: Peer, requests: AsyncIterator[bytes], context: Context) -> pb.Receipt:
        silo = peer.identity.name
        nonce = ""
        for key, value in context.invocation_metadata() or ():
            if key == NONCE:
                nonce = str(value)
        try:
            spool = self._inbox.spool(silo, nonce)
            ticket = spool.claim()
            largest = UPLOAD_CHUNK if self._packed else 0
            async for frame in requests:
                await self._callers.admit(peer, context)
                await self._callers.received(peer, len(frame))
                chunk = frames.decode_chunk(frame, largest)
                spool.write(ticket, chunk.offset, chunk.data)
                self.traffic.up += chunk.carried
            if spool.received < spool.size:
                # A stream that breaks may look as if it ended: the silo shall come back and go on from here.
                await context.abort(grpc.StatusCode.ABORTED, f"ended after {spool.received} of {spool.size} bytes")
            # The check goes on where the silo hangs up meanwhile: what it commits must be told.
            check = asyncio.create_task(self._check(silo, nonce))
            self._checks.add(check)
            check.add_done_callback(self._checked)
            return await asyncio.shield(check)
        except Superseded:
            await context.abort(grpc.StatusCode.ABORTED, "a newer upload took over")
        except Busy:
            await context.abort(grpc.StatusCode.ABORTED, "an upload of this update is being checked; ask again")
        except StorageError as error:
            self.events.put_nowait(ExchangeFailed(error))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the coordinator cannot store the update")
        except (Refused, ProtocolError) as refusal:
            self._fail(silo, nonce, f"refused: {refusal}")
            return pb.Receipt(reason=str(refusal))

    async def _renew(self, peer: Peer, data: bytes, context: Context) -> pb.Renewed:
        request = await _parse(pb.RenewRequest, data, context)
        try:
            certificate, authority = self._trust.renew(peer.identity, request.request)
        except (IdentityError, StorageError) as error:
            _log.warning("the certificate of silo %s is not renewed: %s", peer.identity.name, error.message)
            return pb.Renewed(refused=error.message)
        return pb.Renewed(certificate=certificate, authority=authority)

    async def _check(self, silo: str, nonce: str) -> pb.Receipt:
        """Checks and commits a finished upload, and tells so. Raises Busy or StorageError."""
        try:
            await asyncio.to_thread(self._inbox.finish, silo, nonce)
        except Refused as refusal:
            self._fail(silo, nonce, f"refused: {refusal}")
            return pb.Receipt(reason=str(refusal))
        self.events.put_nowait(Answered(silo, nonce))
        return pb.Receipt(committed=True)

    def _checked(self, check: asyncio.Task[pb.Receipt]) -> None:
        self._checks.discard(check)
        if not check.cancelled() and isinstance(error := check.exception(), StorageError):
            self.events.put_nowait(ExchangeFailed(error))

    def _fail(self, silo: str, nonce: str, reason: str) -> None:
        """Tells that an order failed, once. What a silo says of orders that are not open changes nothing."""
        if self._inbox.fail(silo, nonce):
            self.events.put_nowait(OrderFailed(silo, nonce, convert.legible(reason)))


async def _dismiss(line: _Line, goodbye: pb.ToSilo, patience: float) -> None:
    """Ends a silo's stream, but not while the silo is about to say on it that it is ready: it would hear nothing."""
    with suppress(TimeoutError):
        await asyncio.wait_for(line.settled.wait(), patience)
    line.outgoing.put_nowait(goodbye)
    line.outgoing.put_nowait(None)


async def _parse(kind: type[_Message], data: bytes, context: Context) -> _Message:
    """The message in a request; a call that carries none is refused."""
    try:
        return kind.FromString(data)
    except DecodeError:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the request is no {kind.__name__}")

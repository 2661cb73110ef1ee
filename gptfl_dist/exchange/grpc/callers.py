"""Who calls the coordinator's port, whether they may, and how much of it they take. Every method of every service asks.

The order: which certificate is shown (and that nothing older than TLS 1.3 is spoken), whether it is one of this
federation's, whether it counts still, whether its role may do this, and how much its owner has under way. Who is
refused waits for a moment first, so that asking again at once gains nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, TypeVar

import grpc
import grpc.aio

from gptfl_dist.errors import GptflError, IdentityError, StorageError
from gptfl_dist.exchange.limits import Limiter, TooMuch
from gptfl_dist.exchange.seldom import Seldom
from gptfl_dist.security.authorisation import require
from gptfl_dist.security.identity import Identity, Peer, called, peer_of
from gptfl_dist.security.registry import serial_text
from gptfl_dist.security.trust import Trust

_log = logging.getLogger(__name__)

_R = TypeVar("_R")
_A = TypeVar("_A")
Context = grpc.aio.ServicerContext[Any, Any]

_EXPIRED = "the certificate expired while its connection was open"
_PAUSE = 0.2  # seconds before a call is refused
_TOLD_EVERY = 60.0  # seconds between two lines about the same refusal

Note = Callable[..., None]
"""Notes an event and its fields in the audit log. Blocking."""


class Callers:
    """Of one port. `silos` are the names that may take part; `note` is told of refused roles."""

    def __init__(
        self, *, federation: str, silos: tuple[str, ...], trust: Trust, limiter: Limiter, note: Note
    ) -> None:  # fmt: skip
        self.failed: Callable[[StorageError], None] = lambda error: _log.error("%s", error)
        self.limiter = limiter
        self._federation = federation
        self._silos = silos
        self._trust = trust
        self._note = note
        self._told = Seldom(_TOLD_EVERY)

    @asynccontextmanager
    async def call(self, context: Context, action: str, *, transfer: bool = False) -> AsyncIterator[Peer]:
        """A call, for as long as it is under way. Aborts that of who may not do this, or takes too much."""
        peer = await self._identify(context, action)
        who = peer.identity.uri
        try:
            with self.limiter.under_way(who, context.peer(), transfer=transfer):
                await _wait(self.limiter.calls(who))
                yield peer
        except TooMuch as reason:
            if self._told.due((who, "too much")):
                _log.warning("%s is refused: %s", _name(peer.identity), reason)
            await asyncio.sleep(_PAUSE)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_name(peer.identity)} is refused: {reason}")

    def answering(
        self, action: str, method: Callable[[Peer, _R, Context], Awaitable[_A]], *, transfer: bool = False
    ) -> Callable[[_R, Context], Awaitable[_A]]:
        """A method with one answer, called for those alone who may do this."""

        async def answer(request: _R, context: Context) -> _A:
            async with self.call(context, action, transfer=transfer) as peer:
                if isinstance(request, bytes):
                    await self.received(peer, len(request))
                return await method(peer, request, context)

        return answer

    def streaming(
        self, action: str, method: Callable[[Peer, _R, Context], AsyncGenerator[_A, None]], *, transfer: bool = False
    ) -> Callable[[_R, Context], AsyncIterator[_A]]:
        """A method with a stream of answers, called for those alone who may do this."""

        async def stream(request: _R, context: Context) -> AsyncIterator[_A]:
            async with (
                self.call(context, action, transfer=transfer) as peer,
                aclosing(method(peer, request, context)) as answers,
            ):
                async for each in answers:
                    yield each

        return stream

    async def allow(self, peer: Peer, action: str, context: Context) -> None:
        """Aborts a call of who may not do this."""
        try:
            require(peer.identity, action)
        except IdentityError as error:
            if self._told.due((peer.serial, action)):
                _log.warning("%s", error.message)
                with suppress(GptflError):  # a log that cannot be written lets nobody do more
                    await self._noted("refused", peer, context, action=action, reason=error.message)
            await asyncio.sleep(_PAUSE)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, error.message)

    async def admit(self, peer: Peer, context: Context) -> None:
        """Aborts the call of a peer whose certificate does not count any more. To be asked with every message."""
        try:
            reason = self.why_not(peer)
        except StorageError as error:
            self.failed(error)
            reason = "the coordinator cannot read its registry"
        if reason == _EXPIRED:  # its owner may have another one by now
            await context.abort(grpc.StatusCode.UNAVAILABLE, reason)
        elif reason:
            if self._told.due((peer.serial, reason)):
                _log.warning("%s is refused: %s", _name(peer.identity), reason)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, reason)

    def why_not(self, peer: Peer) -> str:
        """Why a peer's certificate does not count any more, or "". Raises StorageError."""
        return _EXPIRED if time.time() > peer.expires else self._trust.refusal(peer.serial)

    async def costs(self, peer: Peer, calls: int) -> None:
        """Counts what costs as much as so many calls, and waits where they come too fast."""
        await _wait(self.limiter.calls(peer.identity.uri, calls))

    async def message_came(self, peer: Peer, size: int) -> None:
        """Counts a control message, and waits where they come too fast."""
        who = peer.identity.uri
        await _wait(max(self.limiter.calls(who), self.limiter.received(who, size)))

    async def received(self, peer: Peer, size: int) -> None:
        """Counts bytes of an upload, and waits where they come too fast."""
        await _wait(self.limiter.received(peer.identity.uri, size))

    async def sending(self, peer: Peer, size: int) -> None:
        """Counts bytes of a download, and waits where they would go too fast."""
        await _wait(self.limiter.sent(peer.identity.uri, size))

    async def noted(self, event: str, peer: Peer, context: Context, **fields: str) -> None:
        """Notes what somebody asked for in the audit log, with their certificate. Aborts a call that cannot be."""
        try:
            await self._noted(event, peer, context, **fields)
        except GptflError as error:
            _log.error("the audit log cannot be written: %s", error)
            await context.abort(grpc.StatusCode.INTERNAL, "the coordinator cannot write its audit log")

    async def _noted(self, event: str, peer: Peer, context: Context, **fields: str) -> None:
        by = {"by": peer.identity.uri, "serial": serial_text(peer.serial), "address": str(context.peer())}
        await asyncio.to_thread(self._note, event, **fields, **by)

    async def _identify(self, context: Context, action: str) -> Peer:
        try:
            peer = peer_of(context.auth_context())
        except IdentityError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.message)
        identity = peer.identity
        stranger = identity.role == "coordinator" or (identity.role == "silo" and identity.name not in self._silos)
        if identity.federation != self._federation or stranger:
            await asyncio.sleep(_PAUSE)
            kind = "silo" if identity.role in ("silo", "coordinator") else identity.role
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"the certificate names {identity.uri}, which is no {kind} of the federation {self._federation}",
            )
        await self.admit(peer, context)
        await self.allow(peer, action, context)
        return peer


def _name(identity: Identity) -> str:
    return called(identity.role, identity.name)


async def _wait(seconds: float) -> None:
    if seconds > 0:
        await asyncio.sleep(seconds)

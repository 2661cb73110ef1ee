"""Answers operators and observers from afar (`operator.proto`).

What an action does is somebody else's. Here it is seen to that whoever asks may, that the audit log tells of it before
it is done, and that they hear what came of it. Actions run one at a time in a thread, so that nobody who looks often
takes the coordinator's time from its silos.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from gptfl_dist.errors import GptflError
from gptfl_dist.exchange.base import Wish
from gptfl_dist.exchange.grpc import convert
from gptfl_dist.exchange.grpc import operator_pb2 as pb
from gptfl_dist.exchange.grpc.callers import Callers, Context
from gptfl_dist.exchange.seldom import Seldom
from gptfl_dist.security.authorisation import LOOKS
from gptfl_dist.security.identity import Peer
from gptfl_dist.security.trust import Trust

_log = logging.getLogger(__name__)

ACTIONS = (
    "status", "silos", "operators", "requests", "pause", "resume", "abort", "revoke", "invite", "approve", "renew",
)  # fmt: skip
"""The methods of the service, in small letters."""

_CALLS = 20  # calls of a silo that one action counts as, for it costs about as much
_LOOKS_TOLD_EVERY = 600.0  # seconds between two entries of one who looks again and again


class OperatorService:
    """`act` carries an action out and returns its JSON. Blocking. Raises GptflError."""

    def __init__(self, callers: Callers, trust: Trust, act: Callable[[str, Wish], str]) -> None:
        self.methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            action.capitalize(): grpc.unary_unary_rpc_method_handler(
                callers.answering(action, self._method(action)), response_serializer=pb.Answer.SerializeToString
            )
            for action in ACTIONS
        }
        self._callers = callers
        self._trust = trust
        self._act = act
        self._looks_told = Seldom(_LOOKS_TOLD_EVERY)
        self._one_at_a_time = asyncio.Lock()

    def _method(self, action: str) -> Callable[[Peer, bytes, Context], Any]:
        async def method(peer: Peer, data: bytes, context: Context) -> pb.Answer:
            await self._callers.costs(peer, _CALLS)
            try:
                wish = convert.wish_from_message(pb.Wish.FromString(data))
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request is no Wish")
            if wish.role == "operator" and action in ("invite", "approve"):
                await self._callers.allow(peer, f"{action} an operator", context)
            if action not in LOOKS or self._looks_told.due((peer.serial, action)):
                told = {name: value for name, value in wish.told().items() if value}
                await self._callers.noted("asked from afar", peer, context, action=action, **told)
            async with self._one_at_a_time:
                await self._callers.admit(peer, context)  # it may have waited
                return await self._done(peer, action, wish, context)

        return method

    async def _done(self, peer: Peer, action: str, wish: Wish, context: Context) -> pb.Answer:
        try:
            if action == "renew":
                renewed = await asyncio.to_thread(self._trust.renew, peer.identity, wish.request.encode())
                certificate, authority = (pem.decode() for pem in renewed)
                return pb.Answer(result=json.dumps({"certificate": certificate, "authority": authority}))
            return pb.Answer(result=await asyncio.to_thread(self._act, action, wish))
        except GptflError as error:
            if action not in LOOKS:
                _log.warning("%s could not %s: %s", peer.identity.uri, action, error.message)
                await self._callers.noted("not done", peer, context, action=action, reason=error.message)
            return pb.Answer(fault=pb.Fault(error=type(error).__name__, message=error.message, hint=error.hint))

"""An operator's or observer's end of `operator.proto`: one connection, one question after the other."""

from __future__ import annotations

from typing import Self

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from gptfl_dist import errors
from gptfl_dist.errors import ConnectionFailed, GptflError, ProtocolError
from gptfl_dist.exchange.base import Disconnected, Wish
from gptfl_dist.exchange.grpc import convert
from gptfl_dist.exchange.grpc import operator_pb2 as pb
from gptfl_dist.exchange.grpc.client import channel_to, guard
from gptfl_dist.exchange.grpc.health import HEALTH, OPERATOR
from gptfl_dist.security.authority import Credentials
from gptfl_dist.security.credentials import require_own_current
from gptfl_dist.security.handshake import shake_hands
from gptfl_dist.security.identity import Identity

_PATIENCE = 60.0  # seconds for an answer; a busy coordinator may take some
_KEEPALIVE = 30.0  # seconds


class OperatorClient:
    """A line to the coordinator; `async with` opens and closes it. Each call raises ConnectionFailed."""

    def __init__(self, address: str, credentials: Credentials, own: Identity) -> None:
        self._address = address
        self._credentials = credentials
        self._own = own

    async def __aenter__(self) -> Self:
        require_own_current(self._credentials.certificate, f"the certificate of the {self._own.role} {self._own.name}")
        self._channel = channel_to(self._address, self._credentials, _KEEPALIVE)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def ask(self, action: str, wish: Wish) -> str:
        """The JSON that comes of an action. Raises what it ended with at the coordinator."""
        method: grpc.aio.UnaryUnaryMultiCallable[pb.Wish, pb.Answer] = self._channel.unary_unary(
            f"/{OPERATOR}/{action.capitalize()}", pb.Wish.SerializeToString, pb.Answer.FromString
        )
        try:
            answer = await guard(lambda: method(convert.wish_to_message(wish), timeout=_PATIENCE))
        except Disconnected as broken:
            raise await self._why(broken) from None
        if answer.HasField("fault"):
            raise error_in(answer.fault)
        return answer.result

    async def takes_silos(self) -> bool:
        """Whether the coordinator's health service says that it serves."""
        method: grpc.aio.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]
        method = self._channel.unary_unary(
            f"/{HEALTH}/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = await guard(lambda: method(health_pb2.HealthCheckRequest(), timeout=_PATIENCE))
        except Disconnected as broken:
            raise await self._why(broken) from None
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def _why(self, broken: Disconnected) -> ConnectionFailed:
        """What keeps an answer away, in better words than gRPC's where a handshake finds them."""
        try:
            await shake_hands(self._address, self._credentials)
        except ConnectionFailed as error:
            return error
        return ConnectionFailed(f"{self._address} gives no answer: {broken}", hint="try again in a moment")


def error_in(fault: pb.Fault) -> GptflError:
    """The error that an action ended with at the coordinator."""
    kind = getattr(errors, fault.error, None) if fault.error in errors.__all__ else None
    if not isinstance(kind, type) or not issubclass(kind, GptflError):
        kind = ProtocolError
    return kind(convert.legible(fault.message), hint=convert.legible(fault.hint))

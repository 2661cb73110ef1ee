"""The health service of gRPC (grpc.health.v1) on the coordinator's port, for whoever has a certificate that counts.

"" and `gptfl.v1.Exchange` are SERVING exactly while silos are taken, `gptfl.v1.Operator` while operators are answered.
Check alone is offered: a Watch would be a stream that nobody ends.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1.health import OVERALL_HEALTH, aio
from grpc_health.v1.health import SERVICE_NAME as HEALTH

from gptfl_dist.exchange.grpc.callers import Callers, Context
from gptfl_dist.security.identity import Peer

__all__ = ["EXCHANGE", "HEALTH", "OPERATOR", "Health"]

EXCHANGE, OPERATOR = "gptfl.v1.Exchange", "gptfl.v1.Operator"

_STATES = {True: pb.HealthCheckResponse.SERVING, False: pb.HealthCheckResponse.NOT_SERVING}


class Health:
    """What the port tells of its services."""

    def __init__(self, callers: Callers) -> None:
        self._answers = aio.HealthServicer()
        check = callers.answering("ask for health", self._check)
        self.methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Check": grpc.unary_unary_rpc_method_handler(
                check, response_serializer=pb.HealthCheckResponse.SerializeToString
            )
        }

    async def takes_silos(self, yes: bool) -> None:
        for name in (OVERALL_HEALTH, EXCHANGE):
            await self._answers.set(name, _STATES[yes])

    async def answers_operators(self) -> None:
        await self._answers.set(OPERATOR, _STATES[True])

    async def over(self) -> None:
        """The port is about to close: nothing is served any more."""
        await self._answers.enter_graceful_shutdown()

    async def _check(self, peer: Peer, data: bytes, context: Context) -> pb.HealthCheckResponse:
        try:
            asked = pb.HealthCheckRequest.FromString(data)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request is no HealthCheckRequest")
        answer: pb.HealthCheckResponse = await self._answers.Check(asked, context)
        return answer

"""The coordinator's one port: mutual TLS 1.3, and behind it the services for silos, operators and probes.

It is open from the coordinator's first second on. Silos are taken once there is an exchange, which is when the model
is there; those that dial before are told so, and dial again by themselves. The certificate that the port shows is asked
for before each handshake, so it can be renewed in between.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeAlias

import grpc
import grpc.aio

from gptfl_dist.config.wire import Limits
from gptfl_dist.errors import GptflError, LaunchError
from gptfl_dist.exchange.grpc import frames
from gptfl_dist.exchange.grpc.callers import Callers, Context, Note
from gptfl_dist.exchange.grpc.health import EXCHANGE, HEALTH, OPERATOR, Health
from gptfl_dist.exchange.grpc.options import WIDEST, line_options
from gptfl_dist.exchange.limits import Limiter
from gptfl_dist.security.authority import Credentials
from gptfl_dist.security.identity import Peer
from gptfl_dist.security.trust import Trust

_log = logging.getLogger(__name__)

Methods: TypeAlias = "Mapping[str, grpc.RpcMethodHandler[Any, Any]]"

UPLOAD_CHUNK = 1 << 20
_UNDER_WAY = 16 << 20  # bytes of chunks of all silos together: with many silos each sends smaller ones
_CONTROL_LIMIT = 64 << 20  # a layout of a very large model; payloads are bounded by the chunk
_CALLS = 16  # of one connection at a time; a silo needs four
_IDLE = 60.0  # seconds after which a connection without a call is closed


class Port:
    """Binds an address. `note` writes the audit log."""

    def __init__(
        self, *, listen: str, trust: Trust, federation: str, silos: tuple[str, ...], limits: Limits, keepalive: float,
        note: Note,
    ) -> None:  # fmt: skip
        self.number = 0
        self.silos = silos
        self.trust = trust
        self.callers = Callers(federation=federation, silos=silos, trust=trust, limiter=Limiter(limits), note=note)
        self.health = Health(self.callers)
        self.upload_chunk = max(64 << 10, min(UPLOAD_CHUNK, _UNDER_WAY // len(silos) // 4096 * 4096))
        self._listen = listen
        self._keepalive = keepalive
        self._services = _Services(self.callers)
        self.serve(HEALTH, self.health.methods)
        self._shown = trust.credentials()
        self._server: grpc.aio.Server | None = None

    def chunk(self, wanted: int) -> int:
        """Bytes of a chunk of weights: as many as are wanted, or fewer where there are many silos."""
        return min(wanted, self.upload_chunk) if len(self.silos) * UPLOAD_CHUNK > _UNDER_WAY else wanted

    def serve(self, service: str, methods: Methods) -> None:
        """Answers a service's calls from now on, also where the port is open already."""
        self._services.methods[service] = methods

    async def open(self) -> None:
        """Binds the address, unless that was done; `number` is then the port in use. Raises LaunchError."""
        if self._server is not None:
            return
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", UPLOAD_CHUNK + frames.MAX_OVERHEAD),
                ("grpc.max_concurrent_streams", _CALLS),
                ("grpc.max_connection_idle_ms", int(1000 * _IDLE)),
                ("grpc.max_send_message_length", _CONTROL_LIMIT),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", int(500 * self._keepalive)),
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.so_reuseport", 0),
                *line_options(self._keepalive, min(WIDEST, 2 * self.upload_chunk)),
            ]
        )
        self._server.add_generic_rpc_handlers((self._services,))
        secrets = grpc.dynamic_ssl_server_credentials(
            _configuration(self._shown),
            self._new_configuration,  # type: ignore[arg-type]  # the stubs do not know of None
            require_client_authentication=True,
        )
        try:
            self.number = self._server.add_secure_port(self._listen, secrets)
        except RuntimeError:
            self.number = 0
        if self.number == 0:
            raise LaunchError(
                f"cannot listen on {self._listen}: the port is in use, or the address is not this machine's",
                hint="stop the process that holds it, or set exchange.listen to another port (0 takes any free one)",
            )
        await self.health.takes_silos(False)
        if OPERATOR in self._services.methods:
            await self.health.answers_operators()
        await self._server.start()

    async def close(self) -> None:
        """Lets calls that are about to end do so, ends the others, and gives the address back."""
        if self._server is not None:
            await self.health.over()
            await self._server.stop(grace=2.0)

    def _new_configuration(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC asks before each handshake: the certificate to show from now on, None for the one it has."""
        try:
            now = self.trust.credentials()
        except GptflError as error:
            _log.error("the coordinator's certificate cannot be renewed: %s", error)
            return None
        if now is self._shown:
            return None
        self._shown = now
        return _configuration(now)


class _Services(grpc.GenericRpcHandler):
    """The methods of all services of the port, looked up with each call."""

    def __init__(self, callers: Callers) -> None:
        self.methods: dict[str, Methods] = {}
        self._not_yet: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
            callers.answering("take part", _not_yet)
        )

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        service, _, method = str(handler_call_details.method).removeprefix("/").partition("/")
        if service == EXCHANGE and EXCHANGE not in self.methods:
            return self._not_yet
        return self.methods.get(service, {}).get(method)


async def _not_yet(peer: Peer, requests: AsyncIterator[bytes], context: Context) -> bytes:
    await context.abort(
        grpc.StatusCode.ABORTED, "the coordinator takes no silos yet: it prepares the model; dial again later"
    )


def _configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(credentials.key, credentials.certificate)], root_certificates=credentials.authority
    )

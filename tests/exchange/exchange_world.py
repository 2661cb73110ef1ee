"""A federation of real sockets and real TLS on 127.0.0.1, in one event loop."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import numpy as np

from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.config.task import Model, Task
from gptfl_dist.config.wire import Limits
from gptfl_dist.exchange.base import ExchangeEvent, Goodbye, SiloConnected, SiloJoined, UpdateHeader, Welcome
from gptfl_dist.exchange.grpc.callers import Note
from gptfl_dist.exchange.grpc.client import GrpcSiloExchange
from gptfl_dist.exchange.grpc.port import Port
from gptfl_dist.exchange.grpc.server import GrpcCoordinatorExchange
from gptfl_dist.exchange.inbox import Inbox, Spool
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.security.authority import Authority, Credentials
from gptfl_dist.security.epoch import FIRST, Epoch
from gptfl_dist.security.trust import FixedTrust, Trust
from gptfl_dist.weights import ITEM_SIZE, Layout, WeightsFile, write_weights

HOST = "127.0.0.1"
PLAN = Plan(federation="fed", seed=1, labels=["cat", "dog"], task=Task(), model=Model())
TRAINING = LocalTraining(
    epochs=1, batch_size=8, learning_rate=0.1, momentum=0.0, weight_decay=0.0, augmentation=False, threads=1
)
AUTHORITY = Authority.new("fed", valid=timedelta(days=1))
COORDINATOR = AUTHORITY.issue_coordinator([HOST])
SILOS = {name: AUTHORITY.issue_silo(name) for name in ("alice", "bob")}
LIMITS = Limits()
SMALL = Layout.of([("b", (7,), "F16"), ("w", (1000,), "F32")])
LARGE = Layout.of([("w", (2 << 20,), "F32")])  # 8 MiB


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs an async test, for a minute at most."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), 60))

    return run


def random_weights(path: Path, layout: Layout, seed: int) -> tuple[WeightsFile, str, bytes]:
    """An open weights file of random numbers, its digest, its bytes."""
    numbers = np.random.default_rng(seed)
    flat = b"".join(
        numbers.standard_normal(spec.shape).astype(f"<f{ITEM_SIZE[spec.dtype]}").tobytes() for spec in layout.tensors
    )
    digest = write_weights(path, layout, [flat])
    return WeightsFile(path), digest, flat


def flat_of(path: Path) -> bytes:
    """The bytes of the weights in a file."""
    with WeightsFile(path) as file:
        return file.read(0, file.nbytes)


def whole(spool: Spool) -> bytes:
    """All bytes of a spool."""
    content = bytearray(spool.size)
    spool.read_into(0, memoryview(content))
    return bytes(content)


def train_order(nonce: str, base: str, round_: int = 1) -> Order:
    return Order("train", nonce, "gptfl", round_, base, 60.0, TRAINING)


def header_of(order: Order, layout: Layout, digest: str, **metrics: float) -> UpdateHeader:
    return UpdateHeader(Report(order.nonce, 10, metrics), order.base, layout.digest, digest, layout.nbytes)


def port_of(
    trust: Trust, *, listen: str = f"{HOST}:0", silos: tuple[str, ...] = tuple(SILOS), keepalive: float = 30.0,
    limits: Limits = LIMITS, note: Note = lambda event, **fields: None,
) -> Port:  # fmt: skip
    """A port of the federation, not open yet."""
    return Port(
        listen=listen, trust=trust, federation="fed", silos=silos, limits=limits, keepalive=keepalive, note=note
    )


class World:
    """A coordinator that listens; `async with` opens and closes it and every silo made by `silo`."""

    def __init__(
        self, folder: Path, layout: Layout = SMALL, *, chunk: int = 1 << 20, credentials: Credentials = COORDINATOR,
        plan: Plan = PLAN, keepalive: float = 30.0, trust: Trust | None = None, limits: Limits = LIMITS,
        epoch: Epoch = FIRST,
    ) -> None:  # fmt: skip
        self.layout = layout
        self.plan = plan
        self.epoch = epoch
        self.commits: list[tuple[str, Order, Report, str]] = []
        self.connected: list[SiloConnected] = []
        self.inbox = Inbox(
            folder / "spools", layout, dict.fromkeys(SILOS, 1000), lambda *commit: self.commits.append(commit)
        )
        self.audited: list[tuple[str, dict[str, str]]] = []
        self.port = port_of(
            trust or FixedTrust(credentials),
            keepalive=keepalive,
            limits=limits,
            note=lambda event, **fields: self.audited.append((event, fields)),
        )
        self.server = GrpcCoordinatorExchange(port=self.port, inbox=self.inbox, chunk=chunk)
        self._keepalive = keepalive
        self._silos: list[GrpcSiloExchange] = []

    async def __aenter__(self) -> Self:
        await self.server.open(Welcome("run-1", self.plan, self.layout, self.epoch))
        return self

    async def __aexit__(self, *_: object) -> None:
        for silo in self._silos:
            await silo.close()
        await self.server.close(Goodbye(True, "test over"))
        self.inbox.close()

    def silo(self, name: str = "alice", *, port: int = 0, credentials: Credentials | None = None) -> GrpcSiloExchange:
        silo = dial(port or self.server.port, credentials or SILOS[name], keepalive=self._keepalive)
        self._silos.append(silo)
        return silo

    async def joined(self, name: str = "alice", *, port: int = 0) -> GrpcSiloExchange:
        """A silo that is connected and ready."""
        silo = self.silo(name, port=port)
        await silo.connect()
        await silo.ready()
        assert await self.event() == SiloJoined(name)
        return silo

    async def give(self, name: str, order: Order) -> None:
        """Expects the answer to an order and gives it."""
        self.inbox.expect(name, order)
        await self.server.send(name, order)

    async def event(self) -> ExchangeEvent:
        while isinstance(event := await asyncio.wait_for(self.server.events.get(), 20), SiloConnected):
            self.connected.append(event)
        return event

    async def settled(self, seconds: float = 0.2) -> list[ExchangeEvent]:
        """The events that have come once nothing more is under way."""
        await asyncio.sleep(seconds)
        events = [self.server.events.get_nowait() for _ in range(self.server.events.qsize())]
        self.connected += [event for event in events if isinstance(event, SiloConnected)]
        return [event for event in events if not isinstance(event, SiloConnected)]


def dial(port: int, credentials: Credentials, host: str = HOST, keepalive: float = 30.0) -> GrpcSiloExchange:
    return GrpcSiloExchange(address=f"{host}:{port}", credentials=credentials, keepalive=keepalive)

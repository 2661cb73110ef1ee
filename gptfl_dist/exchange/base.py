"""The exchange: carrying weights out and updates back, whatever the wire.

A wire implements two small interfaces, one a side. The coordinator's side turns what happens on the wire into events
on one queue; the silo's side is a sequence of calls, any of which raises Disconnected when the wire broke and the
silo should connect again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from gptfl_dist.config.plan import Plan
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.security.epoch import FIRST, Epoch
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.signing import statement
from gptfl_dist.weights import FlatReader, Layout, WeightsFile

PROTOCOL_VERSION = 3


class Disconnected(Exception):
    """The wire broke. Connecting again may help."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a silo learns when it connects."""

    run: str
    plan: Plan
    layout: Layout
    epoch: Epoch = FIRST


@dataclass(frozen=True, slots=True)
class Recalled:
    """An order is no longer wanted."""

    nonce: str
    reason: str


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The coordinator closes: for good where the run is finished."""

    finished: bool
    reason: str


@dataclass(frozen=True, slots=True)
class UpdateHeader:
    """What a silo says of an update before it sends it: digests in hex, size in bytes, the epoch of its order."""

    report: Report
    base: str
    layout: str
    digest: str
    size: int
    epoch: int = 1

    def statement(self, sender: Identity, run: str) -> str:
        """What the silo signs: that it delivers this update, to this order, of this run."""
        report = self.report
        return statement(
            "update", sender=sender.uri, run=run, epoch=self.epoch, nonce=report.nonce, base=self.base,
            layout=self.layout, digest=self.digest, size=self.size, samples=report.samples,
            metrics=dict(report.metrics),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Receipt:
    """Whether an update was committed, and if not, why."""

    committed: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a line comes from: the address, and what the certificate says where one was shown.

    `serial` is the certificate's serial number in hex, `fingerprint` its SHA-256.
    """

    address: str
    identity: str = ""
    serial: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Wish:
    """What an operator from afar asks an action to be done with; each action reads what it needs.

    `file` is what the operator calls its own file; `key` a fingerprint, `request` a certificate request, PEM.
    """

    file: str = ""
    role: str = ""
    name: str = ""
    serial: str = ""
    reason: str = ""
    key: str = ""
    seconds: float = 0.0
    request: str = ""

    def told(self) -> dict[str, str]:
        """What of it an audit log is to tell."""
        return {
            "role": self.role,
            "name": self.name,
            "serial_asked": self.serial,
            "reason": self.reason,
            "key": self.key,
        }


@dataclass(frozen=True, slots=True)
class SiloConnected:
    """A silo is there. It takes orders once it has joined."""

    silo: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class SiloJoined:
    """A silo is ready for orders."""

    silo: str


@dataclass(frozen=True, slots=True)
class SiloLeft:
    """A silo's connection is gone."""

    silo: str


@dataclass(frozen=True, slots=True)
class SiloBarred:
    """A silo's certificates were revoked: it is cut off, and will not come back unless it is invited again."""

    silo: str
    reason: str


@dataclass(frozen=True, slots=True)
class Answered:
    """A silo's answer to an order was accepted and, where it is an update, committed."""

    silo: str
    nonce: str


@dataclass(frozen=True, slots=True)
class OrderFailed:
    """A silo could not carry out an order, or its update was refused."""

    silo: str
    nonce: str
    reason: str


@dataclass(frozen=True, slots=True)
class SiloProgress:
    """How far a silo's training is, or what it waits for."""

    silo: str
    nonce: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class ExchangeFailed:
    """The coordinator's side cannot take updates any more, as on a full disk."""

    error: BaseException


ExchangeEvent = (
    SiloConnected | SiloJoined | SiloLeft | SiloBarred | Answered | OrderFailed | SiloProgress | ExchangeFailed
)


@dataclass(slots=True)
class Traffic:
    """Bytes of weights and updates carried since the start, as they travelled, without framing."""

    down: int = 0
    up: int = 0


class CoordinatorExchange(Protocol):
    """The coordinator's end of a wire."""

    transport: str
    events: asyncio.Queue[ExchangeEvent]
    traffic: Traffic

    async def open(self, welcome: Welcome) -> None:
        """Lets silos in. Raises LaunchError where the wire cannot be had (a port in use, a world of one rank)."""

    async def publish(self, bases: Mapping[str, WeightsFile]) -> None:
        """Makes these weights, by digest, available to the silos, and no others: the bases of all open orders."""

    async def send(self, silo: str, order: Order) -> None:
        """Gives a silo an order. A silo that is not connected gets nothing."""

    async def recall(self, silo: str, nonce: str, reason: str) -> None:
        """Tells a silo that an order is no longer wanted."""

    async def close(self, goodbye: Goodbye) -> None:
        """Says goodbye to every silo and ends the wire."""


@runtime_checkable
class Reducing(Protocol):
    """A coordinator's end that sums updates on their way. Silos then report, and their updates are never here."""

    async def reduce(self, silos: tuple[str, ...]) -> FlatReader:
        """The sum of the updates of these silos, each times its samples; of integers the largest increase."""


class SiloExchange(Protocol):
    """A silo's end of a wire. Each call raises Disconnected where the wire broke."""

    async def connect(self) -> Welcome:
        """Raises ConnectionFailed where trying again is of no use."""

    async def ready(self) -> None:
        """Says that the model is built and fits the layout: orders may come."""

    async def receive(self) -> Order | Recalled | Goodbye:
        """The next word of the coordinator."""

    async def download(self, digest: str, layout: Layout, path: Path) -> None:
        """Fetches weights into a weights file, in place of those that lie there: there are none until all arrived.

        Raises ProtocolError if the content is not what `digest` says.
        """

    async def upload(self, header: UpdateHeader, update: WeightsFile) -> Receipt:
        """Brings an update, from the byte where an earlier try of the same update broke off."""

    async def report(self, report: Report) -> None:
        """Answers an evaluation."""

    async def progress(self, nonce: str, done: int, total: int, note: str = "") -> None:
        """Tells how far the training is, or in words what it waits for."""

    async def fail(self, nonce: str, reason: str) -> None:
        """Tells that an order cannot be carried out."""

    async def close(self) -> None:
        """Ends the wire."""

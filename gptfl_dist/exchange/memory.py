"""The exchange without a wire: coordinator and silos in one event loop, for tests, with faults where they are wanted.

A `MemoryNetwork` joins one coordinator at a time with any number of silos and outlives either side, so that a test can
drop one and start it anew. Updates go through the real inbox. A fault waits at a step of an order's way:

    order (the silo hears it) -> download -> upload -> half (of the update is there) -> sent (all of it)
        -> committed (nobody was told yet) -> receipt (the silo alone was not told yet), or refused (likewise)

or, for an evaluation, report in place of upload and what follows.

`hold` stops the order there until it is released, which makes a silo late; `cut` breaks the silo's line there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gptfl_dist.errors import ConnectionFailed, StorageError
from gptfl_dist.exchange.base import (
    Answered,
    Disconnected,
    ExchangeEvent,
    ExchangeFailed,
    Goodbye,
    OrderFailed,
    Origin,
    Recalled,
    Receipt,
    SiloBarred,
    SiloConnected,
    SiloJoined,
    SiloLeft,
    SiloProgress,
    Traffic,
    UpdateHeader,
    Welcome,
)
from gptfl_dist.exchange.inbox import Busy, Inbox, Refused, Superseded
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.weights import BLOCK, Layout, WeightsFile, write_weights

Step = Literal["order", "download", "upload", "half", "sent", "committed", "receipt", "refused", "report"]


@dataclass(eq=False)
class Fault:
    """Happens once: `reached` is set when the order comes to its step; a held one goes on once it is released."""

    silo: str
    step: Step
    round: int
    arm: str | None
    cuts: bool
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    _released: asyncio.Event = field(default_factory=asyncio.Event)

    def meets(self, step: Step, silo: str, order: Order) -> bool:
        return (self.silo, self.step, self.round) == (silo, step, order.round) and self.arm in (None, order.arm)

    def release(self) -> None:
        self._released.set()

    async def happen(self) -> None:
        """Raises Disconnected where the fault breaks the line."""
        self.reached.set()
        if self.cuts:
            raise Disconnected(f"the line was cut at the step {self.step!r}")
        await self._released.wait()


class MemoryNetwork:
    """What lies between the two sides."""

    def __init__(self) -> None:
        self._coordinator: MemoryCoordinatorExchange | None = None
        self._listening = asyncio.Event()
        self._faults: list[Fault] = []
        self._given: dict[str, Order] = {}  # by nonce

    def hold(self, silo: str, step: Step, *, round: int, arm: str | None = None) -> Fault:
        """Stops a silo's order at a step; `arm` None means any arm."""
        self._faults.append(Fault(silo, step, round, arm, cuts=False))
        return self._faults[-1]

    def cut(self, silo: str, step: Step, *, round: int, arm: str | None = None) -> Fault:
        """Breaks a silo's line at a step; the silo may connect again at once."""
        self._faults.append(Fault(silo, step, round, arm, cuts=True))
        return self._faults[-1]

    def drop_coordinator(self) -> None:
        """The coordinator is gone without a word, as after a kill: every line breaks."""
        if self._coordinator is not None:
            self._coordinator.vanish()

    def attach(self, coordinator: MemoryCoordinatorExchange) -> None:
        """From now on silos connect to this coordinator."""
        self._coordinator = coordinator
        self._listening.set()

    def detach(self, coordinator: MemoryCoordinatorExchange) -> None:
        """This coordinator takes no more connections."""
        if self._coordinator is coordinator:
            self._coordinator = None
            self._listening.clear()

    async def coordinator(self) -> MemoryCoordinatorExchange:
        """Waits for a coordinator."""
        while self._coordinator is None:
            await self._listening.wait()
        return self._coordinator

    def give(self, order: Order) -> None:
        """An order sets out."""
        self._given[order.nonce] = order

    async def reach(self, step: Step, silo: str, nonce: str) -> None:
        """An order has come to a step of its way: what was arranged for it happens. Raises Disconnected."""
        order = self._given.get(nonce)
        fault = next((fault for fault in self._faults if order is not None and fault.meets(step, silo, order)), None)
        if fault is not None:
            self._faults.remove(fault)
            await fault.happen()


@dataclass(eq=False)
class _Line:
    """A silo's connection. None among the words means that it broke."""

    words: asyncio.Queue[Order | Recalled | Goodbye | None] = field(default_factory=asyncio.Queue)
    ready: bool = False
    broken: bool = False

    def break_off(self) -> None:
        self.broken = True
        self.words.put_nowait(None)


class MemoryCoordinatorExchange:
    """See `CoordinatorExchange`. `silos` are the names that may connect."""

    transport = "memory"

    def __init__(self, *, network: MemoryNetwork, silos: tuple[str, ...], inbox: Inbox) -> None:
        self.events: asyncio.Queue[ExchangeEvent] = asyncio.Queue()
        self.traffic = Traffic()
        self._network = network
        self._silos = silos
        self._inbox = inbox
        self._lines: dict[str, _Line] = {}
        self._published: dict[str, WeightsFile] = {}
        self._welcome: Welcome | None = None
        self._checks: set[asyncio.Task[Receipt]] = set()

    async def open(self, welcome: Welcome) -> None:
        self._welcome = welcome
        self._network.attach(self)

    async def publish(self, bases: Mapping[str, WeightsFile]) -> None:
        self._published = dict(bases)

    async def send(self, silo: str, order: Order) -> None:
        self._network.give(order)
        if silo in self._lines:
            self._lines[silo].words.put_nowait(order)

    async def recall(self, silo: str, nonce: str, reason: str) -> None:
        if silo in self._lines:
            self._lines[silo].words.put_nowait(Recalled(nonce, reason))

    async def close(self, goodbye: Goodbye) -> None:
        for line in self._lines.values():
            line.words.put_nowait(goodbye)
        self.vanish()
        # A check reads its spool in a thread, which nothing can stop; the caller closes the spools next.
        await asyncio.gather(*self._checks, return_exceptions=True)

    def vanish(self) -> None:
        """Breaks every line; nobody connects any more."""
        self._network.detach(self)
        for line in self._lines.values():
            line.break_off()
        self._lines.clear()

    def admit(self, silo: str) -> tuple[Welcome, _Line]:
        """A silo connects. Raises ConnectionFailed for one that the federation does not have."""
        if silo not in self._silos:
            raise ConnectionFailed(f"{silo} is no silo of this federation", hint="name it under silos")
        if silo in self._lines:
            self._lines[silo].break_off()
        assert self._welcome is not None
        line = self._lines[silo] = _Line()
        self.events.put_nowait(SiloConnected(silo, Origin("memory")))
        return self._welcome, line

    def leave(self, silo: str, line: _Line) -> None:
        """A silo's line breaks."""
        line.break_off()
        if self._lines.get(silo) is line:
            del self._lines[silo]
            self.events.put_nowait(SiloLeft(silo))

    def make_ready(self, silo: str, line: _Line) -> None:
        if not line.ready:
            line.ready = True
            self.events.put_nowait(SiloJoined(silo))

    def hand_out(self, digest: str, path: Path) -> None:
        """Copies published weights to a silo. Raises Disconnected for others."""
        weights = self._published.get(digest)
        if weights is None:
            raise Disconnected(f"the weights {digest[:12]!r} are not handed out now")
        blocks = (weights.read(start, min(BLOCK, weights.nbytes - start)) for start in range(0, weights.nbytes, BLOCK))
        write_weights(path, weights.layout, blocks)
        self.traffic.down += weights.nbytes

    async def take(self, silo: str, header: UpdateHeader, update: WeightsFile) -> Receipt:
        """Takes an update as a real wire does, in two parts. Raises Disconnected."""
        nonce = header.report.nonce
        try:
            offset, committed = self._inbox.announce(silo, header)
            if committed:
                return Receipt(True)
            spool = self._inbox.spool(silo, nonce)
            ticket = spool.claim()
            middle = header.size // 2
            for start, stop in ((offset, max(offset, middle)), (max(offset, middle), header.size)):
                spool.write(ticket, start, memoryview(update.read(start, stop - start)))
                self.traffic.up += stop - start
                await self._network.reach("half" if stop < header.size else "sent", silo, nonce)
            # The check goes on where the silo hangs up meanwhile: what it commits must be told.
            check = asyncio.create_task(self._check(silo, nonce))
            self._checks.add(check)
            check.add_done_callback(self._checked)
            return await asyncio.shield(check)
        except (Busy, Superseded):
            raise Disconnected("an upload of this update is under way; ask again") from None
        except StorageError as error:
            self.events.put_nowait(ExchangeFailed(error))
            raise Disconnected("the coordinator cannot store the update") from None
        except Refused as refusal:
            self.give_up(silo, nonce, f"refused: {refusal}")
            return Receipt(False, str(refusal))

    async def _check(self, silo: str, nonce: str) -> Receipt:
        try:
            await asyncio.to_thread(self._inbox.finish, silo, nonce)
        except Refused as refusal:
            self.give_up(silo, nonce, f"refused: {refusal}")
            return Receipt(False, str(refusal))
        try:
            await self._network.reach("committed", silo, nonce)
        finally:
            self.events.put_nowait(Answered(silo, nonce))
        return Receipt(True)

    def _checked(self, check: asyncio.Task[Receipt]) -> None:
        self._checks.discard(check)
        if not check.cancelled():
            check.exception()  # told by `take`, if anybody still waits for it

    def answer(self, silo: str, report: Report) -> None:
        """Takes the answer to an evaluation."""
        awaited = self._inbox.awaits(silo, report.nonce)
        try:
            self._inbox.accept(silo, report)
        except Refused as refusal:
            self.give_up(silo, report.nonce, f"refused: {refusal}")
        except StorageError as error:
            self.events.put_nowait(ExchangeFailed(error))
        else:
            if awaited:
                self.events.put_nowait(Answered(silo, report.nonce))

    def note_progress(self, silo: str, nonce: str, done: int, total: int, note: str) -> None:
        if self._inbox.awaits(silo, nonce):
            self.events.put_nowait(SiloProgress(silo, nonce, done, total, note))

    def bar(self, silo: str, reason: str) -> None:
        """Cuts a silo off as one whose certificates were revoked; that it connects again says that it may."""
        self.events.put_nowait(SiloBarred(silo, reason))
        if (nonce := self._inbox.owed(silo)) is not None:
            self.give_up(silo, nonce, f"refused: {reason}")
        if silo in self._lines:
            self.leave(silo, self._lines[silo])

    def give_up(self, silo: str, nonce: str, reason: str) -> None:
        """Tells that an order failed, once. What a silo says of orders that are not open changes nothing."""
        if self._inbox.fail(silo, nonce):
            self.events.put_nowait(OrderFailed(silo, nonce, reason))


class MemorySiloExchange:
    """See `SiloExchange`. `connect` waits for a coordinator."""

    def __init__(self, *, network: MemoryNetwork, silo: str) -> None:
        self._network = network
        self._silo = silo
        self._coordinator: MemoryCoordinatorExchange | None = None
        self._line: _Line | None = None
        self._nonce = ""  # of the newest order

    async def connect(self) -> Welcome:
        self._coordinator = await self._network.coordinator()
        welcome, self._line = self._coordinator.admit(self._silo)
        return welcome

    async def ready(self) -> None:
        coordinator, line = self._opened()
        coordinator.make_ready(self._silo, line)

    async def receive(self) -> Order | Recalled | Goodbye:
        if self._line is None:
            raise Disconnected("not connected")
        # A goodbye may lie before the break.
        word = await self._line.words.get()
        if word is None:
            raise Disconnected("the coordinator is gone")
        if isinstance(word, Order):
            self._nonce = word.nonce
            await self._reach("order", word.nonce)
        return word

    async def download(self, digest: str, layout: Layout, path: Path) -> None:
        await self._reach("download", self._nonce)
        self._opened()[0].hand_out(digest, path)

    async def upload(self, header: UpdateHeader, update: WeightsFile) -> Receipt:
        await self._reach("upload", header.report.nonce)
        coordinator, line = self._opened()
        try:
            receipt = await coordinator.take(self._silo, header, update)
            step: Step = "receipt" if receipt.committed else "refused"
            await self._network.reach(step, self._silo, header.report.nonce)
        except Disconnected:
            coordinator.leave(self._silo, line)
            raise
        self._opened()  # a receipt does not come over a broken line
        return receipt

    async def report(self, report: Report) -> None:
        await self._reach("report", report.nonce)
        self._opened()[0].answer(self._silo, report)

    async def progress(self, nonce: str, done: int, total: int, note: str = "") -> None:
        self._opened()[0].note_progress(self._silo, nonce, done, total, note)

    async def fail(self, nonce: str, reason: str) -> None:
        self._opened()[0].give_up(self._silo, nonce, reason)

    async def close(self) -> None:
        if self._coordinator is not None and self._line is not None:
            self._coordinator.leave(self._silo, self._line)
        self._coordinator = self._line = None

    def _opened(self) -> tuple[MemoryCoordinatorExchange, _Line]:
        if self._coordinator is None or self._line is None or self._line.broken:
            raise Disconnected("not connected")
        return self._coordinator, self._line

    async def _reach(self, step: Step, nonce: str) -> None:
        coordinator, line = self._opened()
        try:
            await self._network.reach(step, self._silo, nonce)
        except Disconnected:
            coordinator.leave(self._silo, line)
            raise

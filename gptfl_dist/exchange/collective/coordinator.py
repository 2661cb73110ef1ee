"""The coordinator's end of a collective exchange: weights by broadcast, updates whole or reduced, messages as JSON.

`exact`: updates arrive whole, one after the other, in the inbox and are aggregated by the same code as over gRPC, so
the weights are the same bit for bit. `fast`: a silo's update stays at its rank, which checks it and reports; once the
round is complete, one reduction over all ranks leaves the sum of what counts here, weighted by samples.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import asdict

from gptfl_dist.errors import ModelError
from gptfl_dist.exchange.base import (
    Answered,
    ExchangeEvent,
    ExchangeFailed,
    Goodbye,
    OrderFailed,
    Origin,
    SiloConnected,
    SiloJoined,
    SiloProgress,
    Traffic,
    UpdateHeader,
    Welcome,
)
from gptfl_dist.exchange.collective.base import DEPTH, SEGMENT, Collective, Message, completed, pipelined
from gptfl_dist.exchange.collective.reduction import ReducedUpdate, unreducible
from gptfl_dist.exchange.inbox import Inbox, Refused, Spool
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.weights import Layout, WeightsFile

_TIME_TO_PART = 5.0  # seconds that the ranks have to say goodbye too


class CollectiveCoordinatorExchange:
    """See `CoordinatorExchange`. `ranks` is the rank that speaks for each silo; updates come whole."""

    def __init__(self, *, collective: Collective, ranks: Mapping[str, int], inbox: Inbox) -> None:
        self.transport = collective.transport
        self.events: asyncio.Queue[ExchangeEvent] = asyncio.Queue()
        self.traffic = Traffic()
        self._collective = collective
        self._rank_of = dict(ranks)
        self._ranks = range(1, collective.size)
        self._inbox = inbox
        self._published: set[str] = set()
        self._listener: asyncio.Task[None] | None = None
        self._settling: set[asyncio.Task[None]] = set()
        self._parts = [memoryview(bytearray(SEGMENT)) for _ in range(DEPTH)]  # of broadcasts
        self._updates = [memoryview(bytearray(SEGMENT)) for _ in range(DEPTH)]  # of an update that arrives

    async def open(self, welcome: Welcome) -> None:
        message: Message = {
            "type": "welcome",
            "run": welcome.run,
            "plan": welcome.plan.model_dump(mode="json"),
            "layout": welcome.layout.to_json(),
            "epoch": asdict(welcome.epoch),
        }
        await self._tell_all(message)
        self._listener = asyncio.create_task(self._listen())
        self._listener.add_done_callback(self._ended)

    async def publish(self, bases: Mapping[str, WeightsFile]) -> None:
        """Broadcasts the weights that the ranks do not hold yet; they drop those that are not named any more."""
        await self._tell_all({"type": "bases", "digests": sorted(bases)})
        for digest in sorted(bases.keys() - self._published):
            await self._tell_all({"type": "weights", "digest": digest})
            await completed(self._broadcasts(bases[digest]))
            self.traffic.down += bases[digest].nbytes * len(self._ranks)
        self._published = set(bases)

    def _broadcasts(self, weights: WeightsFile) -> Iterator[Awaitable[None]]:
        import numpy as np

        for number, offset in enumerate(range(0, weights.nbytes, SEGMENT)):
            part = self._parts[number % DEPTH][: min(SEGMENT, weights.nbytes - offset)]
            weights.read_into(offset, part)
            yield self._collective.broadcast(np.frombuffer(part, np.uint8))

    async def send(self, silo: str, order: Order) -> None:
        training = None if order.training is None else order.training.model_dump(mode="json")
        message: Message = {
            "type": "order",
            "silo": silo,
            "kind": order.kind,
            "nonce": order.nonce,
            "arm": order.arm,
            "round": order.round,
            "base": order.base,
            "seconds": order.seconds,
            "training": training,
            "follows": order.follows,
            "epoch": order.epoch,
        }
        await self._collective.say(self._rank_of[silo], message)

    async def recall(self, silo: str, nonce: str, reason: str) -> None:
        message = {"type": "recall", "silo": silo, "nonce": nonce, "reason": reason}
        await self._collective.say(self._rank_of[silo], message)

    async def close(self, goodbye: Goodbye) -> None:
        """Waits until the ranks have said goodbye too: afterwards nothing is under way."""
        with contextlib.suppress(Exception):  # of a world that is broken already
            async with asyncio.timeout(_TIME_TO_PART):
                await self._tell_all({"type": "goodbye", "finished": goodbye.finished, "reason": goodbye.reason})
                if self._listener is not None:
                    await asyncio.shield(self._listener)
        if self._listener is not None:
            self._listener.cancel()

    async def _tell_all(self, message: Message) -> None:
        for rank in self._ranks:
            await self._collective.say(rank, message)

    def _ended(self, listener: asyncio.Task[None]) -> None:
        if not listener.cancelled() and (error := listener.exception()) is not None:
            self.events.put_nowait(ExchangeFailed(error))

    async def _listen(self) -> None:
        """Hears the ranks until all have said goodbye."""
        staying = set(self._ranks)
        while staying:
            rank, message = await self._collective.hear()
            kind, silo = message["type"], message.get("silo", "")
            if kind == "goodbye":
                staying.discard(rank)
            elif self._rank_of.get(silo) == rank:
                await self._take(rank, silo, message)

    async def _take(self, rank: int, silo: str, message: Message) -> None:
        kind = message["type"]
        if kind == "ready":
            self.events.put_nowait(SiloConnected(silo, Origin(f"rank {rank} over {self.transport}")))
            self.events.put_nowait(SiloJoined(silo))
        elif kind == "progress":
            self.events.put_nowait(SiloProgress(silo, message["nonce"], message["done"], message["total"]))
        elif kind == "failure":
            self._fail(silo, message["nonce"], message["reason"])
        elif kind == "report":
            report = Report(**message["report"])
            try:
                self._accept(silo, report)
                self.events.put_nowait(Answered(silo, report.nonce))
            except Refused as refusal:
                self._fail(silo, report.nonce, f"refused: {refusal}")
        elif kind == "update":
            await self._receive_update(rank, silo, message)

    def _accept(self, silo: str, report: Report) -> None:
        self._inbox.accept(silo, report)

    async def _receive_update(self, rank: int, silo: str, message: Message) -> None:
        header = UpdateHeader(**{**message["header"], "report": Report(**message["header"]["report"])})
        nonce = header.report.nonce
        try:
            offset, committed = self._inbox.announce(silo, header)
            if not committed:
                spool = self._inbox.spool(silo, nonce)
                ticket = spool.claim()
                # From here on all of it is taken, wanted or not: what is left lying would be taken for the next one.
                await self._collective.say(rank, {"type": "send", "offset": offset})
                await self._fill(spool, ticket, rank, offset)
        except Refused as refusal:
            await self._refuse(rank, silo, nonce, refusal)
        else:  # the next one may arrive while this one is checked
            settling = asyncio.create_task(self._settle(rank, silo, nonce, committed))
            self._settling.add(settling)
            settling.add_done_callback(self._settling.discard)
            settling.add_done_callback(self._ended)

    async def _settle(self, rank: int, silo: str, nonce: str, committed: bool) -> None:
        """Commits an update that arrived whole, or refuses it; either way its silo is told."""
        try:
            if not committed:
                await asyncio.to_thread(self._inbox.finish, silo, nonce)
        except Refused as refusal:
            await self._refuse(rank, silo, nonce, refusal)
        else:
            self.events.put_nowait(Answered(silo, nonce))
            await self._collective.say(rank, {"type": "receipt", "committed": True, "reason": ""})

    async def _refuse(self, rank: int, silo: str, nonce: str, refusal: Refused) -> None:
        self._fail(silo, nonce, f"refused: {refusal}")
        await self._collective.say(rank, {"type": "receipt", "committed": False, "reason": str(refusal)})

    async def _fill(self, spool: Spool, ticket: int, rank: int, offset: int) -> None:
        """Receives an update. Each part is written and hashed while it is in the cache; the next are on their way."""
        async for start, part in pipelined(self._arrivals(rank, offset, spool.size)):
            spool.write(ticket, start, part)
            self.traffic.up += len(part)

    def _arrivals(self, rank: int, offset: int, size: int) -> Iterator[tuple[Awaitable[None], tuple[int, memoryview]]]:
        for number, start in enumerate(range(offset, size, SEGMENT)):
            part = self._updates[number % len(self._updates)][: min(SEGMENT, size - start)]
            yield self._collective.receive(part, rank), (start, part)

    def _fail(self, silo: str, nonce: str, reason: str) -> None:
        if self._inbox.fail(silo, nonce):
            self.events.put_nowait(OrderFailed(silo, nonce, reason))


class ReducingCoordinatorExchange(CollectiveCoordinatorExchange):
    """The same where updates are reduced: silos report what they hold, and `reduce` sums it."""

    _layout: Layout
    _reducing: asyncio.Task[None] | None = None

    async def open(self, welcome: Welcome) -> None:
        self._layout = welcome.layout
        if wrong := unreducible(welcome.layout):
            raise ModelError(
                f"collective.reduction is fast, and {wrong}: an MPI cannot add such numbers",
                hint="set collective.reduction to exact",
            )
        self._reduced = ReducedUpdate(welcome.layout)
        await super().open(welcome)

    def _accept(self, silo: str, report: Report) -> None:
        self._inbox.accept_reduced(silo, report)

    async def reduce(self, silos: tuple[str, ...]) -> ReducedUpdate:
        """Begins to sum the updates of these silos, each times its samples. It is read while the rest arrives."""
        await self._tell_all({"type": "reduce", "silos": list(silos)})
        self._reduced.begin()
        self._reducing = asyncio.create_task(self._receive_sum())
        return self._reduced

    async def _receive_sum(self) -> None:
        try:
            async for part in pipelined(self._reduced.parts(self._collective)):
                self._reduced.arrived(part)
            self.traffic.up += self._layout.nbytes * len(self._ranks)
        except BaseException as error:
            self._reduced.fail(error)
            raise


async def dismiss(collective: Collective) -> None:
    """Tells every rank that there is nothing to federate, in place of a welcome."""
    ranks = range(1, collective.size)
    for rank in ranks:
        await collective.say(rank, {"type": "goodbye", "finished": True, "reason": "there is nothing to federate"})
    for _ in ranks:
        await collective.hear()  # their goodbye

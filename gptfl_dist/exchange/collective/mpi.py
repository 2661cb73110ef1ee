"""The exchange over MPI: weights by broadcast, updates by typed messages into the inbox, control messages as JSON.

What passes goes over a `Wire` (wire.py), plain or through TLS. Updates arrive whole at rank 0 and are aggregated by the
same code as over gRPC, so the weights are the same bit for bit.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.errors import ProtocolError
from gptfl_dist.exchange.base import (
    Answered,
    ExchangeEvent,
    ExchangeFailed,
    Goodbye,
    OrderFailed,
    Recalled,
    Receipt,
    SiloJoined,
    SiloProgress,
    Traffic,
    UpdateHeader,
    Welcome,
)
from gptfl_dist.exchange.collective.wire import SEGMENT, Message, Wire
from gptfl_dist.exchange.inbox import Inbox, Refused
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.files import storage_error
from gptfl_dist.weights import Codec, Layout, WeightsFile
from gptfl_dist.weights.file import header_of


async def dismiss(wire: Wire, silos: int) -> None:
    """Tells every rank that there is nothing to federate, in place of a welcome."""
    for rank in range(1, silos + 1):
        await wire.say(rank, {"type": "goodbye"})


class MpiCoordinatorExchange:
    """See `CoordinatorExchange`. Rank k is the k-th silo by name."""

    def __init__(self, *, wire: Wire, silos: tuple[str, ...], inbox: Inbox) -> None:
        self.events: asyncio.Queue[ExchangeEvent] = asyncio.Queue()
        self.traffic = Traffic()
        self.transport = wire.transport
        self._wire = wire
        self._rank_of = {silo: rank for rank, silo in enumerate(sorted(silos), start=1)}
        self._silo_of = {rank: silo for silo, rank in self._rank_of.items()}
        self._inbox = inbox
        self._published: set[str] = set()
        self._listener: asyncio.Task[None] | None = None
        self._segment = memoryview(bytearray(SEGMENT))

    async def open(self, welcome: Welcome) -> None:
        message: Message = {
            "type": "welcome",
            "run": welcome.run,
            "plan": welcome.plan.model_dump(mode="json"),
            "layout": welcome.layout.to_json(),
        }
        await self._tell_all(message)
        self._listener = asyncio.create_task(self._listen())
        self._listener.add_done_callback(self._ended)

    async def publish(self, bases: Mapping[str, WeightsFile]) -> None:
        """Broadcasts the weights that the ranks do not hold yet; they drop those that are not named any more."""
        await self._tell_all({"type": "bases", "digests": sorted(bases)})
        for digest in sorted(bases.keys() - self._published):
            await self._broadcast(digest, bases[digest])
        self._published = set(bases)

    async def _broadcast(self, digest: str, weights: WeightsFile) -> None:
        await self._tell_all({"type": "weights", "digest": digest})
        buffer = memoryview(bytearray(SEGMENT))
        for offset in range(0, weights.nbytes, SEGMENT):
            part = buffer[: min(SEGMENT, weights.nbytes - offset)]
            weights.read_into(offset, part)
            await self._wire.broadcast(part)
        self.traffic.down += weights.nbytes * len(self._rank_of)

    async def send(self, silo: str, order: Order) -> None:
        training = None if order.training is None else order.training.model_dump(mode="json")
        message: Message = {
            "type": "order",
            "kind": order.kind,
            "nonce": order.nonce,
            "arm": order.arm,
            "round": order.round,
            "base": order.base,
            "seconds": order.seconds,
            "training": training,
            "follows": order.follows,
        }
        await self._wire.say(self._rank_of[silo], message)

    async def recall(self, silo: str, nonce: str, reason: str) -> None:
        await self._wire.say(self._rank_of[silo], {"type": "recall", "nonce": nonce, "reason": reason})

    def _ended(self, listener: asyncio.Task[None]) -> None:
        if not listener.cancelled() and (error := listener.exception()) is not None:
            self.events.put_nowait(ExchangeFailed(error))

    async def close(self, goodbye: Goodbye) -> None:
        if self._listener is not None:
            self._listener.cancel()
        await self._tell_all({"type": "goodbye", "finished": goodbye.finished, "reason": goodbye.reason})

    async def _tell_all(self, message: Message) -> None:
        for rank in self._silo_of:
            await self._wire.say(rank, message)

    async def _listen(self) -> None:
        while True:
            rank, message = await self._wire.hear()
            silo, kind = self._silo_of[rank], message["type"]
            if kind == "ready":
                self.events.put_nowait(SiloJoined(silo))
            elif kind == "progress":
                self.events.put_nowait(SiloProgress(silo, message["nonce"], message["done"], message["total"]))
            elif kind == "failure":
                self._fail(silo, message["nonce"], message["reason"])
            elif kind == "report":
                report = Report(**message["report"])
                try:
                    self._inbox.accept(silo, report)
                    self.events.put_nowait(Answered(silo, report.nonce))
                except Refused as refusal:
                    self._fail(silo, report.nonce, f"refused: {refusal}")
            elif kind == "update":
                await self._receive_update(rank, silo, message)

    async def _receive_update(self, rank: int, silo: str, message: Message) -> None:
        header = UpdateHeader(**{**message["header"], "report": Report(**message["header"]["report"])})
        nonce = header.report.nonce
        try:
            offset, committed = self._inbox.announce(silo, header)
            if not committed:
                spool = self._inbox.spool(silo, nonce)
                ticket = spool.claim()
                # From here on all of it is taken, wanted or not: what is left lying would be taken for the next one.
                await self._wire.say(rank, {"type": "send", "offset": offset})
                while offset < header.size:
                    part = self._segment[: min(SEGMENT, header.size - offset)]
                    await self._wire.receive(part, rank)
                    spool.write(ticket, offset, part)
                    offset += len(part)
                    self.traffic.up += len(part)
                await asyncio.to_thread(self._inbox.finish, silo, nonce)
        except Refused as refusal:
            self._fail(silo, nonce, f"refused: {refusal}")
            await self._wire.say(rank, {"type": "receipt", "committed": False, "reason": str(refusal)})
        else:
            self.events.put_nowait(Answered(silo, nonce))
            await self._wire.say(rank, {"type": "receipt", "committed": True, "reason": ""})

    def _fail(self, silo: str, nonce: str, reason: str) -> None:
        if self._inbox.fail(silo, nonce):
            self.events.put_nowait(OrderFailed(silo, nonce, reason))


class MpiSiloExchange:
    """See `SiloExchange`. The rank takes part in every broadcast, called on in that round or not."""

    def __init__(self, *, wire: Wire, folder: Path) -> None:
        self._wire = wire
        self._folder = folder
        self._words: asyncio.Queue[Order | Recalled | Goodbye] = asyncio.Queue()
        self._answers: asyncio.Queue[Message] = asyncio.Queue()
        self._arrived: set[str] = set()  # digests of the weights that lie in the folder
        self._arrival = asyncio.Condition()
        self._layout: Layout | None = None  # of what is broadcast
        self._listener: asyncio.Task[None] | None = None
        self._uploading = asyncio.Lock()
        self._first: Message | None = None

    async def invited(self) -> bool:
        """Waits for rank 0's first word, before `connect`. False where there is nothing to federate."""
        _, self._first = await self._wire.hear()
        return bool(self._first["type"] != "goodbye")

    async def connect(self) -> Welcome:
        message, self._first = self._first, None
        if message is None:
            _, message = await self._wire.hear()
        if message["type"] != "welcome":
            raise ProtocolError(f"rank 0 sent {message['type']!r}, expected a welcome")
        welcome = Welcome(message["run"], Plan.model_validate(message["plan"]), Layout.from_json(message["layout"]))
        self._layout = Codec(welcome.plan.compression.down).layout(welcome.layout)
        self._listener = asyncio.create_task(self._listen())
        return welcome

    async def ready(self) -> None:
        await self._wire.say(0, {"type": "ready"})

    async def receive(self) -> Order | Recalled | Goodbye:
        """The next word; raises what ended the listening."""
        assert self._listener is not None
        word = asyncio.ensure_future(self._words.get())
        await asyncio.wait({word, self._listener}, return_when=asyncio.FIRST_COMPLETED)
        if not word.done():
            word.cancel()
            self._listener.result()
        return await word

    async def download(self, digest: str, layout: Layout, path: Path) -> None:
        async with self._arrival:
            await self._arrival.wait_for(lambda: digest in self._arrived)
        try:
            path.unlink(missing_ok=True)
            os.link(self._broadcast(digest), path)
        except OSError as error:
            raise storage_error(error, path) from None

    async def upload(self, header: UpdateHeader, update: WeightsFile) -> Receipt:
        report = header.report
        message: Message = {
            "type": "update",
            "header": {
                "report": {"nonce": report.nonce, "samples": report.samples, "metrics": dict(report.metrics)},
                "base": header.base,
                "layout": header.layout,
                "digest": header.digest,
                "size": header.size,
            },
        }
        # Once begun it goes on, even where the order is recalled: rank 0 waits for every byte that was announced.
        return await asyncio.shield(asyncio.create_task(self._upload(message, update.path)))

    async def _upload(self, message: Message, path: Path) -> Receipt:
        with WeightsFile(path) as update:
            async with self._uploading:
                await self._wire.say(0, message)
                answer = await self._answers.get()
                if answer["type"] == "send":
                    for offset in range(answer["offset"], update.nbytes, SEGMENT):
                        part = update.read(offset, min(SEGMENT, update.nbytes - offset))
                        await self._wire.send(memoryview(part), 0)
                    answer = await self._answers.get()
        return Receipt(answer["committed"], answer["reason"])

    async def report(self, report: Report) -> None:
        message = {"nonce": report.nonce, "samples": report.samples, "metrics": dict(report.metrics)}
        await self._wire.say(0, {"type": "report", "report": message})

    async def progress(self, nonce: str, done: int, total: int) -> None:
        await self._wire.say(0, {"type": "progress", "nonce": nonce, "done": done, "total": total})

    async def fail(self, nonce: str, reason: str) -> None:
        await self._wire.say(0, {"type": "failure", "nonce": nonce, "reason": reason})

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.cancel()

    async def _listen(self) -> None:
        while True:
            _, message = await self._wire.hear()
            kind = message.pop("type")
            if kind == "bases":
                self._keep(message["digests"])
            elif kind == "weights":
                await self._take_broadcast(message["digest"])
            elif kind == "order":
                training = message.pop("training")
                settings = None if training is None else LocalTraining.model_validate(training)
                self._words.put_nowait(Order(**message, training=settings))
            elif kind == "recall":
                self._words.put_nowait(Recalled(**message))
            elif kind == "goodbye":
                self._words.put_nowait(Goodbye(**message))
                return
            else:
                self._answers.put_nowait({"type": kind, **message})

    def _broadcast(self, digest: str) -> Path:
        return self._folder / f"broadcast-{digest}.safetensors"

    def _keep(self, digests: list[str]) -> None:
        """Drops all weights but these, also those that an earlier run left."""
        self._arrived &= set(digests)
        kept = {self._broadcast(digest) for digest in self._arrived}
        for path in self._folder.glob("broadcast-*"):
            if path not in kept:
                path.unlink()

    async def _take_broadcast(self, digest: str) -> None:
        assert self._layout is not None
        part = self._folder / "broadcast-incoming.part"
        buffer = memoryview(bytearray(min(SEGMENT, self._layout.nbytes)))
        try:
            with part.open("wb") as file:
                part.chmod(0o600)
                file.write(header_of(self._layout))
                for offset in range(0, self._layout.nbytes, SEGMENT):
                    received = buffer[: min(SEGMENT, self._layout.nbytes - offset)]
                    await self._wire.broadcast(received)
                    file.write(received)
        except OSError as error:
            raise storage_error(error, part) from None
        with WeightsFile(part) as weights:
            if weights.digest() != digest:
                raise ProtocolError("the weights that were broadcast do not have the digest that was announced")
        part.replace(self._broadcast(digest))
        async with self._arrival:
            self._arrived.add(digest)
            self._arrival.notify_all()

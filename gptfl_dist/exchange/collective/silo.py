"""A silo rank's end of a collective exchange: one line to the coordinator, for one silo or several.

`RankExchange` hears what the coordinator says, hands each silo its words, and takes part in every broadcast and
reduction, whoever is called on. `SiloOnRank` is the exchange of one of its silos. Where the weights go that are
broadcast, a `Keeper` knows: into a file (`FileKeeper`), for silos whose trainer is another process, or into memory
(`MemoryKeeper`), for trainers in this one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.errors import ProtocolError
from gptfl_dist.exchange.base import Disconnected, Goodbye, Recalled, Receipt, UpdateHeader, Welcome
from gptfl_dist.exchange.collective.base import DEPTH, SEGMENT, Buffer, Collective, Message, completed, pipelined
from gptfl_dist.exchange.collective.reduction import contributions
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.files import replacing, storage_error, write_at
from gptfl_dist.security.epoch import Epoch
from gptfl_dist.weights import Codec, Layout, WeightsFile
from gptfl_dist.weights.file import header_of
from gptfl_dist.weights.samples import samples_layout

DISMISS = "dismiss"
"""The type of the last message that the first rank of a silo sends to the others."""


class Keeper(Protocol):
    """Where a rank keeps the weights that were broadcast."""

    def keep_only(self, digests: Collection[str]) -> None:
        """Drops all others."""

    async def take(self, collective: Collective, digest: str, layout: Layout) -> None:
        """Takes part in the broadcast of these weights. Raises ProtocolError where others arrive."""

    async def fetch(self, digest: str, path: Path) -> None:
        """Waits until these weights are here, and puts them at `path` if they are kept in files."""


class FileKeeper:
    """Keeps weights as files in a folder; silos get links to them.

    Weights that came are written over older ones that nobody has a link to any more: fresh pages cost several times as
    much. Beside those that silos hold, one file more lies in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._here: set[str] = set()
        self._dropped: set[Path] = set()
        self._arrival = asyncio.Condition()

    def keep_only(self, digests: Collection[str]) -> None:
        """Drops all others, also those that an earlier run left."""
        self._here &= set(digests)
        self._dropped = set(self._folder.glob("*broadcast-*")) - {self._path(digest) for digest in self._here}

    async def take(self, collective: Collective, digest: str, layout: Layout) -> None:
        hasher, header = blake3(), header_of(layout)
        path, over = self._path(digest), self._nobodys()
        self._dropped.discard(path)  # one of that name may be left from an earlier run
        with replacing(path, durable=False, over=over) as fd:
            os.ftruncate(fd, len(header) + layout.nbytes)
            write_at(fd, 0, memoryview(header))
            offset = len(header)
            async for part in pipelined(_arrivals(collective, layout.nbytes)):
                write_at(fd, offset, part)
                hasher.update(part)
                offset += len(part)
            if hasher.hexdigest() != digest:
                raise ProtocolError("the weights that were broadcast do not have the digest that was announced")
        async with self._arrival:
            self._here.add(digest)
            self._arrival.notify_all()

    def _nobodys(self) -> Path | None:
        """The largest file that was dropped, also by all silos; the others of these are gone."""
        try:
            found = {path: path.stat() for path in self._dropped if path.exists()}
            free = sorted((path for path in found if found[path].st_nlink == 1), key=lambda path: found[path].st_size)
            for path in free[:-1]:
                path.unlink()
        except OSError as error:
            raise storage_error(error, self._folder) from None
        self._dropped = found.keys() - set(free)
        return free[-1] if free else None

    async def fetch(self, digest: str, path: Path) -> None:
        async with self._arrival:
            await self._arrival.wait_for(lambda: digest in self._here)
        try:
            path.unlink(missing_ok=True)
            os.link(self._path(digest), path)
        except OSError as error:
            raise storage_error(error, path) from None

    def _path(self, digest: str) -> Path:
        return self._folder / f"broadcast-{digest}.safetensors"


def _arrivals(collective: Collective, size: int) -> Iterator[tuple[Awaitable[None], memoryview]]:
    import numpy as np

    ring = [np.empty(min(SEGMENT, size), np.uint8) for _ in range(DEPTH)]
    for number, start in enumerate(range(0, size, SEGMENT)):
        part = ring[number % DEPTH][: size - start]
        yield collective.broadcast(part), part.data


class NoKeeper:
    """Takes part in broadcasts, for a rank that wants no weights."""

    def keep_only(self, digests: Collection[str]) -> None:
        """Nothing was kept."""

    async def take(self, collective: Collective, digest: str, layout: Layout) -> None:
        async for _ in pipelined(_arrivals(collective, layout.nbytes)):
            pass

    async def fetch(self, digest: str, path: Path) -> None:
        raise AssertionError("nobody trains on this rank's weights")


class MemoryKeeper:
    """Keeps the newest weights in one buffer of memory, and knows where each silo's update lies.

    `weights` is a tensor of bytes on the collective's device. `updates` is for trainers to fill.
    """

    def __init__(self) -> None:
        self.weights: Buffer = None
        self.updates: dict[str, Buffer] = {}
        self._digest = ""
        self._arrival = asyncio.Condition()

    def keep_only(self, digests: Collection[str]) -> None:
        """Nothing to do: the next weights take the place of these."""

    async def take(self, collective: Collective, digest: str, layout: Layout) -> None:
        import torch

        if self.weights is None:
            self.weights = torch.empty(layout.nbytes, dtype=torch.uint8, device=collective.device)
        whole = self.weights.numpy() if collective.device == "cpu" else self.weights
        self._digest = ""
        await completed(collective.broadcast(whole[o : o + SEGMENT]) for o in range(0, layout.nbytes, SEGMENT))
        async with self._arrival:
            self._digest = digest
            self._arrival.notify_all()

    async def fetch(self, digest: str, path: Path) -> None:
        async with self._arrival:
            await self._arrival.wait_for(lambda: digest == self._digest)

    def updates_of(self, silos: Collection[str]) -> list[Buffer]:
        """The updates of those of the silos that are on this rank."""
        return [self.updates[silo] for silo in sorted(self.updates) if silo in silos]


class RankExchange:
    """The line of one rank to the coordinator; `silos` are those that it serves.

    A rank that `helps` serves none. What the first rank of its silo says to it comes to `told`, DISMISS at last.
    """

    def __init__(self, *, collective: Collective, silos: Sequence[str], keeper: Keeper, helps: bool = False) -> None:
        self.welcome: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self.words: dict[str, asyncio.Queue[Order | Recalled | Goodbye]] = {silo: asyncio.Queue() for silo in silos}
        self.told: asyncio.Queue[Message] = asyncio.Queue()
        self.keeper = keeper
        self._collective = collective
        self._answers: asyncio.Queue[Message] = asyncio.Queue()
        self._layout: Layout | None = None  # of the model
        self._broadcast: Layout | None = None  # of what is broadcast of it
        self._samples: dict[str, Layout] = {}  # of the synthetic samples that silos are given, by digest
        self._sending = asyncio.Lock()  # of updates: one at a time
        self._unanswered = False  # whether one is on its way
        self._parted = False
        self._helps = helps

    async def listen(self) -> None:
        """Hears the coordinator until it says goodbye, and then says so too.

        Without a welcome before, there is nothing to federate.
        """
        said_goodbye = False
        while not said_goodbye or self._helps:
            sender, message = await self._collective.hear()
            if sender != 0:
                self._helps = message["type"] != DISMISS
                self.told.put_nowait(message)
                continue
            kind = message.pop("type")
            if kind == "welcome":
                plan, layout = Plan.model_validate(message["plan"]), Layout.from_json(message["layout"])
                self._layout, self._broadcast = layout, Codec(plan.compression.down).layout(layout)
                if plan.samples is not None:
                    samples = samples_layout(plan.task.shape, plan.samples.count)
                    self._samples = {plan.samples.digest: samples}
                self.welcome.set_result(Welcome(message["run"], plan, layout, Epoch(**message["epoch"])))
            elif kind == "bases":
                self.keeper.keep_only(message["digests"])
            elif kind == "weights":
                assert self._broadcast is not None
                digest = message["digest"]
                await self.keeper.take(self._collective, digest, self._samples.get(digest, self._broadcast))
            elif kind == "order":
                training = message.pop("training")
                settings = None if training is None else LocalTraining.model_validate(training)
                self.words[message.pop("silo")].put_nowait(Order(**message, training=settings))
            elif kind == "recall":
                self.words[message.pop("silo")].put_nowait(Recalled(**message))
            elif kind == "reduce":
                assert self._layout is not None
                assert isinstance(self.keeper, MemoryKeeper)
                updates = self.keeper.updates_of(message["silos"])
                await completed(contributions(self._collective, self._layout, updates))
            elif kind == "goodbye":
                if message["finished"]:  # if not, rank 0 ends the job: no silo is to try and connect again
                    for words in self.words.values():
                        words.put_nowait(Goodbye(**message))
                if not self.welcome.done():
                    self.welcome.cancel()
                self._parted = True
            else:
                self._unanswered &= kind != "receipt"
                self._answers.put_nowait({"type": kind, **message})
            if self._parted and not self._unanswered:  # the coordinator takes an update that was begun to its end
                await self._collective.say(0, {"type": "goodbye"})
                said_goodbye = True

    async def say(self, message: Message) -> None:
        """Says nothing after the coordinator's goodbye: nobody listens any more."""
        if not self._parted:
            await self._collective.say(0, message)

    async def upload(self, message: Message, path: Path) -> Receipt:
        """Sends an update, one after the other. Raises Disconnected after the coordinator's goodbye."""
        with WeightsFile(path) as update:
            async with self._sending:
                if self._parted:
                    raise Disconnected("the coordinator has ended")
                await self.say(message)
                self._unanswered = True
                answer = await self._answers.get()
                if answer["type"] == "send":
                    await completed(self._parts(update, answer["offset"]))
                    answer = await self._answers.get()
        return Receipt(answer["committed"], answer["reason"])

    def _parts(self, update: WeightsFile, offset: int) -> Iterator[Awaitable[None]]:
        ring = [memoryview(bytearray(min(SEGMENT, update.nbytes))) for _ in range(DEPTH)]
        for number, start in enumerate(range(offset, update.nbytes, SEGMENT)):
            part = ring[number % DEPTH][: update.nbytes - start]
            update.read_into(start, part)
            yield self._collective.send(part, 0)


class SiloOnRank:
    """See `SiloExchange`. The exchange of one silo of a rank, whose `listen` runs beside it."""

    def __init__(self, rank: RankExchange, silo: str) -> None:
        self._rank = rank
        self._silo = silo
        self._connected = False

    async def connect(self) -> Welcome:
        if self._connected:
            await asyncio.get_running_loop().create_future()  # the coordinator went, and ends this job with it
        self._connected = True
        return await asyncio.shield(self._rank.welcome)

    async def ready(self) -> None:
        await self._say({"type": "ready"})

    async def receive(self) -> Order | Recalled | Goodbye:
        return await self._rank.words[self._silo].get()

    async def download(self, digest: str, layout: Layout, path: Path) -> None:
        await self._rank.keeper.fetch(digest, path)

    async def upload(self, header: UpdateHeader, update: WeightsFile) -> Receipt:
        message: Message = {
            "type": "update",
            "silo": self._silo,
            "header": {
                "report": _told(header.report),
                "base": header.base,
                "layout": header.layout,
                "digest": header.digest,
                "size": header.size,
                "epoch": header.epoch,
            },
        }
        # Once begun it goes on, even where the order is recalled: rank 0 waits for every byte that was announced.
        return await asyncio.shield(asyncio.create_task(self._rank.upload(message, update.path)))

    async def report(self, report: Report) -> None:
        await self._say({"type": "report", "report": _told(report)})

    async def progress(self, nonce: str, done: int, total: int, note: str = "") -> None:
        await self._say({"type": "progress", "nonce": nonce, "done": done, "total": total})

    async def fail(self, nonce: str, reason: str) -> None:
        await self._say({"type": "failure", "nonce": nonce, "reason": reason})

    async def close(self) -> None:
        """The rank's line is not this silo's to end."""

    async def _say(self, message: Message) -> None:
        await self._rank.say({**message, "silo": self._silo})


def _told(report: Report) -> Message:
    return {"nonce": report.nonce, "samples": report.samples, "metrics": dict(report.metrics)}

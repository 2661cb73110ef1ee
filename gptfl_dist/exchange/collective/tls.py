"""The MPI backend where nothing passes unsealed: rank 0 has a TLS 1.3 session with each silo's rank.

Control messages are TLS records. Weights and updates are sealed beside them (`security/bulk.py`), with a key of each
rank that it tells in its sessions: a silo's for its updates, and rank 0's for what it broadcasts, which is sealed once.
The latter all silos know. So whoever keeps what was broadcast holds it to the digest that rank 0 told in the session;
no silo can put something else in its place. Parts pass as messages of up to 1 MiB, of which several are on their way
while the next is sealed and the last one opened.

All of that is done in the event loop's thread: in threads of their own it costs more CPU time, and takes longer.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Awaitable, Iterable, Mapping
from typing import Literal

import numpy as np
from mpi4py import MPI

from gptfl_dist.errors import ProtocolError
from gptfl_dist.exchange.buffers import keep_buffers
from gptfl_dist.exchange.collective.base import Buffer, Message, decode, encode
from gptfl_dist.exchange.collective.mpi import MpiCollective
from gptfl_dist.security.bulk import KEY_BYTES, TAG_BYTES, Bulk
from gptfl_dist.security.session import LONGEST, LONGEST_SEALED, Session

_RECORDS, _PARTS = 3, 4  # message tags
_IN_FLIGHT = 4  # parts of an update that are received before they are wanted
_KEY, _MORE, _LAST = 1, 2, 3  # kinds of what the session carries: a key, a control message but for its end, its end
_LONGEST_CONTROL = 64 << 20  # bytes


class TlsCollective(MpiCollective):
    """See `Collective`. There is no reduction: nobody can add what is sealed."""

    transport = "mpi+tls"

    def __init__(self, world: MPI.Comm, sessions: Mapping[int, Session]) -> None:
        """`sessions` with the ranks that this one deals with: rank 0 with all others, each of these with rank 0."""
        super().__init__(world)
        keep_buffers()
        self._lines = {rank: _Line(self, rank, session) for rank, session in sessions.items()}

    async def shake_hands(self) -> None:
        """Comes before all else, on all ranks. Raises IdentityError where a rank is not who it must be."""
        key = os.urandom(KEY_BYTES)
        self._sealing = Bulk(key, f"rank {self.rank}")
        for line in self._lines.values():
            await line.shake_hands(key, begin=self.rank != 0)

    async def say(self, rank: int, message: Message) -> None:
        control = memoryview(encode(message))
        parts = [control[start : start + LONGEST] for start in range(0, len(control), LONGEST)]
        sent = [self._lines[rank].post(_MORE, part) for part in parts[:-1]]
        await self._all([*sent, self._lines[rank].post(_LAST, parts[-1])])

    async def hear(self) -> tuple[int, Message]:
        rank, control = await self.until(self._heard)
        return rank, decode(control)

    def _heard(self) -> tuple[int, bytearray] | None:
        for rank, line in self._lines.items():
            if (control := line.heard()) is not None:
                self._lines[rank] = self._lines.pop(rank)  # its turn comes again after all others
                return rank, control
        return None

    def broadcast(self, part: Buffer) -> Awaitable[None]:
        data = memoryview(part)
        if self.rank == 0:
            return self.completed(self.world.Ibcast(self._sealed(data), root=0))
        sealed = _memory(len(data) + TAG_BYTES)
        return self._opened(self.world.Ibcast(sealed, root=0), sealed, data)

    async def _opened(self, request: MPI.Request, sealed: memoryview, data: memoryview) -> None:
        await self.completed(request)
        self._lines[0].opening.open(sealed, data)

    def _sealed(self, data: memoryview) -> memoryview:
        sealed = _memory(len(data) + TAG_BYTES)
        self._sealing.seal(data, sealed)
        return sealed

    def reduce(self, part: Buffer, how: Literal["sum", "max"]) -> Awaitable[None]:
        raise ProtocolError("updates that are sealed cannot be reduced", hint="set collective.reduction to exact")

    def send(self, part: memoryview, rank: int) -> Awaitable[None]:
        if self.rank == 0 or rank != 0:  # all silos can open what rank 0 seals
            raise ProtocolError(f"rank {self.rank} was to send a part to rank {rank}, expected a silo's to rank 0")
        cuts = range(0, len(part), LONGEST)
        return self._all([self.world.Isend(self._sealed(part[at : at + LONGEST]), 0, _PARTS) for at in cuts])

    def receive(self, part: memoryview, rank: int) -> Awaitable[None]:
        return self._lines[rank].receive(part)

    async def _all(self, requests: Iterable[MPI.Request]) -> None:
        for request in requests:
            await self.completed(request)


class _Arrivals:
    """The messages of one tag from another rank, in order, none longer than `longest`."""

    def __init__(self, collective: MpiCollective, rank: int, tag: int, longest: int) -> None:
        self._collective = collective
        self._rank = rank
        self._tag = tag
        self._longest = longest
        self._arriving: deque[tuple[MPI.Request, memoryview]] = deque()

    def match(self, most: int) -> None:
        """Begins to receive what the other rank has sent, until `most` messages are on their way."""
        status = MPI.Status()
        while len(self._arriving) < most:
            message = self._collective.world.Improbe(self._rank, self._tag, status)
            if message is None:
                return
            size = status.Get_count(MPI.BYTE)
            if size > self._longest:
                raise ProtocolError(f"rank {self._rank} sent {size} bytes, expected at most {self._longest}")
            memory = _memory(size)
            self._arriving.append((message.Irecv(memory), memory))

    def here(self) -> memoryview | None:
        """The next message, if it is here."""
        self.match(1)
        return self._arriving.popleft()[1] if self._arriving and self._arriving[0][0].Test() else None

    async def next(self) -> memoryview:
        """The next message."""
        request, memory = await self._collective.until(self._first)
        await self._collective.completed(request)
        return memory

    def _first(self) -> tuple[MPI.Request, memoryview] | None:
        self.match(1)
        return self._arriving.popleft() if self._arriving else None


class _Line:
    """What passes between this rank and another, in both directions."""

    def __init__(self, collective: MpiCollective, rank: int, session: Session) -> None:
        self._collective = collective
        self._world = collective.world
        self._rank = rank
        self._session = session
        self._records = _Arrivals(collective, rank, _RECORDS, LONGEST_SEALED)
        self._parts = _Arrivals(collective, rank, _PARTS, LONGEST + TAG_BYTES)
        self._control = bytearray()  # one that is not whole

    async def shake_hands(self, key: bytes, *, begin: bool) -> None:
        """The handshake of the session, after which each end tells the other the key that it seals with."""
        answer = self._session.step() if begin else b""
        while True:
            if answer:
                await self._collective.completed(self._world.Isend(answer, self._rank, _RECORDS))
            if self._session.established:
                break
            answer = self._session.step(await self._records.next())
        told = self.post(_KEY, key)
        kind, theirs = self._session.open(await self._records.next())
        await self._collective.completed(told)
        if kind != _KEY or len(theirs) != KEY_BYTES:
            raise ProtocolError(f"rank {self._rank} sent a message of kind {kind} and {len(theirs)} bytes, not its key")
        self.opening = Bulk(bytes(theirs), f"rank {self._rank}")

    def post(self, kind: int, data: bytes | memoryview) -> MPI.Request:
        """Seals a message of the session and begins to send it."""
        return self._world.Isend(self._session.seal(kind, data), self._rank, _RECORDS)

    def heard(self) -> bytearray | None:
        """The next control message, if it is here."""
        while (records := self._records.here()) is not None:
            kind, content = self._session.open(records)
            if kind not in (_MORE, _LAST) or len(self._control) + len(content) > _LONGEST_CONTROL:
                raise ProtocolError(
                    f"rank {self._rank} sent a message of kind {kind} and {len(content)} bytes out of place"
                )
            self._control += content
            if kind == _LAST:
                control, self._control = self._control, bytearray()
                return control
        return None

    async def receive(self, part: memoryview) -> None:
        """Fills a part with what comes next of updates."""
        for start in range(0, len(part), LONGEST):
            sealed = await self._parts.next()
            self._parts.match(_IN_FLIGHT)
            self.opening.open(sealed, part[start : start + LONGEST])


def _memory(size: int) -> memoryview:
    """That was not filled with zeros before."""
    return np.empty(size, np.uint8).data

"""The MPI backend with a TLS 1.3 session between rank 0 and each silo's rank: nothing passes that is not sealed.

So there is no broadcast by the MPI: rank 0 seals weights for each rank. Everything between two ranks is one sequence of
messages of up to 1 MiB, of which several are on their way while the next is sealed and the last one opened.

Both are done in the event loop's thread: in threads of their own they cost a third more CPU time, and took longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Iterable, Mapping
from typing import Literal

import numpy as np
from mpi4py import MPI

from gptfl_dist.errors import ProtocolError
from gptfl_dist.exchange.buffers import keep_buffers
from gptfl_dist.exchange.collective.base import Buffer, Message, decode, encode
from gptfl_dist.exchange.collective.mpi import MpiCollective
from gptfl_dist.security.session import LONGEST, LONGEST_SEALED, Session

_SEALED = 3  # message tag
_IN_FLIGHT = 4  # messages that are received before they are wanted
_MORE, _LAST, _DATA = 1, 2, 3  # kinds of messages: of a control message all but the last, the last; of a part
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
        for line in self._lines.values():
            await line.shake_hands(begin=self.rank != 0)

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
        if self.rank != 0:
            return self.receive(memoryview(part), 0)
        return self._all([sent for line in self._lines.values() for sent in line.post_part(memoryview(part))])

    def reduce(self, part: Buffer, how: Literal["sum", "max"]) -> Awaitable[None]:
        raise ProtocolError("updates that are sealed cannot be reduced", hint="set collective.reduction to exact")

    def send(self, part: memoryview, rank: int) -> Awaitable[None]:
        return self._all(self._lines[rank].post_part(part))

    def receive(self, part: memoryview, rank: int) -> Awaitable[None]:
        return self._lines[rank].receive(part)

    async def _all(self, requests: Iterable[MPI.Request]) -> None:
        for request in requests:
            await self.completed(request)


class _Line:
    """The sealed messages between this rank and another, in both directions."""

    def __init__(self, collective: MpiCollective, rank: int, session: Session) -> None:
        self._collective = collective
        self._world = collective.world
        self._rank = rank
        self._session = session
        self._arriving: deque[tuple[MPI.Request, memoryview]] = deque()
        self._controls: deque[bytearray] = deque()  # whole ones that nobody has heard
        self._control = bytearray()  # one that is not whole

    async def shake_hands(self, *, begin: bool) -> None:
        answer = self._session.step() if begin else b""
        while True:
            if answer:
                await self._collective.completed(self._world.Isend(answer, self._rank, _SEALED))
            if self._session.established:
                return
            answer = self._session.step(await self._next())

    def post(self, kind: int, data: memoryview) -> MPI.Request:
        """Seals a message and begins to send it."""
        return self._world.Isend(self._session.seal(kind, data), self._rank, _SEALED)

    def post_part(self, part: memoryview) -> list[MPI.Request]:
        return [self.post(_DATA, part[start : start + LONGEST]) for start in range(0, len(part), LONGEST)]

    def heard(self) -> bytearray | None:
        """The next control message, if it is here."""
        self._match(1)
        while not self._controls and self._arriving and self._arriving[0][0].Test():
            self._open(self._arriving.popleft()[1], memoryview(b""))
            self._match(1)
        return self._controls.popleft() if self._controls else None

    async def receive(self, part: memoryview) -> None:
        """Fills a part with what comes next of weights and updates, and keeps control messages for later."""
        while part:
            records = await self._next()
            self._match(_IN_FLIGHT)
            part = part[self._open(records, part) :]

    async def _next(self) -> memoryview:
        """The records of the next message."""
        request, records = await self._collective.until(self._next_arriving)
        await self._collective.completed(request)
        return records

    def _next_arriving(self) -> tuple[MPI.Request, memoryview] | None:
        self._match(1)
        return self._arriving.popleft() if self._arriving else None

    def _match(self, most: int) -> None:
        """Begins to receive what the other rank has sent, until `most` messages are on their way."""
        status = MPI.Status()
        while len(self._arriving) < most:
            message = self._world.Improbe(self._rank, _SEALED, status)
            if message is None:
                return
            size = status.Get_count(MPI.BYTE)
            if size > LONGEST_SEALED:
                raise ProtocolError(f"rank {self._rank} sent {size} bytes, expected at most {LONGEST_SEALED}")
            records = np.empty(size, np.uint8).data
            self._arriving.append((message.Irecv(records), records))

    def _open(self, records: memoryview, part: memoryview) -> int:
        """Opens a message: the next bytes of a part, whose number is returned, or of a control message."""
        control = bytearray()

        def buffer_for(kind: int, size: int) -> memoryview:
            if kind == _DATA and size <= len(part):
                return part[:size]
            if kind in (_MORE, _LAST) and len(self._control) + size <= _LONGEST_CONTROL:
                control.extend(bytes(size))
                return memoryview(control)
            raise ProtocolError(f"rank {self._rank} sent a message of kind {kind} and {size} bytes out of place")

        kind, size = self._session.open(records, buffer_for)
        if kind == _DATA:
            return size
        self._control += control
        if kind == _LAST:
            self._controls.append(self._control)
            self._control = bytearray()
        return 0

"""The wire with a TLS 1.3 session between rank 0 and each silo's rank: nothing else passes, and nothing unsealed.

So there is no broadcast by the MPI: rank 0 seals weights for each rank. Sealing and opening are done in threads, which
lets go of the GIL, while earlier messages are on their way: up to four in each direction of each session.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Mapping

from mpi4py import MPI

from gptfl_dist.errors import ProtocolError
from gptfl_dist.exchange.buffers import keep_buffers
from gptfl_dist.exchange.collective.wire import Message, complete, pauses
from gptfl_dist.security.session import LONGEST, LONGEST_SEALED, Session

_SEALED = 3  # message tag
_IN_FLIGHT = 4  # messages
_MORE, _LAST, _DATA = 1, 2, 3  # kinds of messages: of a control message all but the last, the last; of a part
_LONGEST_CONTROL = 64 << 20  # bytes


class TlsWire:
    """See `Wire`."""

    transport = "mpi+tls"

    def __init__(self, world: MPI.Comm, sessions: Mapping[int, Session]) -> None:
        """`sessions` with the ranks that this one deals with: rank 0 with all others, each of these with rank 0."""
        keep_buffers()
        self._root = world.Get_rank() == 0
        self._lines = {rank: _Line(world, rank, session) for rank, session in sessions.items()}

    async def shake_hands(self) -> None:
        """Comes before all else, on all ranks. Raises IdentityError where a rank is not who it must be."""
        await asyncio.gather(*(line.shake_hands(begin=not self._root) for line in self._lines.values()))

    async def say(self, rank: int, message: Message) -> None:
        await self._lines[rank].say(json.dumps(message).encode())

    async def hear(self) -> tuple[int, Message]:
        for pause in pauses():
            for rank, line in self._lines.items():
                if line.has_news():
                    self._lines[rank] = self._lines.pop(rank)  # its turn comes again after all others
                    return rank, json.loads(await line.hear())
            await asyncio.sleep(pause)
        raise AssertionError  # pauses never end

    async def broadcast(self, part: memoryview) -> None:
        if self._root:
            await asyncio.gather(*(line.send(part) for line in self._lines.values()))
        else:
            await self.receive(0, part)

    async def send(self, rank: int, part: memoryview) -> None:
        await self._lines[rank].send(part)

    async def receive(self, rank: int, part: memoryview) -> None:
        await self._lines[rank].receive(part)


class _Line:
    """The sealed messages between this rank and another. One task at a time reads; any number of them write."""

    def __init__(self, world: MPI.Comm, rank: int, session: Session) -> None:
        self._world = world
        self._rank = rank
        self._session = session
        self._writing = asyncio.Lock()
        self._leaving: deque[MPI.Request] = deque()
        self._arriving: deque[tuple[MPI.Request, memoryview]] = deque()
        self._heard: deque[bytearray] = deque()  # control messages that came between the parts of an update
        self._control = bytearray()  # of which the last message has not come

    async def shake_hands(self, *, begin: bool) -> None:
        answer = self._session.step() if begin else b""
        while True:
            if answer:
                await complete(self._world.Isend(answer, self._rank, _SEALED))
            if self._session.established:
                return
            answer = self._session.step(await self._next())

    async def say(self, control: bytes) -> None:
        data = memoryview(control)
        async with self._writing:
            for start in range(0, len(data), LONGEST):
                part = data[start : start + LONGEST]
                await self._write(_LAST if start + LONGEST >= len(data) else _MORE, part)
            while self._leaving:
                await complete(self._leaving.popleft())

    async def send(self, part: memoryview) -> None:
        async with self._writing:
            for start in range(0, len(part), LONGEST):
                await self._write(_DATA, part[start : start + LONGEST])

    async def _write(self, kind: int, data: memoryview) -> None:
        records = await asyncio.to_thread(self._session.seal, kind, data)
        if len(self._leaving) == _IN_FLIGHT:
            await complete(self._leaving.popleft())
        self._leaving.append(self._world.Isend(records, self._rank, _SEALED))

    def has_news(self) -> bool:
        """Whether there is something to hear, as far as is known without waiting."""
        self._match(1)
        return bool(self._heard or self._arriving)

    async def hear(self) -> bytearray:
        """The next control message."""
        while not self._heard:
            await self._read(memoryview(b""))
        return self._heard.popleft()

    async def receive(self, part: memoryview) -> None:
        while part:
            part = part[await self._read(part) :]

    async def _read(self, part: memoryview) -> int:
        """Reads one message: the next bytes of a part, whose number is returned, or of a control message."""
        control: bytearray | None = None
        size, last = 0, False

        def buffer_for(kind: int, length: int) -> memoryview:
            nonlocal control, size, last
            if kind == _DATA and length <= len(part):
                size = length
                return part[:length]
            if kind in (_MORE, _LAST) and len(self._control) + length <= _LONGEST_CONTROL:
                control, last = bytearray(length), kind == _LAST
                return memoryview(control)
            raise ProtocolError(f"rank {self._rank} sent a message of kind {kind} and {length} bytes out of place")

        records = await self._next()
        opening = asyncio.get_running_loop().run_in_executor(None, self._session.open, records, buffer_for)
        self._match(_IN_FLIGHT)
        await opening
        if control is not None:
            self._control += control
            if last:
                self._heard.append(self._control)
                self._control = bytearray()
        return size

    async def _next(self) -> memoryview:
        """The records of the next message."""
        for pause in pauses():
            self._match(1)
            if self._arriving:
                break
            await asyncio.sleep(pause)
        request, records = self._arriving.popleft()
        await complete(request)
        return records

    def _match(self, most: int) -> None:
        """Begins to receive what the other rank has sent, so that there are up to `most` messages on their way."""
        status = MPI.Status()
        while len(self._arriving) < most:
            message = self._world.Improbe(self._rank, _SEALED, status)
            if message is None:
                return
            size = status.Get_count(MPI.BYTE)
            if size > LONGEST_SEALED:
                raise ProtocolError(f"rank {self._rank} sent {size} bytes, expected at most {LONGEST_SEALED}")
            records = memoryview(bytearray(size))
            self._arriving.append((message.Irecv(records), records))

"""The collective operations over MPI, by mpi4py's typed buffers.

MPI moves data only while somebody calls it. An operation under way is tested again and again, at first almost without
pause, for its partners have been told to start theirs: parts then flow faster than in one blocking call. What takes
longer than that waits for somebody, and the tests come with growing pauses. Blocking calls would not do: a signal
handler does not run inside them, and an idle rank of MPICH burns a core.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Literal, NoReturn, TypeVar

from mpi4py import MPI

from gptfl_dist.exchange.collective.base import Buffer, Message, decode, encode

_CONTROL, _DATA = 1, 2  # message tags
_BUSY = 0.2  # seconds of almost no pause after an operation was started or completed
_TURN = 0.002  # seconds of such tests before the event loop gets its turn
_EAGER = 20  # tests that only yield the core; then naps, or the partners on this core would get too little of it
_NAP = 1e-4  # seconds
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.02  # seconds between two tests after that
_PATIENCE = 0.1  # a wait for a message is looked after once in this part of the time that it has taken

_T = TypeVar("_T")


class MpiCollective:
    """See `Collective`."""

    transport: str = "mpi"
    device = "cpu"

    def __init__(self, world: MPI.Comm) -> None:
        self.rank = world.Get_rank()
        self.size = world.Get_size()
        self.world = world
        self._error: BaseException | None = None
        self._active = 0.0  # when an operation was started or completed last

    async def say(self, rank: int, message: Message) -> None:
        await self.completed(self.world.Isend(encode(message), rank, _CONTROL))

    async def hear(self) -> tuple[int, Message]:
        status = MPI.Status()
        await self.until(lambda: self.world.Iprobe(MPI.ANY_SOURCE, _CONTROL, status) or None)
        sender = status.Get_source()
        buffer = bytearray(status.Get_count(MPI.BYTE))
        self.world.Recv(buffer, sender, _CONTROL)  # which is there
        return sender, decode(buffer)

    def send(self, part: memoryview, rank: int) -> Awaitable[None]:
        return self.completed(self.world.Isend(part, rank, _DATA))

    def receive(self, part: memoryview, rank: int) -> Awaitable[None]:
        return self.completed(self.world.Irecv(part, rank, _DATA))

    def broadcast(self, part: Buffer) -> Awaitable[None]:
        return self.completed(self.world.Ibcast(part, root=0))

    def reduce(self, part: Buffer, how: Literal["sum", "max"]) -> Awaitable[None]:
        operation = MPI.SUM if how == "sum" else MPI.MAX
        if self.rank == 0:
            return self.completed(self.world.Ireduce(MPI.IN_PLACE, part, operation, root=0))
        return self.completed(self.world.Ireduce(part, None, operation, root=0))

    def fail(self, error: BaseException) -> None:
        self._error = error

    def close(self) -> None:
        """Nothing to do: mpi4py finalises MPI when the process ends."""

    def abort(self, exit_code: int) -> NoReturn:
        self.world.Abort(exit_code)
        os._exit(exit_code)  # some MPIs return from Abort before they have ended this process

    async def until(self, look: Callable[[], _T | None]) -> _T:
        """Waits for what `look` finds. It looks again after a part of the time that it has waited."""
        since = time.monotonic()
        while (found := look()) is None:
            self._check()
            waited = time.monotonic() - since
            await asyncio.sleep(min(max(_PATIENCE * waited, _SHORTEST_PAUSE), _LONGEST_PAUSE))
        return found

    def completed(self, request: MPI.Request) -> Awaitable[None]:
        """Waits for an operation that was started just now."""
        self._active = time.monotonic()
        return self._complete(request)

    async def _complete(self, request: MPI.Request) -> None:
        pause = _SHORTEST_PAUSE
        while not self._tested(request):
            self._check()
            if time.monotonic() - self._active < _BUSY:
                await asyncio.sleep(0)
            else:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        self._active = time.monotonic()

    def _tested(self, request: MPI.Request) -> bool:
        """Tests an operation for a turn, or once where it waits for somebody."""
        turn, tests = time.monotonic() + _TURN, 0
        while not request.Test():
            now, tests = time.monotonic(), tests + 1
            if now > turn or now - self._active > _BUSY:
                return False
            if tests < _EAGER:
                os.sched_yield()
            else:
                time.sleep(_NAP)
        return True

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

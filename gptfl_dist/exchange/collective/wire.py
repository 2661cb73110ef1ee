"""What passes between rank 0 and the silos' ranks: control messages as JSON, and parts of weights and updates.

Nothing blocks inside MPI: every operation is started and then tested with growing pauses, so a waiting rank leaves
its core to others and a signal is handled at once. `PlainWire` sends as it is what `TlsWire` (tls.py) seals.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from mpi4py import MPI

SEGMENT = 4 << 20
"""The most bytes of one part."""

_CONTROL, _DATA = 1, 2  # message tags
_PATIENCE = 0.1  # the pause between two tests, as a part of the time that was waited
_LONGEST_PAUSE = 0.02  # seconds

Message = dict[str, Any]
_T = TypeVar("_T")


class Wire(Protocol):
    """The ends of it in the ranks. Of parts of weights and updates, both ends know the order and the sizes."""

    transport: str

    async def say(self, rank: int, message: Message) -> None:
        """Sends a control message."""

    async def hear(self) -> tuple[int, Message]:
        """The next control message, and the rank that sent it."""

    def broadcast(self, part: memoryview) -> Awaitable[None]:
        """At rank 0 sends a part to all ranks; at another one receives it."""

    def send(self, part: memoryview, rank: int) -> Awaitable[None]:
        """Sends a part to a rank."""

    def receive(self, part: memoryview, rank: int) -> Awaitable[None]:
        """Receives a part from a rank."""


async def until(look: Callable[[], _T | None]) -> _T:
    """Waits for what `look` finds. It looks again after a part of the time that it has waited."""
    begin = time.monotonic()
    while (found := look()) is None:
        await asyncio.sleep(min(_PATIENCE * (time.monotonic() - begin), _LONGEST_PAUSE))
    return found


async def complete(request: MPI.Request) -> None:
    """Waits for an operation."""
    await until(lambda: request.Test() or None)


class PlainWire:
    """See `Wire`. For an interconnect and ranks that are trusted."""

    transport = "mpi"

    def __init__(self, world: MPI.Comm) -> None:
        self._world = world

    async def say(self, rank: int, message: Message) -> None:
        await complete(self._world.Isend(json.dumps(message).encode(), rank, _CONTROL))

    async def hear(self) -> tuple[int, Message]:
        status = MPI.Status()
        await until(lambda: self._world.Iprobe(MPI.ANY_SOURCE, _CONTROL, status) or None)
        sender = status.Get_source()
        buffer = bytearray(status.Get_count(MPI.BYTE))
        self._world.Recv(buffer, sender, _CONTROL)
        return sender, json.loads(buffer)

    def broadcast(self, part: memoryview) -> Awaitable[None]:
        return complete(self._world.Ibcast(part, root=0))

    def send(self, part: memoryview, rank: int) -> Awaitable[None]:
        return complete(self._world.Isend(part, rank, _DATA))

    def receive(self, part: memoryview, rank: int) -> Awaitable[None]:
        return complete(self._world.Irecv(part, rank, _DATA))

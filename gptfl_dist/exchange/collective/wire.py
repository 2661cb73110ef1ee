"""What passes between rank 0 and the silos' ranks: control messages as JSON, and parts of weights and updates.

Nothing blocks inside MPI: every operation is started and then tested with growing pauses, so a waiting rank leaves
its core to others and a signal is handled at once. `PlainWire` sends as it is what `TlsWire` (tls.py) seals.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Protocol

from mpi4py import MPI

SEGMENT = 4 << 20
"""The most bytes of one part."""

_CONTROL, _DATA = 1, 2  # message tags
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0001, 0.02  # seconds between two tests

Message = dict[str, Any]


class Wire(Protocol):
    """The ends of it in the ranks. Of parts of weights and updates, both ends know the order and the sizes."""

    transport: str

    async def say(self, rank: int, message: Message) -> None:
        """Sends a control message."""

    async def hear(self) -> tuple[int, Message]:
        """The next control message, and the rank that sent it."""

    async def broadcast(self, part: memoryview) -> None:
        """At rank 0 sends a part to all ranks; at another one receives it."""

    async def send(self, rank: int, part: memoryview) -> None:
        """Sends a part to a rank."""

    async def receive(self, rank: int, part: memoryview) -> None:
        """Receives a part from a rank."""


def pauses() -> Iterator[float]:
    """Seconds to wait between two tests."""
    pause = _SHORTEST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE)


async def complete(request: MPI.Request) -> None:
    """Waits for an operation without holding the core."""
    for pause in pauses():
        if request.Test():
            return
        await asyncio.sleep(pause)


class PlainWire:
    """See `Wire`. For an interconnect and ranks that are trusted."""

    transport = "mpi"

    def __init__(self, world: MPI.Comm) -> None:
        self._world = world

    async def say(self, rank: int, message: Message) -> None:
        await complete(self._world.Isend(json.dumps(message).encode(), rank, _CONTROL))

    async def hear(self) -> tuple[int, Message]:
        status = MPI.Status()
        for pause in pauses():
            if self._world.Iprobe(MPI.ANY_SOURCE, _CONTROL, status):
                break
            await asyncio.sleep(pause)
        sender = status.Get_source()
        buffer = bytearray(status.Get_count(MPI.BYTE))
        self._world.Recv(buffer, sender, _CONTROL)
        return sender, json.loads(buffer)

    async def broadcast(self, part: memoryview) -> None:
        await complete(self._world.Ibcast(part, root=0))

    async def send(self, rank: int, part: memoryview) -> None:
        await complete(self._world.Isend(part, rank, _DATA))

    async def receive(self, rank: int, part: memoryview) -> None:
        await complete(self._world.Irecv(part, rank, _DATA))

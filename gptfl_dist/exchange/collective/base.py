"""What every collective backend can do: messages between two ranks, and a broadcast and a reduction over all.

Rank 0 is the coordinator. A backend has only primitive operations, on parts of at most a few MiB; `pipelined` keeps
some of them under way at once, so whoever carries a whole model cuts it into `SEGMENT`s and its size has no limit.
Operations that are started on several ranks are matched in the order in which they were started.

No operation blocks: each is started by its call and completed by awaiting what the call returns, and a rank that waits
leaves its core to others. After `fail`, operations raise the error instead of waiting for a rank that is gone.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any, Literal, NoReturn, Protocol, TypeVar

SEGMENT = 1 << 20
"""Bytes of one part: few enough to stay in a core's cache from one step to the next."""

DEPTH = 4
"""Parts under way at once."""

Message = dict[str, Any]
Buffer = Any
"""A NumPy array of numbers, or a torch tensor where `device` says so."""

_T = TypeVar("_T")


class Collective(Protocol):
    """One rank's end of a world of ranks."""

    transport: str
    rank: int
    size: int
    device: str
    """Where the buffers of broadcasts and reductions lie best: "cpu", or a GPU that the backend reads directly."""

    async def say(self, rank: int, message: Message) -> None:
        """Sends a control message."""

    async def hear(self) -> tuple[int, Message]:
        """The next control message and who sent it; messages of one rank come in order."""

    def send(self, part: memoryview, rank: int) -> Awaitable[None]:
        """Sends bytes, for which `receive` waits there with a part of the same size."""

    def receive(self, part: memoryview, rank: int) -> Awaitable[None]:
        """Fills `part` with bytes that `rank` sends."""

    def broadcast(self, part: Buffer) -> Awaitable[None]:
        """Fills `part` on all ranks with what it holds on rank 0."""

    def reduce(self, part: Buffer, how: Literal["sum", "max"]) -> Awaitable[None]:
        """Leaves in `part` on rank 0 the sum or the maximum of all ranks' parts. Those of the others are used up."""

    def fail(self, error: BaseException) -> None:
        """From now on every operation raises this error, also those under way."""

    def close(self) -> None:
        """Leaves the world; every rank does so at its end."""

    def abort(self, exit_code: int) -> NoReturn:
        """Ends this process, and the others as far as the backend can."""


async def pipelined(started: Iterator[tuple[Awaitable[None], _T]]) -> AsyncIterator[_T]:
    """Completes operations in the order in which `started` starts them, DEPTH under way; gives what stands beside each.

    What was given is the consumer's until it asks for the next. So a ring of DEPTH buffers is enough.
    """
    under_way: deque[tuple[Awaitable[None], _T]] = deque()
    for each in started:
        under_way.append(each)
        if len(under_way) == DEPTH:
            operation, what = under_way.popleft()
            await operation
            yield what
    while under_way:
        operation, what = under_way.popleft()
        await operation
        yield what


async def completed(started: Iterator[Awaitable[None]]) -> None:
    """Completes operations as `pipelined` does."""
    async for _ in pipelined((operation, None) for operation in started):
        pass


def encode(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def decode(message: bytes | bytearray) -> Message:
    decoded: Message = json.loads(message)
    return decoded

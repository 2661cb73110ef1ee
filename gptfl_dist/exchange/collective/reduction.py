"""The reduction of updates: which parts of the flat buffer are reduced how, what a rank gives, and the result.

Floating tensors are added, each update times its samples. Integers count something, and of them the largest increase
of any silo counts, so they are reduced by maximum (as int64, which every backend knows). Booleans are not reduced:
nobody reads them. All ranks cut the buffer alike.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gptfl_dist.exchange.collective.base import SEGMENT, Buffer, Collective
from gptfl_dist.weights import FLOATS, ITEM_SIZE, Layout
from gptfl_dist.weights.numbers import NUMPY

_Counts = NDArray[np.int64]
_LEAST = np.iinfo(np.int64).min  # what a rank without an update gives to a maximum


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes `start` to `stop` of the flat buffer, all of one dtype."""

    dtype: str
    start: int
    stop: int

    @property
    def how(self) -> Literal["sum", "max"]:
        return "sum" if self.dtype in FLOATS else "max"

    @property
    def count(self) -> int:
        return (self.stop - self.start) // ITEM_SIZE[self.dtype]


def parts_of(layout: Layout) -> Iterator[Part]:
    """What is reduced, in order."""
    for segment in layout.segments():
        if segment.dtype != "BOOL":
            for start in range(segment.start, segment.stop, SEGMENT):
                yield Part(segment.dtype, start, min(start + SEGMENT, segment.stop))


def unreducible(layout: Layout) -> str:
    """Names a tensor whose numbers cannot be added by a backend, or ""."""
    halves = (tensor for tensor in layout.tensors if tensor.dtype in ("F16", "BF16"))
    return next((f"the tensor {tensor.name} is {tensor.dtype}" for tensor in halves), "")


def contributions(collective: Collective, layout: Layout, updates: Sequence[Buffer]) -> Iterator[Awaitable[None]]:
    """Starts a silo rank's side of the reduction, part by part.

    `updates` are the flat buffers, as bytes, of the updates that count of this rank's silos; each holds its floating
    numbers times its samples. They are used up.
    """
    for part in parts_of(layout):
        mine = [update[part.start : part.stop] for update in updates]
        if part.how == "max":
            yield collective.reduce(_largest([_numbers(each, part) for each in mine], part), "max")
        elif not mine:
            yield collective.reduce(np.zeros(part.count, NUMPY[part.dtype]), "sum")
        else:
            total = _typed(mine[0], part)
            for other in mine[1:]:
                total += _typed(other, part)
            yield collective.reduce(total, "sum")


def _typed(part: Buffer, of: Part) -> Buffer:
    """Bytes of floating numbers as such."""
    if isinstance(part, np.ndarray):
        return part.view(NUMPY[of.dtype])
    import torch  # of which this is a tensor

    return part.view(torch.float64 if of.dtype == "F64" else torch.float32)


def _numbers(part: Buffer, of: Part) -> _Counts:
    """Bytes of integers as int64."""
    content = part if isinstance(part, np.ndarray) else part.cpu().numpy()
    return content.view(NUMPY[of.dtype]).astype(np.int64)


def _largest(increases: list[_Counts], part: Part) -> _Counts:
    largest = np.full(part.count, _LEAST)
    for increase in increases:
        np.maximum(largest, increase, out=largest)
    return largest


class ReducedUpdate:
    """The sum at the coordinator, a `FlatReader` for the aggregation: a reader waits until its bytes have arrived."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._flat = np.zeros(layout.nbytes, np.uint8)
        self._increases: dict[int, _Counts] = {}  # under way, by their part's stop
        self._arrived = 0  # all bytes before this one are there
        self._error: BaseException | None = None
        self._news = threading.Condition()

    def begin(self) -> None:
        """Before each reduction: nothing has arrived."""
        self._arrived = 0

    def parts(self, collective: Collective) -> Iterator[tuple[Awaitable[None], Part]]:
        """Starts the coordinator's side of the reduction, which adds nothing of its own."""
        for part in parts_of(self._layout):
            if part.how == "max":
                self._increases[part.stop] = np.full(part.count, _LEAST)
                yield collective.reduce(self._increases[part.stop], "max"), part
            else:
                total = self._flat[part.start : part.stop].view(NUMPY[part.dtype])
                total[:] = 0
                yield collective.reduce(total, "sum"), part

    def arrived(self, part: Part) -> None:
        """This part is there, and all before it."""
        if part.how == "max":
            target = self._flat[part.start : part.stop].view(NUMPY[part.dtype])
            target[:] = self._increases.pop(part.stop).astype(target.dtype)
        with self._news:
            self._arrived = part.stop
            self._news.notify_all()

    def fail(self, error: BaseException) -> None:
        """Nothing more will arrive: readers raise this."""
        with self._news:
            self._error = error
            self._news.notify_all()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from `offset`, once it is there. To be called from threads."""
        stop = offset + len(buffer)
        with self._news:
            self._news.wait_for(lambda: self._error is not None or self._arrived >= stop)
            if self._error is not None:
                raise self._error
        buffer[:] = self._flat[offset:stop].data

"""The blocks in which weights and updates are read: so many elements of one dtype, from the start of each segment.

Memory is then a few blocks, whatever the model. What becomes of numbers that are not averaged is decided here too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gptfl_dist.weights import FLOATS, ITEM_SIZE, FlatReader, Layout
from gptfl_dist.weights.numbers import NUMPY

Array = NDArray[np.floating[Any]]

Increase = Literal["largest", "middle"]
"""Which increase of a counter counts, of those of all silos. No minority of silos can push the middle one (of an even
number the lower of the two) beyond what an honest silo told."""


@dataclass(frozen=True, slots=True)
class Block:
    """`size` bytes of one dtype from byte `start`; `place` is how many floating elements are in those before."""

    dtype: str
    start: int
    size: int
    place: int

    @property
    def count(self) -> int:
        return self.size // ITEM_SIZE[self.dtype]

    @property
    def floating(self) -> bool:
        return self.dtype in FLOATS

    @property
    def wide(self) -> np.dtype[np.floating[Any]]:
        """What its numbers are computed in: float64 where the tensor is, else float32."""
        return np.dtype(np.float64 if self.dtype == "F64" else np.float32)


def blocks_of(layout: Layout, elements: int, names: Collection[str] | None = None) -> Iterator[Block]:
    """The whole flat buffer, or what the named tensors take of it, in order."""
    place = 0
    for segment in layout.segments(names):
        item = ITEM_SIZE[segment.dtype]
        for start in range(segment.start, segment.stop, elements * item):
            block = Block(segment.dtype, start, min(elements * item, segment.stop - start), place)
            yield block
            place += block.count if block.floating else 0


def counted(block: Block, base: FlatReader, updates: Sequence[FlatReader], increase: Increase) -> bytes:
    """The next weights' block of integers, each the old one and an increase of it; booleans are kept as they are."""
    memory = memoryview(bytearray(block.size))
    base.read_into(block.start, memory)
    if block.dtype != "BOOL":
        dtype = np.dtype(NUMPY[block.dtype])
        increases = np.empty((len(updates), block.count), dtype)
        for row, update in zip(increases, updates, strict=True):
            update.read_into(block.start, row.data.cast("B"))
        found = increases.max(axis=0) if increase == "largest" else np.sort(increases, axis=0)[(len(updates) - 1) // 2]
        np.frombuffer(memory, dtype)[:] += found
    return bytes(memory)

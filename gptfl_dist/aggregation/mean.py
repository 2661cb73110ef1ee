"""The weighted mean of updates, block by block.

Blocks of each update are read in sorted silo order, added and applied to the weights, so the result is bitwise the same
whatever the order of arrival, and memory is a few blocks whatever the model and the number of silos. A block is small
enough that it and its sum stay in a core's cache. Sums are in float64 where the tensor is, else in float32: that takes
less time than float64, and loses no more than about a ten-millionth of the terms for each silo. One thread does it;
several would wait for the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptfl_dist.weights import FLOATS, ITEM_SIZE, FlatReader, Layout
from gptfl_dist.weights.numbers import NUMPY, narrow, numbers

BLOCK_ELEMENTS = 1 << 16
"""Numbers that are read and added at a time; blocks are counted from the start of each segment of the layout."""

Array = NDArray[np.floating[Any]]


def weighted_mean(
    layout: Layout,
    base: FlatReader,
    updates: Mapping[str, FlatReader],
    shares: Mapping[str, float],
    step: Callable[[int, Array, Array], Array],
) -> Iterator[bytes | memoryview]:
    """The next weights as consecutive blocks of the flat buffer.

    Floating tensors: step(w, sum_k s_k d_k), with w the weights, d_k the update of silo k and s_k its share; where that
    is its part of all samples, it is FedAvg (arXiv:1602.05629, algorithm 1). `step(place, weights, mean)` is given a
    block of the weights and of the mean update, (n,) in float64 or float32, and how many floating elements lie before
    it; it returns the next weights. Integers count something (batches seen): the largest increase of any silo is added.
    Booleans are kept as they are.
    """
    made = _Mean(base, updates, shares)
    for block in _blocks(layout):
        yield made.of(block, step)


@dataclass(frozen=True, slots=True)
class _Block:
    """`size` bytes of one dtype from byte `start`; `place` is the number of floating elements before it."""

    dtype: str
    start: int
    size: int
    place: int


def _blocks(layout: Layout) -> Iterator[_Block]:
    place = 0
    for segment in layout.segments():
        item = ITEM_SIZE[segment.dtype]
        for start in range(segment.start, segment.stop, BLOCK_ELEMENTS * item):
            size = min(BLOCK_ELEMENTS * item, segment.stop - start)
            yield _Block(segment.dtype, start, size, place)
            place += size // item if segment.dtype in FLOATS else 0


class _Mean:
    """Makes blocks in memory that it uses again for each."""

    def __init__(self, base: FlatReader, updates: Mapping[str, FlatReader], shares: Mapping[str, float]) -> None:
        self._base = base
        self._updates = [(updates[silo], shares[silo]) for silo in sorted(updates)]
        self._memory = memoryview(bytearray(8 * BLOCK_ELEMENTS))
        self._sums = {dtype: np.empty((2, BLOCK_ELEMENTS), dtype) for dtype in (np.float32, np.float64)}

    def of(self, block: _Block, step: Callable[[int, Array, Array], Array]) -> bytes | memoryview:
        """The block of the next weights."""
        memory = self._memory[: block.size]
        if block.dtype in FLOATS:
            count = block.size // ITEM_SIZE[block.dtype]
            wide = np.float64 if block.dtype == "F64" else np.float32
            mean, product = self._sums[wide][:, :count]
            mean[:] = 0
            for update, share in self._updates:
                update.read_into(block.start, memory)
                np.multiply(numbers(memory, block.dtype), wide(share), out=product)
                mean += product
            self._base.read_into(block.start, memory)
            product[:] = numbers(memory, block.dtype)
            return narrow(step(block.place, product, mean), block.dtype).data.cast("B")
        self._base.read_into(block.start, memory)
        if block.dtype != "BOOL":
            dtype = np.dtype(NUMPY[block.dtype])
            increases = []
            for update, _ in self._updates:
                increase = np.empty(block.size // dtype.itemsize, dtype)
                update.read_into(block.start, increase.data.cast("B"))
                increases.append(increase)
            np.frombuffer(memory, dtype)[:] += np.maximum.reduce(increases)
        return bytes(memory)

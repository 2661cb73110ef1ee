"""The weighted mean of updates, block by block.

Blocks of each update are read in sorted silo order, added in float64 and applied to the weights, so the result is
bitwise the same whatever the order of arrival, and memory is a few blocks whatever the model and the number of silos.
A block is small enough that it and its sums stay in a core's cache. Blocks are made by several threads.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptfl_dist.weights import FLOATS, ITEM_SIZE, FlatReader, Layout
from gptfl_dist.weights.numbers import NUMPY, narrow, numbers

BLOCK_ELEMENTS = 1 << 16
"""Numbers that are read and added at a time; blocks are counted from the start of each segment of the layout."""

_THREADS = min(4, os.cpu_count() or 1)  # reading and adding let go of the interpreter's lock

Array = NDArray[np.float64]


def weighted_mean(
    layout: Layout,
    base: FlatReader,
    updates: Mapping[str, FlatReader],
    shares: Mapping[str, float],
    step: Callable[[int, Array, Array], Array],
) -> Generator[bytes | memoryview, None, None]:
    """The next weights as consecutive blocks of the flat buffer.

    Floating tensors: step(w, sum_k s_k d_k), with w the weights, d_k the update of silo k and s_k its share; where that
    is its part of all samples, it is FedAvg (arXiv:1602.05629, algorithm 1). `step(place, weights, mean)` is given a
    block of the weights and of the mean update, float64 (n,), and how many floating elements lie before it; it returns
    the next weights, and is called from several threads. Integers count something (batches seen): the largest increase
    of any silo is added. Booleans are kept as they are.
    """
    memory = threading.local()

    def made(block: _Block) -> bytes | memoryview:
        if not hasattr(memory, "mean"):
            memory.mean = _Mean(base, updates, shares)
        result: bytes | memoryview = memory.mean.of(block, step)
        return result

    with ThreadPoolExecutor(_THREADS, "aggregation") as threads:
        under_way: deque[Future[bytes | memoryview]] = deque()
        for block in _blocks(layout):
            under_way.append(threads.submit(made, block))
            if len(under_way) > 2 * _THREADS:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


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
    """Makes the blocks of one thread, in memory that it uses again for each."""

    def __init__(self, base: FlatReader, updates: Mapping[str, FlatReader], shares: Mapping[str, float]) -> None:
        self._base = base
        self._updates = [(updates[silo], shares[silo]) for silo in sorted(updates)]
        self._memory = memoryview(bytearray(8 * BLOCK_ELEMENTS))
        self._sums, self._products = np.empty(BLOCK_ELEMENTS), np.empty(BLOCK_ELEMENTS)

    def of(self, block: _Block, step: Callable[[int, Array, Array], Array]) -> bytes | memoryview:
        """The block of the next weights."""
        memory = self._memory[: block.size]
        if block.dtype in FLOATS:
            count = block.size // ITEM_SIZE[block.dtype]
            mean, product = self._sums[:count], self._products[:count]
            mean[:] = 0
            for update, share in self._updates:
                update.read_into(block.start, memory)
                product[:] = numbers(memory, block.dtype)
                product *= share
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

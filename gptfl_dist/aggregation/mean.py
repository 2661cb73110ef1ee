"""The weighted mean of updates, block by block.

Blocks of each update are read in sorted silo order, added and applied to the weights, so the result is bitwise the same
whatever the order of arrival, and memory is a few blocks whatever the model and the number of silos. A block is small
enough that it and its sum stay in a core's cache. Sums are in float64 where the tensor is, else in float32: that takes
less time than float64, and loses no more than about a ten-millionth of the terms for each silo. One thread does it;
several would wait for the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from gptfl_dist.aggregation.blocks import Array, Block, Increase, blocks_of, counted
from gptfl_dist.weights import FlatReader, Layout
from gptfl_dist.weights.numbers import narrow, numbers

BLOCK_ELEMENTS = 1 << 16
"""Numbers that are read and added at a time; blocks are counted from the start of each segment of the layout."""

Step = Callable[[int, Array, Array], Array]
"""`step(place, weights, mean)` is given a block of the weights and of what the updates come to, (n,) in float64 or
float32, and how many floating elements lie before it; it returns the next weights."""


def weighted_mean(
    layout: Layout,
    base: FlatReader,
    updates: Mapping[str, FlatReader],
    shares: Mapping[str, float],
    step: Step,
    increase: Increase = "largest",
) -> Iterator[bytes | memoryview]:
    """The next weights as consecutive blocks of the flat buffer.

    Floating tensors: step(w, sum_k s_k d_k), with w the weights, d_k the update of silo k and s_k its share; where that
    is its part of all samples, it is FedAvg (arXiv:1602.05629, algorithm 1). Integers count something (batches seen):
    the largest increase of any silo is added, or another (`increase`). Booleans are kept as they are.
    """
    silos = sorted(updates)
    made = _Mean(base, [(updates[silo], shares[silo]) for silo in silos if shares[silo]])
    for block in blocks_of(layout, BLOCK_ELEMENTS):
        if block.floating:
            yield made.of(block, step)
        else:
            yield counted(block, base, [updates[silo] for silo in silos], increase)


class _Mean:
    """Makes blocks in memory that it uses again for each."""

    def __init__(self, base: FlatReader, updates: list[tuple[FlatReader, float]]) -> None:
        self._base = base
        self._updates = updates
        self._memory = memoryview(bytearray(8 * BLOCK_ELEMENTS))
        self._sums = {dtype: np.empty((2, BLOCK_ELEMENTS), dtype) for dtype in map(np.dtype, (np.float32, np.float64))}

    def of(self, block: Block, step: Step) -> memoryview:
        """The block of the next weights."""
        memory = self._memory[: block.size]
        mean, product = self._sums[block.wide][:, : block.count]
        mean[:] = 0
        for update, share in self._updates:
            update.read_into(block.start, memory)
            np.multiply(numbers(memory, block.dtype), block.wide.type(share), out=product)
            mean += product
        self._base.read_into(block.start, memory)
        product[:] = numbers(memory, block.dtype)
        return narrow(step(block.place, product, mean), block.dtype).data.cast("B")

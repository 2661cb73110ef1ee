"""The weighted mean of updates, block by block.

Blocks of each update are read in sorted silo order, added in float64 and applied to the weights, so the result is
bitwise the same whatever the order of arrival, and memory is a few blocks whatever the model and the number of silos.
A block is small enough that it and its sums stay in a core's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from gptfl_dist.weights import FLOATS, ITEM_SIZE, FlatReader, Layout

BLOCK_ELEMENTS = 1 << 16
"""Numbers that are read and added at a time; blocks are counted from the start of each segment of the layout."""

Array = NDArray[np.float64]

_NUMPY = {"I64": "<i8", "F64": "<f8", "F32": "<f4", "I32": "<i4", "F16": "<f2", "I16": "<i2", "I8": "i1", "U8": "u1"}


def weighted_mean(
    layout: Layout,
    base: FlatReader,
    updates: Mapping[str, FlatReader],
    samples: Mapping[str, int],
    step: Callable[[int, Array, Array], Array],
) -> Iterator[bytes | memoryview]:
    """The next weights as consecutive blocks of the flat buffer.

    Floating tensors: step(w, sum_k (n_k / n) d_k), with w the weights, d_k the update of silo k and n_k its sample
    count (FedAvg, arXiv:1602.05629, algorithm 1). `step(place, weights, mean)` is given a block of the weights and of
    the mean update, float64 (n,), and how many floating elements lie before it; it returns the next weights. Integers
    count something (batches seen): the largest increase of any silo is added. Booleans are kept as they are.
    """
    silos = sorted(updates)
    total = sum(samples[silo] for silo in silos)
    shares = {silo: samples[silo] / total for silo in silos}
    memory = memoryview(bytearray(8 * BLOCK_ELEMENTS))
    sums, products = np.empty(BLOCK_ELEMENTS), np.empty(BLOCK_ELEMENTS)
    place = 0
    for segment in layout.segments():
        block_size = BLOCK_ELEMENTS * ITEM_SIZE[segment.dtype]
        for start in range(segment.start, segment.stop, block_size):
            block = memory[: min(block_size, segment.stop - start)]
            if segment.dtype in FLOATS:
                count = len(block) // ITEM_SIZE[segment.dtype]
                mean, product = sums[:count], products[:count]
                mean[:] = 0
                for silo in silos:
                    updates[silo].read_into(start, block)
                    product[:] = numbers(block, segment.dtype)
                    product *= shares[silo]
                    mean += product
                base.read_into(start, block)
                product[:] = numbers(block, segment.dtype)
                yield narrow(step(place, product, mean), segment.dtype).data.cast("B")
                place += count
                continue
            base.read_into(start, block)
            if segment.dtype != "BOOL":
                dtype = np.dtype(_NUMPY[segment.dtype])
                increases = []
                for silo in silos:
                    increase = np.empty(len(block) // dtype.itemsize, dtype)
                    updates[silo].read_into(start, increase.data.cast("B"))
                    increases.append(increase)
                np.frombuffer(block, dtype)[:] += np.maximum.reduce(increases)
            yield bytes(block)


def numbers(block: memoryview, dtype: str) -> NDArray[np.floating]:
    """A block of a floating dtype as numbers. NumPy has no bfloat16: its bits are the upper half of a float32's."""
    if dtype == "BF16":
        return (np.frombuffer(block, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(block, _NUMPY[dtype])


def narrow(values: Array, dtype: str) -> NDArray[np.generic]:
    """Numbers as those of a floating dtype (the bits of a BF16), rounded to nearest even."""
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        # Rounding the bits of a NaN could carry it into another number.
        return np.where(np.isnan(values), 0x7FC0, rounded >> 16).astype("<u2")
    return values.astype(_NUMPY[dtype])


def norm(layout: Layout, update: FlatReader) -> float:
    """The Euclidean norm of all floating elements of an update; NaN where one of them is NaN or infinite."""
    memory = memoryview(bytearray(8 * BLOCK_ELEMENTS))
    square = 0.0
    for segment in layout.segments():
        if segment.dtype not in FLOATS:
            continue
        block_size = BLOCK_ELEMENTS * ITEM_SIZE[segment.dtype]
        for start in range(segment.start, segment.stop, block_size):
            block = memory[: min(block_size, segment.stop - start)]
            update.read_into(start, block)
            found = numbers(block, segment.dtype)
            if segment.dtype == "F16":
                found = found.astype(np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                part = float(np.dot(found, found))
                if not math.isfinite(part):  # squares of large numbers overflow where the numbers are finite
                    if not np.isfinite(found).all():
                        return math.nan
                    part = float(np.dot(found.astype(np.float64), found.astype(np.float64)))
            square += part
    return math.sqrt(square)

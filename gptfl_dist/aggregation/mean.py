"""The weighted mean of updates, block by block.

Blocks of each update are read in sorted silo order, added in float64 and applied to the weights, so the result is
bitwise the same whatever the order of arrival, and memory is a few blocks whatever the model and the number of silos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gptfl_dist.weights import BLOCK, FLOATS, Layout

_NUMPY = {"I64": "<i8", "F64": "<f8", "F32": "<f4", "I32": "<i4", "F16": "<f2", "I16": "<i2", "I8": "i1", "U8": "u1"}


class FlatReader(Protocol):
    """Reads ranges of a flat buffer, as `WeightsFile` and a spool do."""

    def read(self, offset: int, size: int) -> bytes: ...


def weighted_mean(
    layout: Layout,
    base: FlatReader,
    updates: Mapping[str, FlatReader],
    shares: Mapping[str, float],
    step: Callable[[int, NDArray[np.float64]], NDArray[np.float64]],
) -> Iterator[bytes]:
    """The next weights as consecutive blocks of the flat buffer.

    Floating tensors: w + step(sum_k s_k d_k), with d_k the update of silo k and s_k its share; where that is its part
    of all samples, it is FedAvg (arXiv:1602.05629, algorithm 1). `step(place, mean)` is given the mean update of a
    block, float64 (n,), and how many floating elements lie before it; it returns what is added to the weights.
    Integers count something (batches seen): the largest increase of any silo is added. Booleans are kept as they are.
    """
    place = 0
    silos = sorted(updates)
    for segment in layout.segments():
        for start in range(segment.start, segment.stop, BLOCK):
            size = min(BLOCK, segment.stop - start)
            block = base.read(start, size)
            if segment.dtype == "BOOL":
                yield block
            elif segment.dtype in FLOATS:
                mean = np.zeros(len(widen(block, segment.dtype)), np.float64)
                for silo in silos:
                    mean += shares[silo] * widen(updates[silo].read(start, size), segment.dtype)
                yield narrow(widen(block, segment.dtype) + step(place, mean), segment.dtype)
                place += len(mean)
            else:
                dtype = np.dtype(_NUMPY[segment.dtype])
                increase = np.frombuffer(updates[silos[0]].read(start, size), dtype)
                for silo in silos[1:]:
                    increase = np.maximum(increase, np.frombuffer(updates[silo].read(start, size), dtype))
                yield (np.frombuffer(block, dtype) + increase).tobytes()


def widen(block: bytes, dtype: str) -> NDArray[np.float64]:
    """A block of a floating dtype as float64."""
    return _numbers(block, dtype).astype(np.float64)


def _numbers(block: bytes, dtype: str) -> NDArray[np.floating]:
    """A block as numbers. NumPy has no bfloat16: its bits are the upper half of a float32's."""
    if dtype == "BF16":
        return (np.frombuffer(block, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(block, _NUMPY[dtype])


def narrow(values: NDArray[np.float64], dtype: str) -> bytes:
    """The inverse of `widen`, rounding to nearest even."""
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        # Rounding the bits of a NaN could carry it into another number.
        return np.where(np.isnan(values), 0x7FC0, rounded >> 16).astype("<u2").tobytes()
    return values.astype(_NUMPY[dtype]).tobytes()


def is_finite(layout: Layout, update: FlatReader) -> bool:
    """Whether no floating element of an update is NaN or infinite."""
    for segment in layout.segments():
        if segment.dtype not in FLOATS:
            continue
        for start in range(segment.start, segment.stop, BLOCK):
            block = update.read(start, min(BLOCK, segment.stop - start))
            if not np.isfinite(_numbers(block, segment.dtype)).all():
                return False
    return True

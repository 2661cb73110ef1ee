"""The Euclidean norm of an update, taken as its bytes arrive: while they are in the cache it costs next to nothing."""

from __future__ import annotations

import math

import numpy as np

from gptfl_dist.weights import BLOCK, FLOATS, ITEM_SIZE, FlatReader, Layout
from gptfl_dist.weights.file import blocks
from gptfl_dist.weights.numbers import numbers


class RunningNorm:
    """Takes a flat buffer in pieces of any size, in order."""

    def __init__(self, layout: Layout) -> None:
        self._segments = list(layout.segments())[::-1]  # the next is the last
        self._place = 0  # bytes that are counted
        self._rest = b""  # the beginning of a number whose end has not come yet
        self._square = 0.0

    def add(self, piece: memoryview) -> None:
        """Counts the next bytes."""
        if self._rest:
            piece = memoryview(self._rest + piece)
        while piece:
            segment = self._segments[-1]
            item = ITEM_SIZE[segment.dtype]
            whole = min(len(piece), segment.stop - self._place) // item * item
            if not whole:
                break
            if segment.dtype in FLOATS:
                for start in range(0, whole, BLOCK):
                    self._square += _square(piece[start : min(start + BLOCK, whole)], segment.dtype)
            piece = piece[whole:]
            self._place += whole
            if self._place == segment.stop:
                self._segments.pop()
        self._rest = bytes(piece)

    @property
    def value(self) -> float:
        """Of the floating elements so far; NaN where one of them is NaN or infinite."""
        return math.sqrt(self._square)


def norm(layout: Layout, update: FlatReader) -> float:
    """The Euclidean norm of all floating elements of an update; NaN where one of them is NaN or infinite."""
    running = RunningNorm(layout)
    for block in blocks(update, layout.nbytes):
        running.add(block)
    return running.value


def _square(block: memoryview, dtype: str) -> float:
    """The sum of the squares of numbers; NaN where one of them is NaN or infinite."""
    found = numbers(block, dtype)
    if dtype == "F16":
        found = found.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.dot(found, found))
        if not math.isfinite(square):  # squares of large numbers overflow where the numbers are finite
            if not np.isfinite(found).all():
                return math.nan
            square = float(np.dot(found.astype(np.float64), found.astype(np.float64)))
    return square

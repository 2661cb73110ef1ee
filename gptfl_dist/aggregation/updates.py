"""The updates of one round, as a rule sees them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptfl_dist.aggregation.blocks import Array, Block, blocks_of
from gptfl_dist.config.plan import LocalTraining
from gptfl_dist.weights import FlatReader, Layout
from gptfl_dist.weights.numbers import numbers

Vector = NDArray[np.float64]

_TOGETHER = 1 << 18  # numbers of all updates together that are read at a time: they stay in a core's cache
_FEWEST = 1 << 8  # numbers of one update that are worth a read


@dataclass(frozen=True)
class Updates:
    """K updates in the order of their silos' names. A rule sees each times its factor.

    `samples` are what the silos told, at most what each registered; `trainings` what they were ordered to do; `factors`
    how much is taken of each update, below 1 of one that came late or was too long.
    """

    layout: Layout
    silos: tuple[str, ...]
    readers: tuple[FlatReader, ...]
    samples: tuple[int, ...]
    trainings: tuple[LocalTraining, ...]
    factors: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.silos)

    @property
    def shares(self) -> Vector:
        """(K,) Each silo's part of all samples."""
        return np.array(self.samples) / sum(self.samples)

    @cached_property
    def products(self) -> Vector:
        """(K, K) The inner products of the updates, over all floating elements, in one pass.

        All distances between updates, and between weighted means of them, follow from these.
        """
        total = np.zeros((len(self), len(self)))
        with np.errstate(over="ignore", invalid="ignore"):
            for block in blocks_of(self.layout, self.elements):
                if block.floating:
                    rows = self.read(block, np.dtype(np.float64))
                    total += rows @ rows.T
        return total

    @cached_property
    def distances(self) -> Vector:
        """(K, K) The squared Euclidean distances of the updates; infinite where too large for a number."""
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = self.products.diagonal()
            found = lengths[:, None] + lengths[None, :] - 2 * self.products
        return np.where(np.isfinite(found), np.maximum(found, 0.0), np.inf)

    @property
    def elements(self) -> int:
        """How many numbers of each update are to be read at a time."""
        return max(_FEWEST, _TOGETHER // len(self))

    def read(self, block: Block, dtype: np.dtype[np.floating[Any]]) -> Array:
        """(K, n) A block of floating elements of all updates."""
        found = np.empty((len(self), block.count), dtype)
        memory = memoryview(bytearray(block.size))
        for row, reader, factor in zip(found, self.readers, self.factors, strict=True):
            reader.read_into(block.start, memory)
            row[:] = numbers(memory, block.dtype)
            if factor != 1:
                row *= factor
        return found

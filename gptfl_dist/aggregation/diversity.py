"""Gradient diversity: how far the updates of a round agree (Yin et al., arXiv:1706.05699, definition 1).

Of the n updates d_i that counted in a round, over the model's parameters (no buffers), each as it came:

    diversity     sum_i ||d_i||^2 / ||sum_i d_i||^2     1/n where all are equal, 1 where they are orthogonal or there is
                                                        one, larger where they work against each other
    mean cosine   of the angles between all pairs       from the unit vectors u_i = d_i / ||d_i||, of which k are not of
                                                        zeros: (||sum_i u_i||^2 - k) / (k (k - 1))
    drift         ||d_i||, its mean and its maximum     how far a silo's training went from the received weights

Two passes over the updates, the second for the unit vectors. Memory is two blocks, whatever the model and the number of
silos. Sums are in float64, in sorted silo order, so the order of arrival changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptfl_dist.aggregation.blocks import blocks_of
from gptfl_dist.aggregation.mean import BLOCK_ELEMENTS
from gptfl_dist.aggregation.updates import Vector
from gptfl_dist.weights import FlatReader, Layout
from gptfl_dist.weights.numbers import numbers


@dataclass(frozen=True, slots=True)
class Diversity:
    """`updates` is n. `diversity` is None where the updates add up to nothing, `mean_cosine` where fewer than two are
    not of zeros; either where a number would be too large."""

    updates: int
    diversity: float | None
    mean_cosine: float | None
    mean_norm: float
    max_norm: float

    @property
    def log_n_diversity(self) -> float | None:
        """log(n diversity): 0 where all updates are equal, the more the less they agree; log n where orthogonal."""
        return None if not self.diversity else math.log(self.updates * self.diversity)


def diversity_of(layout: Layout, parameters: Collection[str], updates: Mapping[str, FlatReader]) -> Diversity:
    """Of the updates of these silos, over the tensors of these names."""
    readers = [updates[silo] for silo in sorted(updates)]
    squares, square_of_sum = _squares(layout, parameters, readers, [1.0] * len(readers))
    norms = np.sqrt(squares)
    units = [1 / float(norm) if norm > 0 else 0.0 for norm in norms]
    _, square_of_units = _squares(layout, parameters, readers, units)
    k = sum(unit > 0 for unit in units)
    return Diversity(
        updates=len(readers),
        diversity=_quotient(float(squares.sum()), square_of_sum),
        mean_cosine=_quotient(square_of_units - k, k * (k - 1)),
        mean_norm=float(norms.mean()),
        max_norm=float(norms.max()),
    )


def _squares(
    layout: Layout, parameters: Collection[str], updates: Sequence[FlatReader], factors: Sequence[float]
) -> tuple[Vector, float]:
    """In one pass the square of the norm of each update times its factor, and of the sum of all of them."""
    squares, square_of_sum = np.zeros(len(updates)), 0.0
    memory, (total, part) = memoryview(bytearray(8 * BLOCK_ELEMENTS)), np.empty((2, BLOCK_ELEMENTS))
    with np.errstate(over="ignore", invalid="ignore"):
        for block in blocks_of(layout, BLOCK_ELEMENTS, parameters):
            read, added, one = memory[: block.size], total[: block.count], part[: block.count]
            added[:] = 0
            for index, (update, factor) in enumerate(zip(updates, factors, strict=True)):
                update.read_into(block.start, read)
                np.multiply(numbers(read, block.dtype), factor, out=one, dtype=np.float64)
                squares[index] += one @ one
                added += one
            square_of_sum += float(added @ added)
    return squares, square_of_sum


def _quotient(dividend: float, divisor: float) -> float | None:
    """None where it is no number."""
    found = dividend / divisor if divisor > 0 else math.nan
    return found if math.isfinite(found) else None

"""Rules that bear malicious silos: as long as these are no more than a bound, they cannot lead the model astray.

Of n updates f may be malicious, whatever they hold:

    median             the middle number of each coordinate               arXiv:1803.01498, definition 1   n > 2f
    trimmed_mean       the mean without the f smallest and f largest      arXiv:1803.01498, definition 2   n > 2f
    krum               the update nearest to its n - f - 2 nearest ones   Blanchard et al., NIPS 2017      n > 2f + 2
    multi_krum         the mean of the n - f - 2 updates that are so      the same, and arXiv:1802.07927   n > 2f + 2
    geometric_median   the point of the least sum of distances            RFA, arXiv:1912.13445            n > 2f

Each silo counts alike, for a silo says itself how many samples it has. The first two are made coordinate by coordinate;
the others need only the inner products of the updates, and give each update a weight.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gptfl_dist.aggregation.blocks import Array
from gptfl_dist.aggregation.updates import Updates, Vector
from gptfl_dist.config.strategy import Strategy

_NEAREST = 1e-6
"""The smoothing of the geometric median, nu of RFA: what is nearer counts as so far away."""
_STEADY = 1e-12  # the change of each weight, to its size, at which they are settled
_LONGEST = 1_000  # iterations


def median(updates: Updates, strategy: Strategy) -> Callable[[Array], Array]:
    """Of an even number of updates the mean of the two in the middle."""
    return lambda block: _middle(block, (len(updates) - 1) // 2)


def trimmed_mean(updates: Updates, strategy: Strategy) -> Callable[[Array], Array]:
    return lambda block: _middle(block, strategy.borne)


def _middle(block: Array, left_out: int) -> Array:
    """The mean of what is left of each column without so many of its smallest and largest numbers."""
    columns = np.ascontiguousarray(block.T)
    columns.sort(axis=1)  # they are short: to part them at the middle takes ten times as long
    kept = columns[:, left_out : len(block) - left_out]
    middle: Array = kept @ np.full(kept.shape[1], 1 / kept.shape[1], kept.dtype)
    return middle


def krum(updates: Updates, strategy: Strategy) -> Vector:
    return _nearest(updates, strategy.borne, 1)


def multi_krum(updates: Updates, strategy: Strategy) -> Vector:
    return _nearest(updates, strategy.borne, len(updates) - strategy.borne - 2)


def _nearest(updates: Updates, malicious: int, count: int) -> Vector:
    """The same weight for those whose nearest n - f - 2 others are nearest; of equals the first."""
    others = np.sort(updates.distances, axis=1)[:, 1:]  # the first is the update itself
    scores = others[:, : len(updates) - malicious - 2].sum(axis=1)
    weights = np.zeros(len(updates))
    weights[np.argsort(scores, kind="stable")[:count]] = 1 / count
    return weights


def geometric_median(updates: Updates, strategy: Strategy) -> Vector:
    """The smoothed algorithm of Weiszfeld, run until the weights settle.

    Every point on its way is a weighted mean of the updates, so its distance from each follows from their inner
    products, and no update is read again.
    """
    products = updates.products
    near = np.isfinite(products.diagonal())  # what is infinitely far pulls nobody
    products = np.where(near[:, None] & near[None, :], products, 0.0)
    weights = _crowd(updates.distances)
    for _ in range(_LONGEST):
        along = products @ weights
        squares = products.diagonal() - 2 * along + weights @ along  # ||u_i - sum_k w_k u_k||^2
        pull = near / np.maximum(_NEAREST, np.sqrt(np.maximum(squares, 0.0)))
        before, weights = weights, pull / pull.sum()
        if (np.abs(weights - before) <= _STEADY * weights).all():
            break
    return weights


def _crowd(distances: Vector) -> Vector:
    """The same weight for the smallest circle of a majority around one of its own: from there it is not far."""
    majority = len(distances) // 2 + 1
    centre = np.argmin(np.sort(distances, axis=1)[:, majority - 1])
    weights = np.zeros(len(distances))
    weights[np.argsort(distances[centre], kind="stable")[:majority]] = 1 / majority
    return weights

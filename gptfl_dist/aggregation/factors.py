"""How much is taken of an update before the rule sees it: less of one that came late or is too long."""

from __future__ import annotations

from collections.abc import Mapping

from gptfl_dist.aggregation.norm import norm
from gptfl_dist.weights import FlatReader, Layout


def freshness(staleness: Mapping[str, int], exponent: float) -> dict[str, float]:
    """(1 + t)^-a of each silo's update, t being how many rounds ago the weights that it started from were the newest.

    FedBuff (arXiv:2106.06639) scales an update by 1 / sqrt(1 + t). As in its algorithm 1 nothing brings the sum back to
    1, so that stale updates make the step smaller.
    """
    return {silo: (1 + age) ** -exponent for silo, age in staleness.items()}


def clipping(layout: Layout, updates: Mapping[str, FlatReader], longest: float | None) -> dict[str, float]:
    """min(1, longest / its Euclidean norm) of each update, so that none is longer; 1 where there is no limit."""
    if longest is None:
        return dict.fromkeys(updates, 1.0)
    return {silo: min(1.0, longest / (norm(layout, update) or longest)) for silo, update in updates.items()}

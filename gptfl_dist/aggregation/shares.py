"""How much each update weighs in the mean of a round."""

from __future__ import annotations

from collections.abc import Mapping


def shares(samples: Mapping[str, int], staleness: Mapping[str, int], exponent: float) -> dict[str, float]:
    """The share of each silo's update: n_k / n (1 + t_k)^-a.

    n_k is its sample count, n the sum of all, t_k how many rounds ago the weights that it started from were the
    newest, a the `exponent`: FedBuff (arXiv:2106.06639) scales an update by 1 / sqrt(1 + t). As in its algorithm 1 the
    shares are not brought back to a sum of 1, so that stale updates make the step smaller.
    """
    total = sum(samples.values())
    return {silo: count / total * (1 + staleness[silo]) ** -exponent for silo, count in samples.items()}

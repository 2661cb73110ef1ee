"""How one data set is shared out over silos for an experiment: the class-wise Dirichlet draw of the literature.

For each label the samples are shuffled and cut by proportions drawn from Dirichlet(alpha, ..., alpha); a silo that
already has its even share of all samples gets no more. The whole draw is repeated until every silo has the minimum.
A small alpha gives each silo few labels, a large one nearly the same mixture everywhere.
"""

from __future__ import annotations

import numpy as np

from gptfl_dist.errors import DataError

MAX_DRAWS = 2_000


def dirichlet_partition(labels: np.ndarray, silos: int, alpha: float, minimum: int, seed: int) -> list[np.ndarray]:
    """Disjoint sorted int64 indices into `labels` (N,), one array a silo, that together hold every sample once.

    Every silo has at least `minimum` samples. Raises DataError where that cannot be, or no draw of 2,000 gave it.
    """
    if silos * minimum > len(labels):
        raise DataError(
            f"{len(labels)} samples cannot give {silos} silos at least {minimum} each",
            hint="use fewer silos, a lower minimum or more data",
        )
    generator = np.random.default_rng(seed)
    for _ in range(MAX_DRAWS):
        parts = _draw(labels, silos, alpha, generator)
        if parts is not None and min(map(len, parts)) >= minimum:
            return parts
    raise DataError(
        f"{MAX_DRAWS} Dirichlet draws with alpha {alpha} gave no split of {len(labels)} samples over {silos} silos "
        f"with at least {minimum} each",
        hint="use a larger alpha, a lower minimum or fewer silos",
    )


def _draw(labels: np.ndarray, silos: int, alpha: float, generator: np.random.Generator) -> list[np.ndarray] | None:
    """One draw, or None where a label's whole proportion fell to silos that are full (a very small alpha)."""
    even_share = len(labels) / silos
    parts: list[list[np.ndarray]] = [[] for _ in range(silos)]
    sizes = np.zeros(silos, dtype=np.int64)
    for label in np.unique(labels):
        indices = generator.permutation(np.flatnonzero(labels == label))
        proportions = generator.dirichlet(np.full(silos, alpha)) * (sizes < even_share)
        total = proportions.sum()
        if not total > 0:
            return None
        cuts = (np.cumsum(proportions / total)[:-1] * len(indices)).astype(np.int64)
        for silo, piece in enumerate(np.split(indices, cuts)):
            parts[silo].append(piece)
            sizes[silo] += len(piece)
    return [np.sort(np.concatenate(pieces)) for pieces in parts]

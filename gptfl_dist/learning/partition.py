"""How one data set is shared out over silos for an experiment.

Every function returns disjoint sorted int64 indices, one array a silo, that together hold every sample once.

`dirichlet_partition` is the class-wise draw of the literature: for each label the samples are shuffled and cut by
proportions drawn from Dirichlet(alpha, ..., alpha); a silo that already has its even share of all samples gets no more.
The whole draw is repeated until every silo has the minimum. A small alpha gives each silo few labels, a large one
nearly the same mixture everywhere. `shard_partition` is that of McMahan et al., `quantity_partition` gives silos unlike
numbers of alike samples, `key_partition` leaves together what belongs together.
"""

from __future__ import annotations

import numpy as np

from gptfl_dist.errors import DataError

MAX_DRAWS = 2_000


def dirichlet_partition(labels: np.ndarray, silos: int, alpha: float, minimum: int, seed: int) -> list[np.ndarray]:
    """Indices into `labels` (N,).

    Every silo has at least `minimum` samples. Raises DataError where that cannot be, or no draw of 2,000 gave it.
    """
    if silos * minimum > len(labels):
        raise _too_few(labels, silos, minimum)
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


def shard_partition(labels: np.ndarray, silos: int, shards: int, seed: int) -> list[np.ndarray]:
    """The samples, sorted by label and cut into equal shards, of which each silo is dealt so many.

    With two it is the split of FedAvg's paper (arXiv:1602.05629, section 3). Raises DataError where shards were empty.
    """
    if silos * shards > len(labels):
        raise DataError(
            f"{len(labels)} samples cannot be cut into {silos * shards} shards, {shards} for each of {silos} silos",
            hint="use fewer silos, fewer shards or more data",
        )
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    by_label = order[np.argsort(labels[order], kind="stable")]
    cut = np.array_split(by_label, silos * shards)
    dealt = generator.permutation(silos * shards).reshape(silos, shards)
    return [np.sort(np.concatenate([cut[shard] for shard in mine])) for mine in dealt]


def quantity_partition(labels: np.ndarray, silos: int, alpha: float, minimum: int, seed: int) -> list[np.ndarray]:
    """Samples at random, silo sizes by one draw of Dirichlet(alpha, ..., alpha), none below the minimum.

    Raises DataError where that cannot be.
    """
    if silos * minimum > len(labels):
        raise _too_few(labels, silos, minimum)
    generator = np.random.default_rng(seed)
    free = len(labels) - silos * minimum  # beyond what every silo has anyway
    cuts = np.floor(np.cumsum(generator.dirichlet(np.full(silos, alpha)))[:-1] * free).astype(np.int64)
    sizes = minimum + np.diff(np.concatenate([[0], cuts, [free]]))
    return [np.sort(part) for part in np.split(generator.permutation(len(labels)), np.cumsum(sizes)[:-1])]


def key_partition(keys: np.ndarray) -> dict[str, np.ndarray]:
    """The samples of each key (a speaker, a site), by key in sorted order. `keys` (N,) are texts."""
    return {str(key): np.flatnonzero(keys == key) for key in np.unique(keys)}


def _too_few(labels: np.ndarray, silos: int, minimum: int) -> DataError:
    return DataError(
        f"{len(labels)} samples cannot give {silos} silos at least {minimum} each",
        hint="use fewer silos, a lower minimum or more data",
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

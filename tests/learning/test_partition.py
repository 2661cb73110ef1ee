"""The partitions: what must hold for any labels, and what each is for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.errors import DataError
from gptfl_dist.learning.partition import (
    dirichlet_partition,
    key_partition,
    quantity_partition,
    shard_partition,
)


@given(
    labels=st.lists(st.integers(0, 9), min_size=60, max_size=400).map(np.array),
    silos=st.integers(1, 6),
    alpha=st.sampled_from([0.1, 0.5, 1.0, 100.0]),
    minimum=st.integers(0, 3),
    seed=st.integers(0, 2**63 - 1),
)
def test_disjoint_complete_repeatable_and_no_silo_below_the_minimum(
    labels: np.ndarray, silos: int, alpha: float, minimum: int, seed: int
) -> None:
    try:
        parts = dirichlet_partition(labels, silos, alpha, minimum, seed)
    except DataError:
        # One label among many silos at a small alpha: some silo is left without in nearly every draw.
        assert alpha <= 0.5
        assert silos > 1
        assert minimum > 0
        return
    assert len(parts) == silos
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert min(map(len, parts)) >= minimum
    again = dirichlet_partition(labels, silos, alpha, minimum, seed)
    assert all(np.array_equal(one, two) for one, two in zip(parts, again, strict=True))


def test_no_silo_far_above_its_even_share() -> None:
    """A silo that has its share gets no more, so at most one label's samples come on top of it."""
    labels = np.repeat(np.arange(10), 100)
    for seed in range(20):
        sizes = [len(part) for part in dirichlet_partition(labels, 4, 0.1, 1, seed)]
        assert max(sizes) < 1000 / 4 + 100


def test_alpha_sets_the_heterogeneity() -> None:
    labels = np.repeat(np.arange(10), 100)

    def largest_label_share(alpha: float) -> float:
        parts = dirichlet_partition(labels, 4, alpha, 10, seed=3)
        return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))

    assert largest_label_share(0.1) > 0.3
    assert largest_label_share(1000.0) < 0.15


def test_labels_of_any_kind() -> None:
    labels = np.array(["cat", "dog"] * 50)
    assert sum(map(len, dirichlet_partition(labels, 3, 1.0, 5, 0))) == 100


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(DataError, match="cannot give"):
        dirichlet_partition(np.zeros(10, dtype=int), 4, 1.0, 3, 0)
    with pytest.raises(DataError, match="larger alpha"):
        dirichlet_partition(np.zeros(20, dtype=int), 10, 0.01, 2, 0)


@given(
    labels=st.lists(st.integers(0, 9), min_size=24, max_size=200).map(np.array),
    silos=st.integers(1, 6),
    shards=st.integers(1, 4),
    seed=st.integers(0, 2**63 - 1),
)
def test_shards_are_dealt_out_whole(labels: np.ndarray, silos: int, shards: int, seed: int) -> None:
    parts = shard_partition(labels, silos, shards, seed)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert max(map(len, parts)) - min(map(len, parts)) <= shards
    again = shard_partition(labels, silos, shards, seed)
    assert all(np.array_equal(one, two) for one, two in zip(parts, again, strict=True))


def test_two_shards_hold_few_labels() -> None:
    """Labels of 100 samples and shards of 50: no shard has two labels, no silo more than two."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    for seed in range(10):
        assert max(len(np.unique(labels[part])) for part in shard_partition(labels, 10, 2, seed)) <= 2


def test_more_shards_than_samples_are_refused() -> None:
    with pytest.raises(DataError, match="10 samples cannot be cut into 12 shards"):
        shard_partition(np.arange(10), 4, 3, 0)


@given(
    count=st.integers(30, 300),
    silos=st.integers(1, 6),
    alpha=st.sampled_from([0.01, 0.1, 1.0, 100.0]),
    minimum=st.integers(0, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_quantities_differ_and_none_is_below_the_minimum(
    count: int, silos: int, alpha: float, minimum: int, seed: int
) -> None:
    labels = np.arange(count) % 10
    parts = quantity_partition(labels, silos, alpha, minimum, seed)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(count))
    assert min(map(len, parts)) >= minimum


def test_a_small_alpha_makes_sizes_unlike_and_leaves_the_mixture_alike() -> None:
    labels = np.arange(10_000) % 10
    sizes = [len(part) for part in quantity_partition(labels, 5, 1000.0, 100, 0)]
    assert max(sizes) < 2.0 * min(sizes)
    parts = quantity_partition(labels, 5, 0.5, 500, 0)
    assert max(map(len, parts)) > 3 * min(map(len, parts))
    for part in parts:
        assert np.bincount(labels[part]).max() < 0.16 * len(part)


def test_what_belongs_together_stays_together() -> None:
    keys = np.array(["theo", "jackson", "theo", "lucas"])
    parts = key_partition(keys)
    assert {key: part.tolist() for key, part in parts.items()} == {"jackson": [1], "lucas": [3], "theo": [0, 2]}

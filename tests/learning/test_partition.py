"""The Dirichlet partition: what must hold for any labels, and what alpha does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.errors import DataError
from gptfl_dist.learning.partition import dirichlet_partition


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

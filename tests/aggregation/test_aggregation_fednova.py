"""The length of a silo's walk is the paper's closed form, and equal walks are plain averaging."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_aggregation_rules import TRAINING, outcome, updates_of

from gptfl_dist.aggregation.fednova import length
from gptfl_dist.config.plan import batch_count
from gptfl_dist.config.strategy import Strategy

epochs, samples, sizes = st.integers(1, 5), st.integers(1, 500), st.integers(1, 64)


def training(**settings: float):
    return TRAINING.model_copy(update=settings)


@given(epochs, samples, sizes)
def test_of_plain_sgd_it_is_the_number_of_steps(rounds: int, count: int, size: int) -> None:
    told = length(training(epochs=rounds, batch_size=size), count)
    assert told == pytest.approx(rounds * batch_count(count, size))


@given(st.integers(1, 60), st.floats(0.05, 0.95))
def test_with_momentum_it_is_the_sum_of_the_papers_coefficients(steps: int, momentum: float) -> None:
    told = length(training(epochs=steps, batch_size=64, momentum=momentum), 10)
    assert told == pytest.approx(sum((1 - momentum**k) / (1 - momentum) for k in range(1, steps + 1)), rel=1e-9)


@given(st.integers(1, 60), st.floats(0.01, 0.9))
def test_with_the_proximal_term_it_is_the_sum_of_the_papers_coefficients(steps: int, strength: float) -> None:
    told = length(training(epochs=steps, batch_size=64, learning_rate=1.0, proximal=strength), 10)
    assert told == pytest.approx(sum((1 - strength) ** k for k in range(steps)), rel=1e-9)


def test_silos_that_walk_alike_are_averaged_plainly() -> None:
    rows, counts = np.random.default_rng(0).standard_normal((3, 5)), [100, 100, 100]
    plain, _ = outcome(Strategy(), updates_of(rows, samples=counts))
    nova, _ = outcome(Strategy(rule="fednova"), updates_of(rows, samples=counts))
    np.testing.assert_allclose(nova, plain, rtol=1e-12)


def test_a_silo_counts_by_its_samples_and_not_once_more_by_its_steps() -> None:
    """One silo makes ten times the steps: each moves the model by its share of the mean length."""
    counts = [80, 800]
    rows = np.array([[10.0, 0.0], [0.0, 100.0]])  # as long as they made steps of length 1
    found, _ = outcome(Strategy(rule="fednova"), updates_of(rows, samples=counts))
    effective = (80 * 10 + 800 * 100) / 880
    np.testing.assert_allclose(found, [effective * 80 / 880, effective * 800 / 880], rtol=1e-12)

"""A silo's own policy wins over what the coordinator asks."""

from __future__ import annotations

import dataclasses

import pytest

from gptfl_dist.config.plan import LocalTraining
from gptfl_dist.config.silo import Policy
from gptfl_dist.errors import PolicyError
from gptfl_dist.federation.orders import Order
from gptfl_dist.federation.silo import PolicyGuard


def order(nonce: str, epochs: int = 1) -> Order:
    training = LocalTraining(
        epochs=epochs, batch_size=8, learning_rate=0.1, momentum=0, weight_decay=0, augmentation=False, threads=1
    )
    return Order("train", nonce, "gptfl", 1, "00" * 32, 60.0, training)


def test_more_epochs_than_allowed_are_refused_and_an_evaluation_is_not():
    guard = PolicyGuard(Policy(max_epochs_per_round=2))
    guard.check(order("a", epochs=2))
    with pytest.raises(PolicyError, match="max_epochs_per_round allows 2"):
        guard.check(order("b", epochs=3))
    guard.check(Order("evaluate", "c", "gptfl", 2, "00" * 32, 60.0))


def test_rounds_are_counted_once_an_order_however_often_it_comes():
    guard = PolicyGuard(Policy(max_rounds=2))
    for nonce in ("a", "a", "a", "b", "b"):
        guard.check(order(nonce))
    with pytest.raises(PolicyError, match="max_rounds allows 2 rounds"):
        guard.check(order("c"))


MEANS = {"trained": "means"}


@pytest.mark.parametrize("changed", [{"epochs": 3}, MEANS], ids=["epochs", "class means"])
def test_what_the_policy_does_not_allow_is_refused_under_a_nonce_that_was_allowed_before(changed):
    guard, first = PolicyGuard(Policy(max_epochs_per_round=2)), order("a")
    guard.check(first)
    with pytest.raises(PolicyError):
        guard.check(dataclasses.replace(first, training=first.training.model_copy(update=changed)))


@pytest.mark.parametrize(
    "changed", [{"kind": "evaluate", "training": None}, {"base": "11" * 32}, {"round": 2}], ids=str
)
def test_an_order_that_comes_again_changed_is_refused_though_the_policy_allows_it(changed):
    guard, first = PolicyGuard(Policy()), order("a")
    guard.check(first)
    with pytest.raises(PolicyError, match="under the nonce of another"):
        guard.check(dataclasses.replace(first, **changed))
    guard.check(first)
    assert guard.rounds == 1


def test_a_coordinator_started_again_may_wait_longer_and_in_a_new_epoch():
    guard = PolicyGuard(Policy(max_rounds=1))
    guard.check(order("a"))
    guard.check(dataclasses.replace(order("a"), seconds=120.0, epoch=2))


def test_a_model_above_the_limit_is_refused():
    guard = PolicyGuard(Policy(max_model="1MiB"))
    guard.check_model(1 << 20)
    with pytest.raises(PolicyError, match=r"policy\.max_model allows 1048576"):
        guard.check_model((1 << 20) + 1)


def test_synthetic_samples_above_the_limit_are_refused():
    guard = PolicyGuard(Policy(max_synthetic="1MiB"))
    guard.check_samples(1 << 20)
    with pytest.raises(PolicyError, match=r"policy\.max_synthetic allows 1048576"):
        guard.check_samples((1 << 20) + 1)
    with pytest.raises(PolicyError):
        PolicyGuard(Policy(max_synthetic="0B")).check_samples(1)


def test_class_means_are_refused_unless_the_policy_allows_them():
    means = dataclasses.replace(order("a"), training=order("a").training.model_copy(update={"trained": "means"}))
    with pytest.raises(PolicyError, match=r"policy\.class_means is false"):
        PolicyGuard(Policy()).check(means)
    PolicyGuard(Policy(class_means=True)).check(means)


def test_only_metrics_that_the_policy_names_leave():
    guard = PolicyGuard(Policy(metrics=["accuracy"]))
    assert guard.release({"accuracy": 0.5, "loss": 1.0, "patients": 12.0}) == {"accuracy": 0.5}

"""What a silo remembers of a run: whatever an honest coordinator asks for is taken, and nothing that goes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.errors import PolicyError
from gptfl_dist.federation.freshness import Memory, Reached
from gptfl_dist.federation.orders import Order

ARMS = ("fedavg_random", "gptfl")


def order(arm: str, round_: int, base: str = "") -> Order:
    return Order("train", "n", arm, round_, base or f"{round_:064x}", 1.0)


honest = st.lists(st.tuples(st.sampled_from(ARMS), st.integers(0, 3)), max_size=30)


def taken(steps: list[tuple[str, int]]) -> tuple[Memory, dict[str, int]]:
    """The memory after orders of which each is some rounds further in its arm than the one before."""
    memory, rounds = Memory(), dict.fromkeys(ARMS, 1)
    for arm, further in steps:
        rounds[arm] += further
        memory = memory.after(order(arm, rounds[arm]))
    return memory, {arm: rounds[arm] for arm, _ in steps}


@given(honest)
def test_orders_that_go_on_or_come_again_are_taken(steps: list[tuple[str, int]]) -> None:
    memory, rounds = taken(steps)
    for arm, round_ in rounds.items():
        assert memory.after(order(arm, round_)) == memory


@given(honest, st.data())
def test_an_order_of_an_earlier_round_is_refused_whatever_came_before(
    steps: list[tuple[str, int]], data: st.DataObject
) -> None:
    memory, rounds = taken([*steps, ("gptfl", 1)])
    arm = data.draw(st.sampled_from(sorted(rounds)))
    earlier = data.draw(st.integers(0, rounds[arm] - 1))
    with pytest.raises(PolicyError, match=f"^rollback: round {earlier} of {arm} .* gptfl epoch"):
        memory.after(order(arm, earlier))


def test_other_weights_for_a_round_that_was_seen_are_refused() -> None:
    memory = Memory().after(order("gptfl", 4, "a" * 64))
    with pytest.raises(PolicyError, match="rollback: round 4 of gptfl is asked for with the weights bbbbbbbbbbbb"):
        memory.after(order("gptfl", 4, "b" * 64))


def test_after_a_new_epoch_a_round_may_have_any_weights_once() -> None:
    memory = Memory(epoch=2, arms={"gptfl": Reached(3)}).after(order("gptfl", 3, "a" * 64))
    with pytest.raises(PolicyError):
        memory.after(order("gptfl", 3, "b" * 64))
    with pytest.raises(PolicyError):
        memory.after(order("gptfl", 2))


def test_a_coordinator_cannot_fill_the_disk_with_arms() -> None:
    memory = Memory(arms={str(number): Reached(1) for number in range(1000)})
    assert memory.after(order("7", 2)).arms["7"].round == 2
    with pytest.raises(PolicyError, match="more than 1000 arms"):
        memory.after(order("gptfl", 1))

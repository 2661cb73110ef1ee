"""How much one identity may take: rates that slow down, numbers that refuse, and memory that is given back."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.config.wire import Limits
from gptfl_dist.exchange.limits import Limiter, TooMuch
from gptfl_dist.exchange.seldom import Seldom


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 3)), min_size=1, max_size=60))
def test_whoever_waits_as_told_keeps_to_the_rate_whatever_the_pauses(steps: list[tuple[int, float]]) -> None:
    clock = Clock()
    limiter = Limiter(Limits(rate="4KiB/s"), clock)
    started, taken = clock.now, 0
    for size, pause in steps:
        clock.now += pause
        taken += size
        clock.now += limiter.received("a", size)
        assert taken <= 4096 * (clock.now - started + 1) + 1e-3  # a second's worth may be used at once


@given(st.integers(1, 100_000))
def test_others_are_not_slowed_and_neither_are_other_things(size: int) -> None:
    limiter = Limiter(Limits(rate="4KiB/s"), Clock())
    limiter.received("greedy", size)
    assert limiter.received("honest", 1) == 0
    assert limiter.sent("greedy", 1) == 0
    assert limiter.calls("greedy") == 0


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=40))
def test_never_more_is_under_way_than_allowed_and_all_of_it_ends(calls: list[tuple[str, bool]]) -> None:
    limits = Limits(connections=3, transfers=2)
    limiter = Limiter(limits, Clock())
    with contextlib.ExitStack() as stack:
        connections, transfers = set[str](), 0
        for connection, transfer in calls:
            fits = len(connections | {connection}) <= limits.connections and transfers + transfer <= limits.transfers
            if fits:
                stack.enter_context(limiter.under_way("a", connection, transfer=transfer))
                connections.add(connection)
                transfers += transfer
            else:
                with pytest.raises(TooMuch, match=r"exchange\.limits\."):
                    stack.enter_context(limiter.under_way("a", connection, transfer=transfer))
        with limiter.under_way("b", "z", transfer=True):
            pass  # another's account
    for connection in "xyz":
        with limiter.under_way("a", connection, transfer=True):
            pass


def test_accounts_that_say_nothing_are_forgotten_and_those_in_debt_are_not() -> None:
    clock = Clock()
    limiter = Limiter(Limits(calls=10), clock)
    for number in range(1000):
        clock.now += 10
        limiter.calls(f"silo-{number}")
        assert limiter.accounts <= 2
    limiter.calls("greedy", 10_000)
    clock.now += 100
    limiter.calls("other")
    assert limiter.calls("greedy") > 800


def test_what_happens_again_and_again_is_told_now_and_then_and_little_is_remembered() -> None:
    clock = Clock()
    seldom = Seldom(60.0, clock)
    assert [seldom.due("a") for _ in range(5)] == [True, False, False, False, False]
    assert seldom.due("b")
    clock.now += 61
    assert seldom.due("a")
    for number in range(100_000):
        seldom.due(number)
    assert len(seldom._told) <= 1024

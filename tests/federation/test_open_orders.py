"""Orders that outlive their round: asynchronous rounds, and late updates carried over. Driven by random silos."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfl_dist.federation.asynchronous import AsynchronousCoordinator
from gptfl_dist.federation.coordinator import Coordinator, Rules
from gptfl_dist.federation.steps import (
    Aggregate,
    Aggregated,
    Barred,
    Call,
    Command,
    DeadlinePassed,
    Delivered,
    Enlist,
    Failed,
    Finish,
    GiveUp,
    Joined,
    Left,
    Recall,
    SetDeadline,
    StartRound,
)

SILOS = ("a", "b", "c", "d")


def rules(**changes) -> Rules:
    default = Rules(seed=0, silos=SILOS, rounds=3, cohort=4, quorum=2, deadline=60.0, join_deadline=30.0, buffer=2)
    return dataclasses.replace(default, **changes)


def carrying(**changes) -> Coordinator:
    return Coordinator(rules(buffer=None, carry=True, **changes))


def test_a_round_takes_the_first_updates_and_the_others_stay_at_work():
    machine = AsynchronousCoordinator(rules())
    machine.begin(SILOS)
    assert machine.handle(Delivered("c", 1)) == []
    assert machine.handle(Delivered("a", 1)) == [Aggregate(1, ("a", "c"))]
    assert machine.handle(Delivered("b", 1)) == []  # while the others are aggregated: it counts in the next round
    started = machine.handle(Aggregated(1))
    assert StartRound(2, ("a", "c"), "train") in started
    assert [c for c in started if isinstance(c, Call)] == [Call("a", 2), Call("c", 2)]
    assert machine.handle(Delivered("d", 1)) == [Aggregate(2, ("b", "d"))]


def test_a_full_buffer_is_aggregated_before_anybody_is_called_on_with_weights_that_are_old_at_once():
    machine = AsynchronousCoordinator(rules())
    machine.begin(SILOS)
    for silo in SILOS:
        machine.handle(Delivered(silo, 1))
    assert machine.handle(Aggregated(1)) == [
        SetDeadline(2, "gather", 30.0),
        StartRound(2, (), "train"),
        SetDeadline(2, "train", 60.0),
        Aggregate(2, ("c", "d")),
    ]


def test_a_place_in_the_cohort_that_gets_free_goes_to_somebody_else():
    machine = AsynchronousCoordinator(rules(cohort=2))
    commands = machine.begin(SILOS)
    first = [c.silo for c in commands if isinstance(c, Call)]
    assert len(first) == 2
    (enlist, call) = machine.handle(Failed(first[0], 1, "out of memory"))
    assert isinstance(enlist, Enlist)
    assert call == Call(enlist.silos[0], 1)
    assert enlist.silos[0] not in first
    (enlist, _) = machine.handle(Left(first[1]))
    assert machine.handle(Joined(first[1])) == [Call(first[1], 1)]  # its order waits for it


def test_nobody_there_is_waited_for_until_the_deadline():
    machine = AsynchronousCoordinator(rules(silos=("a", "b"), cohort=2))
    machine.begin("ab")
    machine.handle(Failed("a", 1, "out of memory"))
    assert machine.handle(Left("b")) == []
    assert machine.missing == {"b"}
    (give_up,) = machine.handle(DeadlinePassed(1, "train"))
    assert give_up == GiveUp(
        "round 1: 0 updates came before the deadline and 2 are needed; not connected: b; failed: a: out of memory"
    )


def test_a_carried_order_keeps_its_silo_out_of_the_cohorts_until_its_update_counted():
    machine = carrying(quorum=3)
    machine.begin(SILOS)
    for silo in "abc":
        machine.handle(Delivered(silo, 1))
    assert machine.handle(DeadlinePassed(1, "train")) == [Aggregate(1, ("a", "b", "c"))]
    assert machine.handle(Delivered("d", 1)) == []  # before the second round begins, in which it counts
    started = machine.handle(Aggregated(1))
    assert [c for c in started if isinstance(c, StartRound)] == [StartRound(2, ("a", "b", "c"), "train")]
    machine.handle(Failed("b", 2, "out of memory"))
    machine.handle(Delivered("a", 2))
    assert machine.handle(Delivered("c", 2)) == [Aggregate(2, ("a", "c", "d"))]
    assert StartRound(3, SILOS, "train") in machine.handle(Aggregated(2))


def test_a_carried_update_may_make_the_quorum_of_a_round_whose_own_silos_failed():
    machine = carrying(quorum=3)
    machine.begin(SILOS)
    for silo in "abc":
        machine.handle(Delivered(silo, 1))
    machine.handle(DeadlinePassed(1, "train"))
    machine.handle(Aggregated(1))
    machine.handle(Failed("b", 2, "out of memory"))
    machine.handle(Delivered("a", 2))
    assert machine.handle(Delivered("c", 2)) == []  # d may still deliver
    assert machine.handle(Delivered("d", 1)) == [Aggregate(2, ("a", "c", "d"))]


class World:
    """What a ledger would hold, and what must hold of every command."""

    def __init__(self, spec: Rules) -> None:
        self.spec = spec
        self.open: dict[str, int] = {}
        self.committed: dict[str, int] = {}
        self.counted: set[tuple[str, int]] = set()
        self.failed: dict[str, str] = {}
        self.cohort: tuple[str, ...] = ()
        self.connected: set[str] = set()
        self.deadlines: set[tuple[int, str]] = set()
        self.closed = 0
        self.unclosed: int | None = None
        self.aggregating: dict[str, int] = {}
        self.barred: set[str] = set()

    def take(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, StartRound):
                if command.round != self.unclosed:
                    self.cohort, self.failed = (), {}
                    self.enlist(command.round, command.cohort, limited=command.kind == "train")
                    self.unclosed = command.round if command.kind == "train" else None
            elif isinstance(command, Enlist):
                assert command.round == self.unclosed
                self.enlist(command.round, command.silos, limited=True)
            elif isinstance(command, Call):
                assert self.open[command.silo] == command.round
                assert command.silo in self.connected
            elif isinstance(command, Recall):
                old = self.open.pop(command.silo, None) or self.committed.pop(command.silo)
                assert old == command.round
            elif isinstance(command, SetDeadline):
                self.deadlines.add((command.round, command.state))
            elif isinstance(command, Aggregate):
                assert len(command.silos) >= self.spec.quorum
                assert set(command.silos) == set(self.committed)
                self.aggregating = {silo: self.committed.pop(silo) for silo in command.silos}
                for silo, round_ in self.aggregating.items():
                    assert (silo, round_) not in self.counted
                    assert command.round - round_ <= (self.spec.max_staleness or self.spec.rounds)
            elif isinstance(command, Finish):
                assert self.closed == self.spec.rounds
                assert not self.open
                assert set(command.evaluated) == set(self.committed)

        if self.spec.buffer is None and any(isinstance(c, StartRound) and c.kind == "train" for c in commands):
            engaged = self.open.keys() | self.committed.keys() | self.aggregating.keys()
            assert len(engaged) >= self.spec.quorum

    def enlist(self, round_: int, silos: tuple[str, ...], *, limited: bool) -> None:
        assert not set(silos) & (self.open.keys() | self.committed.keys() | self.aggregating.keys())
        assert not set(silos) & self.failed.keys()
        assert set(silos) <= self.connected
        self.open |= dict.fromkeys(silos, round_)
        self.cohort = tuple(sorted({*self.cohort, *silos}))
        at_work = {silo for silo, given in self.open.items() if silo in self.connected}
        own = {silo for silo, given in self.open.items() if given == round_}
        if limited and silos:
            assert len(at_work if self.spec.buffer else own) <= self.spec.cohort

    def close(self) -> None:
        self.closed, self.unclosed = self.closed + 1, None
        self.counted |= set(self.aggregating.items())
        self.aggregating = {}

    def restart(self, machine: Coordinator) -> list[Command]:
        """What a coordinator does that is started again on this ledger."""
        self.committed |= self.aggregating
        self.aggregating, self.deadlines = {}, set()
        if self.unclosed is not None:
            failed = self.failed
            if len(self.open) + len(self.committed) < self.spec.quorum:
                self.failed = {}  # it may be called on again
            return machine.resume(self.connected, self.unclosed, self.cohort, self.open, self.committed, failed)
        return machine.begin(self.connected, self.closed, self.open, self.committed)


@settings(max_examples=300)
@given(st.data())
def test_whatever_the_silos_do_the_run_ends_and_every_update_counts_once_at_most(data):
    asynchronous = data.draw(st.booleans())
    cohort = data.draw(st.integers(1, 4))
    wanted = data.draw(st.integers(1, 4)) if asynchronous else cohort
    spec = rules(
        rounds=data.draw(st.integers(1, 4)),
        cohort=cohort,
        quorum=data.draw(st.integers(1, wanted)),
        buffer=wanted if asynchronous else None,
        carry=not asynchronous,
        max_staleness=data.draw(st.sampled_from([None, 1, 2])),
    )
    kind = AsynchronousCoordinator if asynchronous else Coordinator
    world, machine = World(spec), kind(spec)
    world.connected = data.draw(st.sets(st.sampled_from(SILOS)))
    world.take(machine.begin(world.connected))
    revocations = 5
    for step in range(300):
        if machine.state == "done":
            break
        if machine.state != "aggregate":
            assert (machine.round, machine.state) in world.deadlines  # whatever happens, this state has an end
            assert machine.owed == world.open
        event = data.draw(
            st.sampled_from(["join", "leave", "bar", "deliver", "fail", "deadline", "stray", "close", "restart"])
        )
        silo = data.draw(st.sampled_from(SILOS))
        given_in = world.open.get(silo)
        if step % 10 == 9:
            event = "deadline" if machine.state != "aggregate" else "close"  # time goes on whatever the silos do
        if event == "bar" and revocations:  # an operator does not revoke for ever
            revocations -= 1
            world.barred.add(silo)
            world.connected.discard(silo)
            world.take(machine.handle(Barred(silo)))
            event = "fail"  # as the exchange says at once
        if event == "join":
            world.connected.add(silo)
            if silo in world.barred:
                world.barred.remove(silo)
                world.failed.pop(silo, None)
            world.take(machine.handle(Joined(silo)))
        elif event == "leave":
            world.connected.discard(silo)
            if machine.state == "evaluate":
                world.open.pop(silo, None)
            world.take(machine.handle(Left(silo)))
        elif event == "deliver" and given_in is not None:
            world.committed[silo] = world.open.pop(silo)
            world.take(machine.handle(Delivered(silo, given_in)))
        elif event == "fail" and given_in is not None:
            del world.open[silo]
            if given_in == world.unclosed:
                world.failed[silo] = "x"
            world.take(machine.handle(Failed(silo, given_in, "x")))
        elif event == "stray":
            stray = Delivered(silo, (given_in or machine.round) + data.draw(st.sampled_from([-1, 1])))
            assert machine.handle(stray) == []
        elif event == "deadline":
            world.take(machine.handle(DeadlinePassed(machine.round, machine.state)))
        elif event == "close" and machine.state == "aggregate":
            world.close()
            world.take(machine.handle(Aggregated(machine.round)))
        elif event == "restart" and machine.state != "evaluate":
            machine = kind(spec, assembled=data.draw(st.booleans()))
            machine.bar(world.barred)
            world.take(world.restart(machine))
    else:
        pytest.fail("300 events, each state with a deadline, and no end")

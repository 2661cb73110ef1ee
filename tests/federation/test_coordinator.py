"""The coordinator's state machine: driven by random silos, it ends, and never breaks its promises."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfl_dist.federation.coordinator import Coordinator, Rules
from gptfl_dist.federation.steps import (
    Aggregate,
    Aggregated,
    Barred,
    Call,
    DeadlinePassed,
    Delivered,
    Enlist,
    Failed,
    Finish,
    GiveUp,
    Halt,
    Joined,
    Left,
    Paused,
    Recall,
    Resumed,
    SetDeadline,
    StartRound,
)

SILOS = ("a", "b", "c", "d")


def rules(**changes) -> Rules:
    default = Rules(seed=0, silos=SILOS, rounds=2, cohort=4, quorum=3, deadline=60.0, join_deadline=30.0)
    return dataclasses.replace(default, **changes)


def calls(commands) -> list[str]:
    return [c.silo for c in commands if isinstance(c, Call)]


def test_a_round_waits_for_the_whole_cohort_and_then_aggregates_in_sorted_order():
    machine = Coordinator(rules())
    assert machine.begin(["a"]) == [SetDeadline(1, "gather", 30.0)]
    assert machine.handle(Joined("d")) == []
    assert machine.handle(Joined("c")) == []
    started = machine.handle(Joined("b"))
    assert started[0] == StartRound(1, SILOS, "train")
    assert calls(started) == list(SILOS)
    for silo in "dbc":
        assert machine.handle(Delivered(silo, 1)) == []
    assert machine.handle(Delivered("a", 1)) == [Aggregate(1, SILOS)]
    assert calls(machine.handle(Aggregated(1))) == list(SILOS)


def test_a_failing_silo_does_not_end_the_run_while_a_quorum_delivers():
    machine = Coordinator(rules())
    machine.begin(SILOS)
    machine.handle(Failed("b", 1, "refused: not finite"))
    machine.handle(Delivered("a", 1))
    machine.handle(Delivered("c", 1))
    assert machine.handle(Delivered("d", 1)) == [Aggregate(1, ("a", "c", "d"))]


def test_nobody_waits_for_a_silo_that_is_barred_until_it_joins_again():
    machine = Coordinator(rules())
    machine.begin(["a", "b", "c"])
    started = machine.handle(Barred("d"))
    assert started[0] == StartRound(1, ("a", "b", "c"), "train")
    for silo in "ab":
        machine.handle(Delivered(silo, 1))
    assert machine.handle(Delivered("c", 1)) == [Aggregate(1, ("a", "b", "c"))]
    assert calls(machine.handle(Aggregated(1))) == ["a", "b", "c"]
    machine.handle(Left("c"))
    assert machine.handle(Joined("d")) == []  # the round goes on with its cohort
    for silo in "ab":
        machine.handle(Delivered(silo, 2))
    machine.handle(Joined("c"))
    machine.handle(Delivered("c", 2))
    assert StartRound(3, SILOS, "evaluate") in machine.handle(Aggregated(2))


def test_a_revoked_silo_is_waited_for_where_there_is_no_quorum_without_it():
    machine = Coordinator(rules(quorum=4))
    machine.begin(["a", "b", "c", "d"])
    for silo in "abcd":
        machine.handle(Delivered(silo, 1))
    assert [machine.handle(Paused()), machine.handle(Aggregated(1))] == [[], []]
    assert machine.handle(Barred("d")) == machine.handle(Left("d")) == []
    assert machine.handle(Resumed()) == [SetDeadline(2, "gather", 30.0)]
    assert machine.missing == {"d"}
    assert calls(machine.handle(Joined("d"))) == list(SILOS)


def test_a_silo_that_is_revoked_before_the_first_round_is_waited_for_as_well_and_named_at_the_join_deadline():
    machine = Coordinator(rules(quorum=4))
    machine.begin(["a", "b", "d"])
    assert machine.handle(Barred("c")) == machine.handle(Barred("d")) == []  # though d is still connected
    (give_up,) = machine.handle(DeadlinePassed(1, "gather"))
    assert "2 silos are connected and 4 are needed; missing: c (revoked), d (revoked)" in give_up.reason
    assert give_up.revoked == ("c", "d")


def test_a_silo_that_is_revoked_in_mid_round_is_called_on_again_once_it_joins_anew_and_nobody_else_is():
    machine = Coordinator(rules(quorum=4))
    machine.begin(SILOS)
    for silo in "abc":
        machine.handle(Delivered(silo, 1))
    machine.handle(Barred("d"))
    assert machine.handle(Failed("d", 1, "revoked")) == [Halt(1), SetDeadline(1, "gather", 30.0)]
    assert (machine.state, machine.missing) == ("gather", {"d"})
    machine.handle(Left("a"))  # it has delivered
    assert machine.missing == {"d"}
    again = machine.handle(Joined("d"))
    assert again == [StartRound(1, SILOS, "train"), Enlist(1, ("d",)), SetDeadline(1, "train", 60.0), Call("d", 1)]
    assert machine.handle(Delivered("d", 1)) == [Aggregate(1, SILOS)]


def test_a_revoked_silo_s_place_in_a_round_goes_to_another_that_is_there():
    machine = Coordinator(rules(cohort=2, quorum=2))
    out, stays = calls(machine.begin(SILOS))
    machine.handle(Barred(out))
    machine.handle(Delivered(stays, 1))
    (instead,) = calls(machine.handle(Failed(out, 1, "revoked")))
    assert instead not in (out, stays)
    assert machine.handle(Delivered(instead, 1)) == [Aggregate(1, tuple(sorted([stays, instead])))]


def test_nobody_waits_for_a_revoked_silo_that_could_not_save_the_round():
    machine = Coordinator(rules(quorum=4))
    machine.begin(SILOS)
    for silo in "ab":
        machine.handle(Delivered(silo, 1))
    machine.handle(Failed("c", 1, "out of memory"))
    machine.handle(Barred("d"))
    (give_up,) = machine.handle(Failed("d", 1, "refused: it was revoked"))
    assert "2 of the 4" in give_up.reason
    assert "(c: out of memory; d: refused: it was revoked)" in give_up.reason
    assert (give_up.untrainable, give_up.revoked) == (False, ("d",))


def test_a_round_that_was_broken_off_below_its_quorum_enlists_others_and_who_failed():
    machine = Coordinator(rules())
    began = machine.resume(["a", "b"], 2, ["a", "b"], {}, {"a": 2}, {"b": "refused: it was revoked"})
    assert began == [SetDeadline(2, "gather", 30.0)]
    assert machine.missing == {"c", "d"}
    machine.handle(Barred("d"))
    again = machine.handle(Joined("c"))
    assert again[:2] == [StartRound(2, ("a", "b"), "train"), Enlist(2, ("b", "c"))]
    assert calls(again) == ["b", "c"]
    machine.handle(Delivered("b", 2))
    assert machine.handle(Delivered("c", 2)) == [Aggregate(2, ("a", "b", "c"))]


def test_without_a_quorum_the_run_ends_and_says_which_silo_failed_and_why():
    machine = Coordinator(rules())
    machine.begin(SILOS)
    machine.handle(Failed("b", 1, "out of memory"))
    machine.handle(Failed("c", 1, "refused"))
    machine.handle(Delivered("a", 1))
    (give_up,) = machine.handle(Delivered("d", 1))
    assert isinstance(give_up, GiveUp)
    assert "b: out of memory" in give_up.reason
    assert "2 of the 4" in give_up.reason


def test_at_the_deadline_the_late_are_recalled_and_a_quorum_is_enough():
    machine = Coordinator(rules())
    machine.begin(SILOS)
    for silo in "abc":
        machine.handle(Delivered(silo, 1))
    ended = machine.handle(DeadlinePassed(1, "train"))
    assert [c.silo for c in ended if isinstance(c, Recall)] == ["d"]
    assert ended[-1] == Aggregate(1, ("a", "b", "c"))


def test_a_silo_that_comes_back_in_mid_round_gets_its_order_again_but_not_after_delivery():
    machine = Coordinator(rules())
    machine.begin(SILOS)
    machine.handle(Left("a"))
    assert machine.handle(Joined("a")) == [Call("a", 1)]
    machine.handle(Delivered("a", 1))
    machine.handle(Left("a"))
    assert machine.handle(Joined("a")) == []


def test_a_resumed_round_calls_only_on_those_who_have_not_delivered():
    machine = Coordinator(rules())
    commands = machine.resume(["a", "b", "d"], 2, ["a", "b", "d"], {"a": 2, "d": 2}, {"b": 2}, {})
    assert calls(commands) == ["a", "d"]
    machine.handle(Delivered("a", 2))
    assert machine.handle(Delivered("d", 2)) == [Aggregate(2, ("a", "b", "d"))]


def test_a_resumed_round_in_which_all_have_delivered_aggregates_at_once():
    machine = Coordinator(rules())
    assert machine.resume([], 1, SILOS, {}, dict.fromkeys(SILOS, 1), {})[-1] == Aggregate(1, SILOS)


def test_a_resumed_round_does_not_call_again_on_who_had_failed():
    machine = Coordinator(rules())
    assert calls(machine.resume(SILOS, 2, SILOS, {"a": 2, "d": 2}, {"b": 2}, {"c": "out of memory"})) == ["a", "d"]
    machine.handle(Delivered("a", 2))
    assert machine.handle(Delivered("d", 2)) == [Aggregate(2, ("a", "b", "d"))]


def test_a_round_fails_for_the_training_or_for_want_of_silos_and_tells_which():
    machine = Coordinator(rules(quorum=4))
    machine.begin(SILOS)
    for silo in "abc":
        machine.handle(Delivered(silo, 1))
    (give_up,) = machine.handle(Failed("d", 1, "the loss became nan"))
    assert give_up.untrainable
    machine = Coordinator(rules(quorum=4))
    machine.begin(SILOS)
    for silo in "abc":
        machine.handle(Delivered(silo, 1))
    give_up = machine.handle(DeadlinePassed(1, "train"))[-1]
    assert isinstance(give_up, GiveUp)
    assert not give_up.untrainable
    machine = Coordinator(rules())
    machine.begin(["a"])
    (give_up,) = machine.handle(DeadlinePassed(1, "gather"))
    assert not give_up.untrainable


def test_the_draw_does_not_depend_on_who_was_quick_but_an_absent_silo_is_waited_for_once():
    few = rules(cohort=2, quorum=1)
    machine = Coordinator(few)
    machine.begin(["d", "c"])
    machine.handle(Joined("b"))
    started = machine.handle(Joined("a"))
    assert started[0] == Coordinator(few).begin(SILOS)[1]
    machine = Coordinator(few)
    assert calls(machine.begin(["a", "b", "c"])) == []
    first = machine.handle(DeadlinePassed(1, "gather"))
    assert len(calls(first)) == 2
    for silo in calls(first):
        machine.handle(Delivered(silo, 1))
    assert len(calls(machine.handle(Aggregated(1)))) == 2
    assert len(calls(Coordinator(few, assembled=True).begin(["a", "b", "c"]))) == 2


def test_too_few_silos_at_the_join_deadline_names_the_missing():
    machine = Coordinator(rules())
    machine.begin(["a", "c"])
    (give_up,) = machine.handle(DeadlinePassed(1, "gather"))
    assert "missing: b, d" in give_up.reason
    machine = Coordinator(rules())
    machine.begin(["a", "c", "d"])
    assert calls(machine.handle(DeadlinePassed(1, "gather"))) == ["a", "c", "d"]


def test_the_cohort_is_drawn_without_replacement_alike_for_the_same_seed_and_differently_by_round():
    def cohorts(seed: int) -> list[tuple[str, ...]]:
        machine = Coordinator(rules(rounds=20, cohort=2, quorum=1, seed=seed))
        commands = machine.begin(SILOS)
        drawn = []
        for round_ in range(1, 21):
            (start,) = [c for c in commands if isinstance(c, StartRound)]
            drawn.append(start.cohort)
            for silo in start.cohort:
                machine.handle(Delivered(silo, round_))
            commands = machine.handle(Aggregated(round_))
        return drawn

    drawn = cohorts(7)
    assert all(len(set(cohort)) == 2 for cohort in drawn)
    assert {silo for cohort in drawn for silo in cohort} == set(SILOS)
    assert len(set(drawn)) > 1
    assert drawn == cohorts(7) != cohorts(8)


def test_a_pause_lets_the_round_end_and_opens_no_other_until_it_is_over():
    machine = Coordinator(rules())
    machine.begin(SILOS)
    assert machine.handle(Paused()) == []
    for silo in "abcd":
        commands = machine.handle(Delivered(silo, 1))
    assert commands == [Aggregate(1, SILOS)]
    assert machine.handle(Aggregated(1)) == []
    assert (machine.state, machine.round, machine.owed, machine.missing) == ("paused", 2, {}, set())
    assert machine.handle(Left("a")) == machine.handle(Joined("a")) == machine.handle(DeadlinePassed(2, "gather")) == []
    again = machine.handle(Resumed())
    assert again[0] == SetDeadline(2, "gather", 30.0)  # it runs anew
    assert calls(again) == list(SILOS)


def test_a_pause_holds_the_wait_for_silos_and_a_resumed_run_waits_on():
    machine = Coordinator(rules())
    machine.begin(["a"])
    machine.handle(Paused())
    assert machine.state == "paused"
    assert [machine.handle(Joined(silo)) for silo in "bcd"] == [[], [], []]
    assert calls(machine.handle(Resumed())) == list(SILOS)
    assert machine.handle(Resumed()) == []


def test_a_machine_that_begins_paused_stays_so_and_one_that_resumes_a_round_ends_it_first():
    machine = Coordinator(rules())
    machine.handle(Paused())
    assert machine.begin(SILOS, 1) == []
    assert machine.state == "paused"
    machine = Coordinator(rules())
    machine.handle(Paused())
    assert calls(machine.resume(SILOS, 1, SILOS, dict.fromkeys("bcd", 1), {"a": 1}, {})) == ["b", "c", "d"]


def test_a_round_that_is_said_to_be_the_last_is_followed_by_the_evaluation():
    machine = Coordinator(rules(rounds=9))
    machine.begin(SILOS)
    for silo in SILOS:
        machine.handle(Delivered(silo, 1))
    assert machine.handle(Aggregated(1, last=True))[1] == StartRound(2, SILOS, "evaluate")
    assert Coordinator(rules(rounds=9)).begin(SILOS, 1, last=True)[1] == StartRound(2, SILOS, "evaluate")


@settings(max_examples=100)
@given(st.data())
def test_whatever_the_silos_do_the_run_ends_and_only_deliveries_of_the_cohort_are_aggregated(data):
    cohort = data.draw(st.integers(1, 4))
    spec = rules(rounds=data.draw(st.integers(1, 3)), cohort=cohort, quorum=data.draw(st.integers(1, cohort)))
    machine = Coordinator(spec)
    pending = list(machine.begin(data.draw(st.sets(st.sampled_from(SILOS)))))
    begun, cohort_now = 0, ()
    delivered: set[str] = set()
    barred: set[str] = set()
    rounds: list[int] = []
    last, paused, revocations = spec.rounds, False, 0
    for step in range(200):
        for command in pending:
            if isinstance(command, StartRound):
                assert not paused
                if begun != command.round:
                    begun, cohort_now, delivered = command.round, command.cohort, set()
                    assert len(cohort_now) >= (spec.quorum if command.kind == "train" else 1)
                assert command.cohort == cohort_now
                assert len(set(cohort_now)) == len(cohort_now)
                assert not barred & set(calls(pending))
            if isinstance(command, Enlist):
                assert len(delivered | set(command.silos)) >= spec.quorum
                cohort_now = tuple(sorted({*cohort_now, *command.silos}))
            if isinstance(command, Call):
                assert command.silo in cohort_now
                assert command.silo not in delivered
            if isinstance(command, Aggregate):
                assert set(command.silos) <= set(cohort_now)
                assert set(command.silos) == delivered
                assert len(command.silos) >= spec.quorum
                rounds.append(command.round)
            if isinstance(command, GiveUp):
                assert "()" not in command.reason
            if isinstance(command, Finish):
                assert rounds == list(range(1, last + 1))
        if machine.state == "done":
            break
        if machine.state == "aggregate":
            if data.draw(st.booleans()):
                last = min(last, machine.round)
            pending = machine.handle(Aggregated(machine.round, last=last == machine.round))
            continue
        silo = data.draw(st.sampled_from(SILOS))
        kind = data.draw(
            st.sampled_from(["join", "leave", "bar", "deliver", "fail", "deadline", "early", "late", "pause"])
        )
        if step % 10 == 9:
            kind = "resume" if paused else "deadline"  # time goes on whatever the silos do
        if kind == "bar":
            revocations += 1  # an operator does not revoke for ever
            kind = "bar" if revocations <= 5 else "leave"
        barred = barred | {silo} if kind == "bar" else barred - {silo} if kind == "join" else barred
        paused = kind == "pause" or (paused and kind != "resume")
        if kind == "deliver" and machine.state == "train" and silo in machine.owed:
            delivered.add(silo)
        events = {
            "join": Joined(silo),
            "leave": Left(silo),
            "bar": Barred(silo),
            "deliver": Delivered(silo, machine.round),
            "fail": Failed(silo, machine.round, "x"),
            "deadline": DeadlinePassed(machine.round, machine.state),
            "early": Delivered(silo, machine.round + 1),
            "late": Delivered(silo, machine.round - 1),
            "pause": Paused(),
            "resume": Resumed(),
        }
        pending = machine.handle(events[kind])
    else:
        pytest.fail("200 events, each round with deadlines, and no end")

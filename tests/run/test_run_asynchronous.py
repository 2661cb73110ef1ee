"""The federator in asynchronous mode, and with late updates carried over: who counts when, and with what weight."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federated import (
    ARM,
    DEADLINE,
    LAYOUT,
    SAMPLES,
    START,
    STEPS,
    Metrics,
    World,
    failing,
    in_loop,
    mean_step,
    value_of,
)

from gptfl_dist.errors import FederationError
from gptfl_dist.federation.orders import Order
from gptfl_dist.ledger.records import ArmRecord, CountedUpdate
from gptfl_dist.run.arm import validation_of
from gptfl_dist.run.arms import run_arms
from gptfl_dist.testing.clock import advance


def counted(record: ArmRecord) -> list[dict[str, int]]:
    """The staleness of each update that counted, by round and silo."""
    return [{u.silo: u.staleness for u in r.updates} for r in record.rounds if r.kind == "train"]


def asynchronous(folder: Path, **rules: Any) -> World:
    """Two updates a round, of three silos; a stale update's weight is halved, then a third ..."""
    settings = {"mode": "asynchronous", "buffer": 2, "quorum": "all", "staleness": 1.0} | rules
    return World(folder, **settings)


# Asynchronous rounds


@in_loop
async def test_a_slow_silo_stops_nobody_and_its_stale_update_counts_less(tmp_path: Path) -> None:
    async with asynchronous(tmp_path) as world:
        slow = world.network.hold("c", "download", round=1)  # it has yet to fetch the weights of two rounds ago
        idle = world.network.hold("a", "upload", round=3)
        run = asyncio.create_task(world.federate())
        await idle.reached.wait()
        slow.release()
        record = await run
        idle.release()
    assert counted(record) == [{"a": 0, "b": 0}, {"a": 0, "b": 0}, {"b": 0, "c": 2}]
    assert record.rounds[2].updates == (CountedUpdate("b", 3, 0), CountedUpdate("c", 4, 2))
    last = 3 / 7 * STEPS["b"] + 4 / 7 * STEPS["c"] / 3  # n_k / n times 1 / (1 + 2)
    assert world.value() == START + 2 * mean_step("ab") + round(last)
    assert world.trained("c") == [(ARM, 1)]
    assert [order.failure for order in record.rounds[2].orders] == ["recalled: the last round is over", None]
    assert {o.silo for r in record.rounds if r.kind == "evaluate" for o in r.orders if o.digest == ""} == set("abc")
    assert world.notes.closed == [(ARM, r) for r in (1, 2, 3)]


@in_loop
async def test_the_bytes_of_all_rounds_are_those_that_the_silos_moved(tmp_path: Path) -> None:
    async with asynchronous(tmp_path, rounds=4) as world:
        record = await world.federate()
    trained = sum(len(world.trained(silo)) for silo in SAMPLES)
    assert sum(r.bytes_down or 0 for r in record.rounds) == (trained + 3) * LAYOUT.nbytes
    committed = sum(o.digest not in (None, "") for r in record.rounds for o in r.orders)
    # What was on its way when the last round ended has moved too, and is recalled.
    assert committed * LAYOUT.nbytes <= sum(r.bytes_up or 0 for r in record.rounds) <= trained * LAYOUT.nbytes


@in_loop
async def test_no_more_than_a_cohort_trains_at_once_and_a_free_place_goes_to_another_silo(tmp_path: Path) -> None:
    async with asynchronous(tmp_path, cohort=1, buffer=3, rounds=4) as world:
        record = await world.federate()
    assert counted(record) == [dict.fromkeys("abc", 0)] * 4
    assert [set(r.cohort) for r in record.rounds] == [set("abc")] * 5


@in_loop
async def test_metrics_are_those_of_the_weights_that_the_order_named(tmp_path: Path) -> None:
    async with asynchronous(tmp_path, script=lambda s, o: {"accuracy": (0.9, 0.1, 0.2, 0.3)[o.round - 1]}) as world:
        slow = world.network.hold("c", "upload", round=1)
        idle = world.network.hold("a", "upload", round=3)
        run = asyncio.create_task(world.federate())
        await idle.reached.wait()
        slow.release()
        record = await run
        idle.release()
    told = [validation_of(record, r) for r in range(4)]
    assert [score and score[0] for score in told] == pytest.approx([0.9, 0.1, 0.2, 0.3])
    assert record.best_round == 0
    assert sum(o.samples or 0 for o in record.rounds[0].orders) == 8  # c told it with its stale update


@in_loop
async def test_the_best_weights_are_kept_though_late_metrics_change_which_they_are(tmp_path: Path) -> None:
    def script(silo: str, order: Order) -> Metrics:
        return {"accuracy": {1: 0.0 if silo == "c" else 0.9, 2: 0.5}.get(order.round, 0.2)}

    async with asynchronous(tmp_path, script=script, rounds=4) as world:
        slow = world.network.hold("c", "upload", round=1)  # until it tells otherwise, the start is the best
        idle = world.network.hold("a", "upload", round=3)
        run = asyncio.create_task(world.federate())
        await idle.reached.wait()
        slow.release()
        await world.until(lambda: (ARM, 3) in world.notes.closed)
        idle.release()
        record = await run
    assert record.best_round == 1
    assert value_of(world.model(ARM)) == START + mean_step("ab")


@in_loop
async def test_a_silo_whose_order_failed_is_called_on_again_in_the_next_round(tmp_path: Path) -> None:
    async with asynchronous(tmp_path, script=failing("c", 1)) as world:
        idle = world.network.hold("a", "upload", round=2)
        run = asyncio.create_task(world.federate())
        await idle.reached.wait()
        await world.until(lambda: world.committed(2) >= {"c"})
        idle.release()
        record = await run
    assert counted(record)[0] == {"a": 0, "b": 0}
    assert "c" in counted(record)[1]
    assert record.rounds[0].orders[2].failure == "TrainerError: out of memory"


@in_loop
async def test_a_round_for_which_nobody_works_any_more_makes_do_with_a_quorum(tmp_path: Path) -> None:
    def script(silo: str, order: Order) -> Metrics:
        return failing("b", 1)(silo, order) | failing("c", 1)(silo, order)

    async with asynchronous(tmp_path, quorum=1, script=script) as world:
        record = await world.federate()
    assert counted(record)[0] == {"a": 0}
    assert record.finished


@in_loop
async def test_where_no_quorum_can_come_any_more_the_run_ends_and_the_same_call_goes_on(tmp_path: Path) -> None:
    broken = {"b", "c"}

    def script(silo: str, order: Order) -> Metrics:
        return failing(silo, 1)(silo, order) if silo in broken else {}

    async with asynchronous(tmp_path, script=script) as world:
        with pytest.raises(FederationError, match="b: TrainerError: out of memory; c: TrainerError: out of memory"):
            await world.federate()
        broken.clear()
        record = await world.federate()
    assert world.trained("a").count((ARM, 1)) == 1
    assert record.finished


@in_loop
async def test_at_the_deadline_without_a_quorum_who_is_missing_is_named(tmp_path: Path) -> None:
    async with asynchronous(tmp_path, script=failing("a", 1)) as world:
        slow = world.network.hold("b", "upload", round=1)
        world.network.cut("c", "upload", round=1)
        gone = world.network.hold("c", "order", round=1)
        run = asyncio.create_task(world.federate())
        await slow.reached.wait()
        await gone.reached.wait()
        await world.until(lambda: any("a failed" in text for text in world.notes.texts))
        advance(DEADLINE)
        said = "0 updates came before the deadline and 2 are needed; still at work: b, c; failed: a: TrainerError"
        with pytest.raises(FederationError, match=said):
            await run


@in_loop
async def test_at_the_deadline_a_quorum_is_enough_and_the_others_go_on(tmp_path: Path) -> None:
    async with asynchronous(tmp_path, quorum=1, rounds=2) as world:
        slow = [world.network.hold(silo, "upload", round=1) for silo in "bc"]
        run = asyncio.create_task(world.federate())
        await world.until(lambda: world.committed(1) == {"a"} and all(one.reached.is_set() for one in slow))
        advance(DEADLINE)
        await world.until(lambda: (ARM, 1) in world.notes.closed)
        for one in slow:
            one.release()
        record = await run
    assert counted(record)[0] == {"a": 0}
    assert sum(len(r) for r in counted(record)) >= 3
    assert record.finished


@in_loop
async def test_an_order_that_grew_too_old_is_recalled_and_its_silo_called_on_anew(tmp_path: Path) -> None:
    async with asynchronous(tmp_path, max_staleness=1, rounds=4) as world:
        slow = world.network.hold("c", "upload", round=1)
        idle = world.network.hold("a", "upload", round=3)
        run = asyncio.create_task(world.federate())
        await slow.reached.wait()
        await idle.reached.wait()
        await world.until(lambda: "c" in world.committed(3))
        idle.release()
        record = await run
    reason = "it would be 2 rounds old, federation.max_staleness allows 1"
    assert record.rounds[0].orders[2].failure == f"recalled: {reason}"
    assert f"{ARM}, round 1: c recalled: {reason}" in world.notes.texts
    assert counted(record)[2] == {"b": 0, "c": 0}


@in_loop
async def test_a_silo_that_joins_late_is_called_on_in_mid_round(tmp_path: Path) -> None:
    async with asynchronous(tmp_path, rounds=2, join_deadline="10s") as world:
        slow = world.network.hold("a", "upload", round=1)
        world.join("a", "b")
        run = asyncio.create_task(world.federate_with())
        await world.until(lambda: world.at_work is not None and world.at_work.arm(ARM) is not None)
        advance(10)
        await world.until(lambda: world.committed(1) == {"b"} and slow.reached.is_set())
        world.join("c")
        await world.until(lambda: (ARM, 1) in world.notes.closed)
        slow.release()
        record = await run
    assert counted(record)[0] == {"b": 0, "c": 0}
    assert record.rounds[0].cohort == ("a", "b", "c")


# Late updates carried over


@in_loop
async def test_a_late_update_is_carried_over_with_its_staleness(tmp_path: Path) -> None:
    async with World(tmp_path, quorum="majority", late="carry", staleness=1.0) as world:
        late = world.network.hold("c", "upload", round=1)
        busy = world.network.hold("a", "upload", round=2)
        run = asyncio.create_task(world.federate())
        await late.reached.wait()
        await world.until(lambda: world.committed(1) == {"a", "b"})
        advance(DEADLINE)
        await busy.reached.wait()
        late.release()
        await world.until(lambda: world.committed(1) == {"a", "b", "c"})
        busy.release()
        record = await run
    assert [r.cohort for r in record.rounds] == [("a", "b", "c"), ("a", "b"), ("a", "b", "c"), ("a", "b", "c")]
    assert counted(record) == [{"a": 0, "b": 0}, {"a": 0, "b": 0, "c": 1}, dict.fromkeys("abc", 0)]
    second = 1 / 8 * STEPS["a"] + 3 / 8 * STEPS["b"] + 4 / 8 * STEPS["c"] / 2
    assert world.value() == START + mean_step("ab") + second + mean_step("abc")
    assert [order.failure for order in record.rounds[0].orders] == [None] * 3
    assert not any("recalled" in text for text in world.notes.texts)


@in_loop
async def test_without_a_quorum_at_the_deadline_the_late_are_named_and_keep_their_orders(tmp_path: Path) -> None:
    async with World(tmp_path, quorum="majority", late="carry") as world:
        late = [world.network.hold(silo, "upload", round=1) for silo in "bc"]
        run = asyncio.create_task(world.federate())
        await world.until(lambda: world.committed(1) == {"a"} and all(one.reached.is_set() for one in late))
        advance(DEADLINE)
        with pytest.raises(FederationError, match=r"1 updates came .* 2 are needed; still at work: b, c"):
            await run
        for one in late:
            one.release()
        await world.federate()
    assert world.trained("b").count((ARM, 1)) == 1
    assert world.value() == START + 3 * mean_step("abc")


# Restarts


async def interrupt(world: World, when: Callable[[], bool]) -> None:
    """Runs a coordinator until then, and drops it as a kill does."""
    async with world.coordinator() as federator:
        run = asyncio.create_task(run_arms(federator))
        await world.until(when)
        world.network.drop_coordinator()
        run.cancel()
        await asyncio.wait([run])


@in_loop
async def test_a_coordinator_that_is_started_again_in_mid_buffer_asks_for_nothing_twice(tmp_path: Path) -> None:
    async with asynchronous(tmp_path) as world:
        slow = [world.network.hold("c", "download", round=1), world.network.hold("b", "upload", round=2)]
        world.join(*world.trainers)
        await interrupt(world, lambda: world.committed(2) == {"a"} and all(one.reached.is_set() for one in slow))
        run = asyncio.create_task(world.federate())
        await world.until(lambda: any("going on in round 2" in text for text in world.notes.texts))
        slow[0].release()  # the weights of the first round are still handed out
        await world.until(lambda: (ARM, 2) in world.notes.closed)
        slow[1].release()
        record = await run
    assert counted(record)[:2] == [{"a": 0, "b": 0}, {"a": 0, "c": 1}]
    trained = [each for silo in SAMPLES for each in [(silo, r) for _, r in world.trained(silo)]]
    assert len(trained) == len(set(trained))


@in_loop
async def test_an_update_that_is_carried_over_a_restart_counts_once(tmp_path: Path) -> None:
    async with World(tmp_path, quorum="majority", late="carry", staleness=1.0) as world:
        late = world.network.hold("c", "upload", round=1)
        busy = world.network.hold("a", "upload", round=2)
        world.join(*world.trainers)

        async def past_the_deadline() -> None:
            await world.until(lambda: late.reached.is_set() and world.committed(1) == {"a", "b"})
            advance(DEADLINE)

        passing = asyncio.create_task(past_the_deadline())
        await interrupt(world, lambda: busy.reached.is_set() and world.committed(2) == {"b"})
        await passing
        run = asyncio.create_task(world.federate())
        await world.until(lambda: any("going on in round 2" in text for text in world.notes.texts))
        late.release()
        await world.until(lambda: world.committed(1) == {"a", "b", "c"})
        busy.release()
        record = await run
    assert counted(record) == [{"a": 0, "b": 0}, {"a": 0, "b": 0, "c": 1}, dict.fromkeys("abc", 0)]
    assert [world.trained(silo).count((ARM, 1)) for silo in "abc"] == [1, 1, 1]

"""What an operator asks while a federation runs, and what ends an arm early: real federator, silos and files."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from federated import ARM, JOIN_DEADLINE, ROUNDS, SAMPLES, START, Metrics, World, answered, in_loop, mean_step, value_of
from test_run_restart import live

from gptfl_dist.errors import RunAborted
from gptfl_dist.federation.orders import Order
from gptfl_dist.ledger.requests import LOOK_EVERY, ask_to_abort, ask_to_pause, ask_to_resume
from gptfl_dist.run.arm import stopped_name, trial_name
from gptfl_dist.run.arms import run_arms
from gptfl_dist.testing.clock import advance

WHOLE = START + ROUNDS * mean_step(SAMPLES)


async def noticed(world: World, happened: Callable[[], bool]) -> None:
    """Lets the coordinator look at what was asked until something follows from it."""
    looks = 0
    while not happened():
        looks += 1
        assert looks < 500, world.notes.texts
        advance(LOOK_EVERY)
        await asyncio.sleep(0.005)


def state(world: World) -> str:
    return "" if world.notes.standing is None else world.notes.standing.state


# Pause


@in_loop
async def test_a_pause_lets_the_round_end_and_then_nothing_happens_until_it_is_over(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        held = world.network.hold("c", "upload", round=2)
        run = asyncio.create_task(world.federate())
        await held.reached.wait()
        ask_to_pause(world.file.run_folder)
        await noticed(world, lambda: any("a pause was asked for" in text for text in world.notes.texts))
        held.release()
        await noticed(world, lambda: state(world) == "paused")
        assert world.committed(2) == {"a", "b", "c"}
        for _ in range(5):  # neither the join deadline nor that of a round means anything now
            advance(JOIN_DEADLINE)
            await asyncio.sleep(0.01)
        assert state(world) == "paused"
        assert world.notes.standing is not None
        assert world.notes.standing.connected == {"a", "b", "c"}
        assert world.notes.standing.seconds_left is None
        ask_to_resume(world.file.run_folder)
        await noticed(world, run.done)
        await run
    assert world.value() == WHOLE
    assert world.trained("a") == [(ARM, r) for r in range(1, ROUNDS + 1)]
    assert "paused before round 3 of fedavg_random; gptfl resume ends that" in world.notes.texts


@in_loop
async def test_a_pause_holds_over_a_restart_and_silos_that_come_meanwhile_wait_with_it(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        world.join("a", "b")
        async with world.coordinator() as federator:
            run = asyncio.create_task(run_arms(federator))
            await world.until(lambda: state(world) == "gather")
            ask_to_pause(world.file.run_folder)
            await noticed(world, lambda: state(world) == "paused")
            world.network.drop_coordinator()
            run.cancel()
            await asyncio.wait([run])
        told = len(world.notes.texts)
        world.join("c")
        async with world.coordinator() as federator:
            run = asyncio.create_task(run_arms(federator))
            await noticed(world, lambda: any("(3 of 3 are here)" in text for text in world.notes.texts[told:]))
            assert any("paused before round 1" in text for text in world.notes.texts[told:])
            assert not world.trained("a")
            ask_to_resume(world.file.run_folder)
            await noticed(world, run.done)
            await run
    assert world.value() == WHOLE


@in_loop
async def test_a_pause_goes_from_one_arm_to_the_next(tmp_path: Path) -> None:
    async with World(tmp_path, rates=[0.25, 0.5]) as world:
        held = world.network.hold("c", "report", round=2, arm=trial_name(ARM, 0.25))
        run = asyncio.create_task(world.federate())
        await held.reached.wait()
        ask_to_pause(world.file.run_folder)
        await noticed(world, lambda: any("a pause was asked for" in text for text in world.notes.texts))
        held.release()
        await noticed(world, lambda: state(world) == "paused")
        assert world.notes.standing is not None
        assert (world.notes.standing.arm, world.notes.standing.round) == (trial_name(ARM, 0.5), 1)
        ask_to_resume(world.file.run_folder)
        await noticed(world, run.done)
        await run
    assert world.value() == WHOLE


# Abort


@in_loop
async def test_an_abort_recalls_who_still_works_and_keeps_who_has_delivered(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        held = world.network.hold("c", "upload", round=2)
        run = asyncio.create_task(world.federate())
        await held.reached.wait()
        await world.until(lambda: world.committed(2) == {"a", "b"})
        ask_to_abort(world.file.run_folder, "wrong labels")
        await noticed(world, run.done)
        with pytest.raises(RunAborted, match="the run was aborted: wrong labels"):
            await run
    record = world.record()
    assert answered(record, 2) == {"a", "b"}
    (of_c,) = [order for order in record.rounds[1].orders if order.silo == "c"]
    assert of_c.failure == "recalled: the run was aborted: wrong labels"
    assert record.finished_rounds == 1


@in_loop
async def test_an_abort_ends_a_pause_and_a_wait_for_silos_too(tmp_path: Path) -> None:
    for name, pause in (("paused", True), ("waiting", False)):
        async with World(tmp_path / name) as world:
            world.join("a")
            run = asyncio.create_task(world.federate_with())
            await world.until(lambda world=world: world.notes.standing is not None)
            if pause:
                ask_to_pause(world.file.run_folder)
                await noticed(world, lambda world=world: state(world) == "paused")
            ask_to_abort(world.file.run_folder, "")
            await noticed(world, run.done)
            with pytest.raises(RunAborted, match=r"^the run was aborted\n"):
                await run


# What ends an arm before its last round


def told(*accuracy: float) -> Callable[[str, Order], Metrics]:
    """The accuracy on validation data of the weights after round 0, 1 ...; the last holds for all that follow."""
    return lambda silo, order: {"accuracy": accuracy[min(order.round, len(accuracy)) - 1]}


CRITERIA = {
    # The weights after round 2 reach it, which their silos tell in round 3.
    "target_accuracy": ({"target_accuracy": 0.8}, told(0.1, 0.5, 0.85, 0.9), 3),
    # Best after round 1; those after rounds 2 and 3 are no better, which round 4 tells.
    "patience": ({"patience": 2}, told(0.5, 0.6, 0.6, 0.55), 4),
    "max_time": ({"max_time": "1ms"}, told(0.5), 1),
}


@pytest.mark.parametrize("setting", CRITERIA)
@in_loop
async def test_an_arm_ends_early_where_a_setting_says_so_and_its_final_weights_are_evaluated(
    tmp_path: Path, setting: str
) -> None:
    rules, script, rounds = CRITERIA[setting]
    async with World(tmp_path, rounds=9, script=script, **rules) as world:
        record = await world.federate()
        with contextlib.closing(world.ledger()) as ledger:
            assert ledger.fact(stopped_name(ARM)) == setting
    assert [r.kind for r in record.rounds] == ["train"] * rounds + ["evaluate"]
    assert record.finished
    assert world.value() == START + rounds * mean_step(SAMPLES)
    assert world.notes.left == {ARM: 9 - rounds}
    (note,) = [text for text in world.notes.texts if f"federation.{setting}" in text]
    assert f"ends after {rounds} of 9 rounds" in note


@pytest.mark.parametrize("setting", CRITERIA)
@pytest.mark.parametrize("instant", ["after close_round", "before open_round", "before finish_arm"])
@in_loop
async def test_a_coordinator_that_was_killed_decides_alike(tmp_path: Path, setting: str, instant: str) -> None:
    rules, script, rounds = CRITERIA[setting]
    async with World(tmp_path, rounds=9, script=script, **rules) as world:
        world.join(*world.trainers)
        times = {"after close_round": rounds, "before open_round": rounds + 1, "before finish_arm": 1}
        assert (await live(world, [], instant, times[instant])).over
        assert not (await live(world, [])).over
        record = world.record()
    assert record.finished_rounds == rounds
    assert world.value() == START + rounds * mean_step(SAMPLES)


@in_loop
async def test_the_settings_end_no_tuning_trial_and_say_nothing_where_all_rounds_were_run(tmp_path: Path) -> None:
    rules = {"max_time": "1ms", "target_accuracy": 0.1, "patience": 1}
    async with World(tmp_path, rates=[0.25, 0.5], tuning=3, rounds=1, **rules) as world:
        await world.federate()
        for rate in (0.25, 0.5):
            assert world.record(trial_name(ARM, rate)).finished_rounds == 3
    assert not any("ends after" in text for text in world.notes.texts)
    assert world.notes.left == {}


def judged(*accuracy: float) -> Callable[[float], float]:
    """The accuracy on held-out synthetic data of the weights after round 0, 1 ...; the last holds for all others."""
    return lambda value: accuracy[min(round((value - START) / mean_step(SAMPLES)), len(accuracy) - 1)]


SYNTHETIC = {
    # The weights of a round are judged before the next, so that none is run to learn of them.
    "target_accuracy": ({"target_accuracy": 0.8}, judged(0.1, 0.5, 0.85, 0.9), 2, 2),
    "patience": ({"patience": 2}, judged(0.5, 0.6, 0.6, 0.55, 0.9), 3, 1),
}
"""The setting, what the synthetic data say, after how many rounds it ends the arm, and the round that is kept."""


@pytest.mark.parametrize("setting", SYNTHETIC)
@in_loop
async def test_held_out_synthetic_data_end_an_arm_and_choose_its_model_whatever_silos_and_test_data_say(
    tmp_path: Path, setting: str
) -> None:
    rules, judge, rounds, best = SYNTHETIC[setting]
    silos = told(0.99, 0.2, 0.1)
    async with World(
        tmp_path, rounds=9, script=silos, judged=judge, accuracy=lambda value: 0.9, choose_by="synthetic", **rules
    ) as world:
        record = await world.federate()
    assert (record.finished_rounds, record.best_round) == (rounds, best)
    steps = [START + r * mean_step(SAMPLES) for r in range(rounds + 1)]
    assert world.tester.judgements == steps
    assert value_of(world.model(ARM)) == steps[best]
    (note,) = [text for text in world.notes.texts if f"federation.{setting}" in text]
    assert "on held-out synthetic data after round" in note


@pytest.mark.parametrize("setting", SYNTHETIC)
@pytest.mark.parametrize("instant", ["after close_round", "before note_judged", "after note_judged"])
@pytest.mark.parametrize("count", [1, 2])
@in_loop
async def test_so_does_a_coordinator_that_was_killed(tmp_path: Path, setting: str, instant: str, count: int) -> None:
    rules, judge, rounds, best = SYNTHETIC[setting]
    async with World(tmp_path, rounds=9, judged=judge, choose_by="synthetic", **rules) as world:
        world.join(*world.trainers)
        assert (await live(world, [], instant, count)).over
        assert not (await live(world, [])).over
        record = world.record()
    assert (record.finished_rounds, record.best_round) == (rounds, best)
    assert len(record.judged) == rounds + 1


@in_loop
async def test_a_model_that_is_the_best_so_far_is_kept_until_the_end(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=5, judged=judged(0.1, 0.9, 0.2, 0.3, 0.3), choose_by="synthetic") as world:
        record = await world.federate()
    assert record.best_round == 1
    assert value_of(world.model(ARM)) == START + mean_step(SAMPLES)


@in_loop
async def test_silos_that_tell_no_accuracy_end_nothing(tmp_path: Path) -> None:
    async with World(tmp_path, released=[], target_accuracy=0.1, patience=1) as world:
        record = await world.federate()
    assert record.finished_rounds == ROUNDS


# What is kept


@pytest.mark.parametrize(("keep", "kept"), [("all", {0, 1, 2, 3, 4}), ("best", {0, 1, 4})])
@in_loop
async def test_all_rounds_weights_are_kept_if_asked(tmp_path: Path, keep: str, kept: set[int]) -> None:
    script = told(0.1, 0.9, 0.5)
    async with World(tmp_path, rounds=4, keep=keep, script=script, rates=[0.25, 0.5], strategy={"momentum": 0.5}) as w:
        record = await w.federate()
    digests = {w.file.run_folder / "weights" / f"{record.weights_of(r)}.safetensors": r for r in range(5)}
    assert {digests[path] for path in (w.file.run_folder / "weights").iterdir() if path in digests} == kept
    assert record.best_round == 1
    # The strategy's state is as large as a model or two, and only the newest is ever read again.
    states = {path.name for path in (w.file.run_folder / "strategy").iterdir()}
    assert f"{record.final}.safetensors" in states
    assert f"{record.weights_of(2)}.safetensors" not in states


@in_loop
async def test_the_best_model_of_a_strategy_with_state_is_taken_from_any_round(tmp_path: Path) -> None:
    """Only the newest weights keep their strategy's state, which the best need not be."""
    settings = {"rounds": 4, "script": told(0.1, 0.9, 0.5), "strategy": {"momentum": 0.5}}
    async with World(tmp_path, **settings) as world:
        record = await world.federate()
    assert record.best_round == 1
    assert (world.file.run_folder / "models" / f"{ARM}.safetensors").exists()

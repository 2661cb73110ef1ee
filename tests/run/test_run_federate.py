"""The federator at work with real ledger, inbox, silos and files, over the exchange in memory: exact to the bit."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from federated import (
    ARM,
    JOIN_DEADLINE,
    LAYOUT,
    ROUNDS,
    SAMPLES,
    START,
    STEPS,
    Metrics,
    World,
    answered,
    failing,
    in_loop,
    mean_step,
    value_of,
)

from gptfl_dist.config.training import Training
from gptfl_dist.errors import FederationError, StorageError, TrainerError
from gptfl_dist.federation.orders import Order
from gptfl_dist.testing.clock import advance
from gptfl_dist.weights import WeightsFile


@pytest.mark.parametrize("rate", [1.0, 0.5])
@in_loop
async def test_the_weights_have_the_closed_form_of_federated_averaging(tmp_path: Path, rate: float) -> None:
    async with World(tmp_path, strategy={"learning_rate": rate}) as world:
        record = await world.federate()
    assert world.value() == START + ROUNDS * rate * mean_step(SAMPLES)
    assert [value_of(world.model())] == [START + ROUNDS * rate * (1 * 105 + 3 * -210 + 4 * 420) / 8]
    with WeightsFile(world.model()) as weights:
        assert int.from_bytes(weights.read(0, 8), "little") == 1 + 2 + 3  # a counter grows by the largest increase
    assert [r.kind for r in record.rounds] == ["train"] * ROUNDS + ["evaluate"]
    assert world.notes.closed == [(ARM, r) for r in range(1, ROUNDS + 1)]
    assert world.trained("a") == [(ARM, r) for r in range(1, ROUNDS + 1)]


@in_loop
async def test_the_strategy_s_momentum_goes_from_round_to_round_and_from_arm_to_arm_starts_anew(tmp_path: Path) -> None:
    async with World(tmp_path, rates=[0.25, 0.5], strategy={"momentum": 0.5}) as world:
        await world.federate()
    step = mean_step(SAMPLES)
    assert world.value() == START + step + 1.5 * step + 1.75 * step
    # No state of a model that is no longer kept stays behind.
    kept = {path.name for path in (world.file.run_folder / "weights").iterdir()}
    assert {path.name for path in (world.file.run_folder / "strategy").iterdir()} <= kept


@in_loop
async def test_a_strategy_whose_state_was_lost_says_so(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=2, strategy={"optimizer": "adam", "learning_rate": 0.1}) as world:
        late = world.network.hold("c", "upload", round=2, arm=ARM)
        run = asyncio.create_task(world.federate())
        await late.reached.wait()
        for state in (world.file.run_folder / "strategy").iterdir():
            state.unlink()
        late.release()
        with pytest.raises(StorageError, match="state is lost"):
            await run


@in_loop
async def test_each_round_is_ordered_as_the_recipe_says(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=4) as world:
        recipe = {"learning_rate": 0.5, "schedule": "cosine", "warm_up_rounds": 1, "head_rounds": 2}
        world.file = world.file.model_copy(update={"training": Training.model_validate(recipe)})
        await world.federate()
    told = [order.training for order in world.trainers["a"].orders if order.training is not None]
    assert [training.trained for training in told] == ["head", "head", "all", "all"]
    falls = [0.5, 1 / 2 + 2**0.5 / 4, 0.5, 1 / 2 - 2**0.5 / 4]  # half of it in the warm-up, then along the cosine
    assert [training.learning_rate for training in told] == pytest.approx([0.5 * fall for fall in [0.5, *falls[1:]]])


@in_loop
async def test_the_bytes_of_a_round_are_those_that_the_silos_moved(tmp_path: Path) -> None:
    async with World(tmp_path, quorum="majority", script=failing("b", 2)) as world:
        world.network.cut("a", "half", round=1)
        record = await world.federate()
    down = [r.bytes_down for r in record.rounds]
    up = [r.bytes_up for r in record.rounds]
    # A silo that comes back in mid-round holds the weights already, and sends the second half of its update alone.
    assert down == [3 * LAYOUT.nbytes] * (ROUNDS + 1)
    assert up == [3 * LAYOUT.nbytes, 2 * LAYOUT.nbytes, 3 * LAYOUT.nbytes, 0]


@in_loop
async def test_the_cohort_is_drawn_alike_whatever_the_order_of_joining(tmp_path: Path) -> None:
    silos = dict.fromkeys("abcde", 2)
    drawn: dict[str, list[tuple[str, ...]]] = {}
    for order in ("abcde", "edcba", "cebad"):
        async with World(tmp_path / order, silos=silos, step=lambda *_: 1.0, cohort=2, rounds=8) as world:
            run = asyncio.create_task(world.federate_with())
            for name in order:
                world.join(name)
                await asyncio.sleep(0.005)  # apart from each other: who is first must not matter
            record = await run
        drawn[order] = [r.cohort for r in record.rounds if r.kind == "train"]
        assert world.value() == START + 8
        trained = {silo: {r for _, r in world.trained(silo)} for silo in silos}
        assert trained == {silo: {r for r, c in enumerate(drawn[order], start=1) if silo in c} for silo in silos}
    first = drawn["abcde"]
    assert drawn == dict.fromkeys(drawn, first)
    assert all(len(set(cohort)) == 2 for cohort in first)
    assert {silo for cohort in first for silo in cohort} == set(silos)


@in_loop
async def test_a_silo_that_leaves_at_any_step_gets_its_order_again_and_trains_once(tmp_path: Path) -> None:
    steps = ("order", "download", "upload", "half", "sent", "committed")
    async with World(tmp_path, rounds=len(steps)) as world:
        cuts = [world.network.cut("b", step, round=r) for r, step in enumerate(steps, start=1)]
        await world.federate()
    assert all(cut.reached.is_set() for cut in cuts)
    assert world.value() == START + len(steps) * mean_step(SAMPLES)
    assert world.trained("b") == [(ARM, r) for r in range(1, len(steps) + 1)]


@in_loop
async def test_an_order_that_overtakes_the_receipt_of_the_one_before_leaves_the_trainer_alone(tmp_path: Path) -> None:
    stops: list[int] = []  # of the trainer of c, before each of its orders

    def script(silo: str, order: Order) -> Metrics:
        if silo == "c":
            stops.append(world.trainers[silo].stops)
        return {}

    async with World(tmp_path, script=script) as world:
        late = world.network.hold("c", "receipt", round=1)
        await world.federate()
    assert late.reached.is_set()
    assert world.trained("c") == [(ARM, r) for r in range(1, ROUNDS + 1)]
    assert set(stops) == {0}
    assert world.value() == START + ROUNDS * mean_step(SAMPLES)


@in_loop
async def test_a_silo_that_fails_is_left_out_where_a_majority_delivers(tmp_path: Path) -> None:
    async with World(tmp_path, quorum="majority", script=failing("c", 2)) as world:
        record = await world.federate()
    assert world.value() == START + 2 * mean_step("abc") + mean_step("ab")
    assert answered(record, 2) == {"a", "b"}
    assert f"{ARM}, round 2: c failed: TrainerError: out of memory" in world.notes.texts


@in_loop
async def test_where_all_must_deliver_a_failure_ends_the_run_with_its_reason_and_the_same_call_goes_on(
    tmp_path: Path,
) -> None:
    trouble = {2}
    async with World(tmp_path, script=lambda s, o: failing("c", *trouble)(s, o)) as world:
        with pytest.raises(FederationError, match=r"round 2: 2 of the 3 .* \(c: TrainerError: out of memory\)"):
            await world.federate()
        trouble.clear()
        await world.federate()
    assert world.value() == START + ROUNDS * mean_step(SAMPLES)
    assert world.trained("a") == [(ARM, 1), (ARM, 2), (ARM, 3)]  # its committed update was not asked for again


@in_loop
async def test_an_update_with_nan_is_refused_and_the_round_goes_on_without_it(tmp_path: Path) -> None:
    def step(silo: str, order: Order) -> float:
        return float("nan") if (silo, order.round) == ("a", 2) else STEPS[silo]

    async with World(tmp_path, quorum="majority", step=step) as world:
        await world.federate()
    assert world.value() == START + 2 * mean_step("abc") + mean_step("bc")
    assert any("a failed: refused: the update holds NaN" in text for text in world.notes.texts)


@in_loop
async def test_a_silo_that_refuses_to_go_back_has_the_operator_told_of_the_epoch(tmp_path: Path) -> None:
    def script(silo: str, order: Order) -> Metrics:
        if silo == "c":
            raise TrainerError("rollback: round 1 is asked for, and round 2 was seen in epoch 1")
        return {}

    async with World(tmp_path, rounds=1, script=script) as world:
        with pytest.raises(FederationError) as ended:
            await world.federate()
    assert "gptfl epoch" in ended.value.hint


@in_loop
async def test_who_failed_in_a_closed_round_owes_nothing_after_a_later_one_did_not_come_about(tmp_path: Path) -> None:
    def script(silo: str, order: Order) -> dict[str, float]:
        if silo == "b" and order.kind == "train" and order.round == 2:
            raise TrainerError("out of memory")
        return {"accuracy": 0.9 - 0.1 * order.round}  # so that the base of round 2 is not kept

    async with World(tmp_path, rounds=3, quorum=2, script=script) as world:
        last = world.network.hold("b", "order", round=2)  # so that the round is open until a and c are gone
        world.join("a", "b", "c")
        run = asyncio.create_task(world.federate_with())
        await world.until(lambda: world.committed(2) == {"a", "c"})
        await world.kill("a")
        await world.kill("c")
        last.release()
        await world.until(lambda: any("waiting for a, c" in text for text in world.notes.texts))
        advance(JOIN_DEADLINE)
        with pytest.raises(FederationError, match="missing: a, c"):
            await run
        record = world.record()
        assert record.pending == []
        assert [order.failure is None for order in record.rounds[1].orders] == [True, False, True]
        world.join("a", "c")
        record = await world.federate_with()
        assert record.finished_rounds == 3

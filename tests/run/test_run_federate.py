"""The federator at work with real ledger, inbox, silos and files, over the exchange in memory: exact to the bit."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

import pytest
from blake3 import blake3
from federated import (
    ARM,
    DEADLINE,
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
    flat,
    in_loop,
    mean_step,
    value_of,
)

from gptfl_dist.config.federation import Training
from gptfl_dist.errors import FederationError, StorageError, TrainerError
from gptfl_dist.exchange.base import Goodbye, Recalled, UpdateHeader
from gptfl_dist.exchange.inbox import Spool
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.ledger.record import FILE_NAME
from gptfl_dist.ledger.requests import ask_to_pause, ask_to_resume
from gptfl_dist.run.arms import run_arms
from gptfl_dist.run.federate import Federator
from gptfl_dist.testing.clock import advance
from gptfl_dist.testing.exchange import MemoryCoordinatorExchange, MemorySiloExchange
from gptfl_dist.weights import WeightsFile, write_weights

# The rounds


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


# Failures


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


# While updates arrive


def _made(world: World) -> set[str]:
    """The weights in the run folder, by digest."""
    return {path.stem for path in (world.file.run_folder / "weights").glob("*.safetensors") if len(path.stem) == 64}


@in_loop
async def test_the_next_weights_are_there_when_the_last_byte_is(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        arriving = world.network.hold("c", "sent", round=2)
        run = asyncio.create_task(world.federate())
        await arriving.reached.wait()
        before = world.at_work.arm(ARM)
        await world.until(lambda: len(_made(world) - {before.start, before.final}) == 1)
        ahead = _made(world) - {before.start, before.final}
        arriving.release()
        record = await run
    assert {record.weights_of(2)} == ahead
    assert world.value() == START + ROUNDS * mean_step(SAMPLES)


@in_loop
async def test_what_was_made_of_an_update_that_is_then_refused_does_not_count(tmp_path: Path) -> None:
    def step(silo: str, order: Order) -> float:
        return float("nan") if (silo, order.round) == ("c", 2) else STEPS[silo]

    async with World(tmp_path, quorum="majority", step=step) as world:
        arriving = world.network.hold("c", "sent", round=2)
        run = asyncio.create_task(world.federate())
        await arriving.reached.wait()
        before = world.at_work.arm(ARM)
        await world.until(lambda: len(_made(world) - {before.start, before.final}) == 1)
        arriving.release()
        await run
    assert world.value() == START + 2 * mean_step("abc") + mean_step("ab")
    assert any("c failed: refused: the update holds NaN" in text for text in world.notes.texts)


@in_loop
async def test_what_was_made_of_an_upload_that_then_began_anew_does_not_count(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=1) as world:
        world.join("a", "b")
        fickle = MemorySiloExchange(network=world.network, silo="c")
        run = asyncio.create_task(world.federate_with())
        await fickle.connect()
        await fickle.ready()
        order = await fickle.receive()
        assert isinstance(order, Order)
        arriving = world.network.hold("c", "sent", round=1)
        for value in (STEPS["c"] + 1, STEPS["c"]):
            digest = write_weights(tmp_path / "update.safetensors", LAYOUT, [flat(value)])
            header = UpdateHeader(Report(order.nonce, 4, {}), order.base, LAYOUT.digest, digest, LAYOUT.nbytes)
            with WeightsFile(tmp_path / "update.safetensors") as update:
                upload = asyncio.create_task(fickle.upload(header, update))
                if value != STEPS["c"]:
                    await arriving.reached.wait()
                    await world.until(lambda: len(_made(world)) == 2)
                    upload.cancel()
                    await asyncio.wait([upload])
                else:
                    assert (await upload).committed
        final = await fickle.receive()
        assert isinstance(final, Order)
        await fickle.report(Report(final.nonce, 4, {}))
        await run
        assert await fickle.receive() == Goodbye(True, "finished")
    assert world.value() == START + mean_step("abc")


# Deadlines


@in_loop
async def test_at_the_deadline_the_late_silo_is_recalled_and_a_quorum_counts(tmp_path: Path) -> None:
    async with World(tmp_path, quorum="majority") as world:
        late = world.network.hold("c", "upload", round=2)
        run = asyncio.create_task(world.federate())
        await late.reached.wait()
        await world.until(lambda: world.committed(2) == {"a", "b"})
        advance(DEADLINE)
        record = await run
    assert world.value() == START + 2 * mean_step("abc") + mean_step("ab")
    assert answered(record, 2) == {"a", "b"}
    assert any("c recalled: the deadline" in text for text in world.notes.texts)
    assert record.rounds[1].bytes_up == 2 * LAYOUT.nbytes


@in_loop
async def test_an_update_that_comes_after_the_recall_is_refused(tmp_path: Path) -> None:
    async with World(tmp_path, quorum="majority", rounds=1) as world:
        world.join("a", "b")
        stubborn = MemorySiloExchange(network=world.network, silo="c")
        run = asyncio.create_task(world.federate_with())
        await stubborn.connect()
        await stubborn.ready()
        order = await stubborn.receive()
        assert isinstance(order, Order)
        await world.until(lambda: world.committed(1) == {"a", "b"})
        advance(DEADLINE)
        assert isinstance(await stubborn.receive(), Recalled)
        content = flat(STEPS["c"])
        digest = write_weights(tmp_path / "late.safetensors", LAYOUT, [content])
        assert digest == blake3(content).hexdigest()
        with WeightsFile(tmp_path / "late.safetensors") as update:
            header = UpdateHeader(Report(order.nonce, 4, {}), order.base, LAYOUT.digest, digest, LAYOUT.nbytes)
            receipt = await stubborn.upload(header, update)
        assert not receipt.committed
        assert "answers no order that is open" in receipt.reason
        final = await stubborn.receive()
        assert isinstance(final, Order)
        await stubborn.report(Report(final.nonce, 4, {}))
        record = await run
        assert await stubborn.receive() == Goodbye(True, "finished")
    assert world.value() == START + mean_step("ab")
    assert answered(record, 1) == {"a", "b"}


@in_loop
async def test_a_late_silo_takes_part_in_the_next_round(tmp_path: Path) -> None:
    async with World(tmp_path, quorum="majority") as world:
        late = world.network.hold("c", "download", round=1)
        run = asyncio.create_task(world.federate())
        await late.reached.wait()
        await world.until(lambda: world.committed(1) == {"a", "b"})
        advance(DEADLINE)
        record = await run
    assert [answered(record, r) for r in (1, 2, 3)] == [{"a", "b"}, {"a", "b", "c"}, {"a", "b", "c"}]
    assert world.value() == START + mean_step("ab") + 2 * mean_step("abc")


@in_loop
async def test_the_join_deadline_says_nothing_to_a_round_that_has_begun(tmp_path: Path) -> None:
    async with World(tmp_path, deadline="10000s", join_deadline="10s") as world:
        slow = world.network.hold("c", "upload", round=2)
        run = asyncio.create_task(world.federate())
        await slow.reached.wait()
        advance(20)
        await asyncio.sleep(0.01)
        slow.release()
        record = await asyncio.wait_for(run, 10_000)
    assert answered(record, 2) == {"a", "b", "c"}
    assert world.value() == START + ROUNDS * mean_step("abc")


@in_loop
async def test_a_commit_that_comes_before_the_deadline_counts_though_nobody_was_told_yet(tmp_path: Path) -> None:
    async with World(tmp_path, quorum="majority") as world:
        racing = world.network.hold("c", "committed", round=2)
        run = asyncio.create_task(world.federate())
        await racing.reached.wait()
        await world.until(lambda: world.committed(2) == {"a", "b", "c"})
        advance(DEADLINE)
        await world.until(lambda: (ARM, 2) in world.notes.closed)
        racing.release()
        record = await run
    assert world.value() == START + ROUNDS * mean_step("abc")
    assert [order.failure for order in record.rounds[1].orders] == [None] * 3


@in_loop
async def test_a_recall_that_comes_before_the_commit_wins_wholly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, loop = Spool.norm, asyncio.get_running_loop()
    checking, recalled = asyncio.Event(), asyncio.Event()
    slow = (tmp_path / "run" / "spools" / "c.spool").resolve()

    async def wait_for_the_recall() -> None:
        checking.set()
        await recalled.wait()

    def check(spool: Spool) -> float:
        if spool.path.resolve() == slow and not recalled.is_set():
            asyncio.run_coroutine_threadsafe(wait_for_the_recall(), loop).result(30)
        return real(spool)

    monkeypatch.setattr(Spool, "norm", check)
    async with World(tmp_path, quorum="majority", rounds=1) as world:
        run = asyncio.create_task(world.federate())
        await checking.wait()
        await world.until(lambda: world.committed(1) == {"a", "b"})
        advance(DEADLINE)
        await world.until(lambda: any("c recalled" in text for text in world.notes.texts))
        recalled.set()
        record = await run
    assert world.value() == START + mean_step("ab")
    (of_c,) = [order for order in record.rounds[0].orders if order.silo == "c"]
    assert (of_c.samples, of_c.metrics, of_c.digest) == (None, None, None)
    assert of_c.failure is not None


@in_loop
async def test_who_is_missing_is_said_once_and_again_when_that_changes(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=1) as world:
        run = asyncio.create_task(world.federate_with())
        await world.until(lambda: len(world.notes.texts) == 1)
        for number, name in enumerate("cab", start=2):
            world.join(name)
            await world.until(lambda number=number: len(world.notes.texts) >= number)
        await run
    assert world.notes.texts[:4] == [
        "waiting for a, b, c (0 of 3 are here)",
        "c joined, waiting for a, b (1 of 3 are here)",
        "a joined, waiting for b (2 of 3 are here)",
        "b joined (3 of 3 are here)",
    ]
    assert not any("waiting" in text for text in world.notes.texts[4:])
    assert world.notes.missing == [("a", "b", "c"), ("a", "b"), ("b",), ()]


@in_loop
async def test_a_silo_that_leaves_in_mid_round_is_waited_for_by_name(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=1) as world:
        world.network.cut("b", "upload", round=1)
        await world.federate()
    came_and_went = [text for text in world.notes.texts if text.startswith("b ")]
    assert came_and_went[1:] == ["b left, waiting for b (2 of 3 are here)", "b joined (3 of 3 are here)"]


@in_loop
async def test_of_a_silo_that_has_answered_nothing_more_is_shown(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=2, quorum=1, script=failing("b", 2)) as world:
        late = world.network.hold("c", "upload", round=2)
        run = asyncio.create_task(world.federate())
        await late.reached.wait()
        await world.until(lambda: len(world.notes.done) == 5)
        assert sorted(world.notes.done[:3]) == ["a", "b", "c"]
        assert sorted(world.notes.done[3:]) == ["a", "b"]  # one delivered, one failed
        advance(DEADLINE)
        await world.until(lambda: world.notes.done[5:6] == ["c"])  # recalled
        late.release()
        await run


@in_loop
async def test_too_few_silos_at_the_join_deadline_end_the_run_and_are_named(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        world.join("a", "c")
        run = asyncio.create_task(world.federate_with())
        await world.until(lambda: any("waiting for b" in text for text in world.notes.texts))
        advance(JOIN_DEADLINE)
        with pytest.raises(FederationError, match="missing: b"):
            await run


async def _revoke(world: World, federator: Federator, silo: str) -> None:
    """A silo's certificates are revoked, and it ends."""
    exchange = federator.exchange
    assert isinstance(exchange, MemoryCoordinatorExchange)
    exchange.bar(silo, "its certificate was revoked")
    await world.kill(silo)


@in_loop
async def test_a_silo_that_is_revoked_between_rounds_is_waited_for_where_all_are_needed(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=2, silos={"a": 1, "b": 3}) as world:
        with contextlib.suppress(FederationError):
            async with world.coordinator() as federator:
                ask_to_pause(world.file.run_folder)
                await world.until(lambda: any("a pause was asked for" in text for text in world.notes.texts))
                world.join("a", "b")
                run = asyncio.create_task(run_arms(federator))
                await world.until(lambda: any("b joined" in text for text in world.notes.texts))
                await _revoke(world, federator, "b")
                ask_to_resume(world.file.run_folder)
                await world.until(lambda: world.notes.missing[-1:] == [("b",)])
                assert any("no quorum without b, which gptfl invite lets in" in text for text in world.notes.texts)
                advance(JOIN_DEADLINE)
                await run
        ended = run.exception()
        assert isinstance(ended, FederationError)
        assert "round 1: 1 silos are connected and 2 are needed; missing: b (revoked)" in ended.message
        assert "invite b anew" in ended.hint
        assert world.record().rounds == ()
        await world.federate()
    assert world.value() == START + 2 * mean_step("ab")


@in_loop
async def test_a_silo_that_is_revoked_in_mid_round_is_waited_for_and_a_restart_waits_on(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=2) as world:
        late = {round_: world.network.hold("c", "upload", round=round_) for round_ in (1, 2)}
        world.join("a", "b", "c")
        with contextlib.suppress(asyncio.CancelledError):
            async with world.coordinator() as federator:
                run = asyncio.create_task(run_arms(federator))
                for round_ in (1, 2):
                    await late[round_].reached.wait()
                    await world.until(lambda round_=round_: world.committed(round_) == {"a", "b"})
                    await _revoke(world, federator, "c")
                    await world.until(lambda: world.notes.missing[-1:] == [("c",)])
                    advance(DEADLINE)  # which is no longer that of the round
                    if round_ == 1:
                        world.join("c")
                run.cancel()
                await run
        await world.federate()
    assert world.value() == START + 2 * mean_step("abc")
    assert world.trained("a") == [(ARM, 1), (ARM, 2)]  # its committed updates were not asked for again
    assert [answered(world.record(), r) for r in (1, 2)] == [{"a", "b", "c"}] * 2


@in_loop
async def test_a_round_that_was_begun_below_its_quorum_is_filled_up_at_the_next_start(tmp_path: Path) -> None:
    async with World(tmp_path, rounds=2, silos={"a": 1, "b": 3}) as world:
        world.join("a", "b")
        late = world.network.hold("b", "order", round=2)
        with contextlib.suppress(asyncio.CancelledError):
            async with world.coordinator() as federator:
                run = asyncio.create_task(run_arms(federator))
                await late.reached.wait()
                await world.until(lambda: world.committed(2) == {"a"})
                run.cancel()
                await run
        await world.kill("b")
        with sqlite3.connect(world.file.run_folder / FILE_NAME) as ledger:  # as if b had been revoked by then
            ledger.execute("UPDATE rounds SET cohort = '[\"a\"]' WHERE round = 2")
            ledger.execute("DELETE FROM orders WHERE round = 2 AND silo = 'b'")
        record = await world.federate()
    assert world.value() == START + 2 * mean_step("ab")
    assert [r.cohort for r in record.rounds] == [("a", "b")] * 3
    assert world.trained("a") == [(ARM, 1), (ARM, 2)]


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

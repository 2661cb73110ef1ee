"""Federations whose updates and weights travel encoded: what arrives, what is owed, and what a restart leaves of it."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federated import (
    ARM,
    DEADLINE,
    LAYOUT,
    ROUNDS,
    START,
    STEPS,
    World,
    answered,
    failing,
    flat,
    in_loop,
    measured,
    value_of,
)

from gptfl_dist.federation.orders import Order
from gptfl_dist.run.arms import run_arms
from gptfl_dist.run.evaluation import Measured
from gptfl_dist.run.silo import LONGEST_PAUSE
from gptfl_dist.testing import clock
from gptfl_dist.weights import Codec, WeightsFile, write_weights

TOP = {"up": "topk", "top_share": 0.25}  # of four numbers one
SHARES = {"a": 1 / 8, "b": 3 / 8, "c": 4 / 8}


class Untested:
    """In place of the tests of weights, which are not one number everywhere here."""

    async def test(self, weights: Path) -> Measured:
        return measured(0.5)


def world(folder: Path, **settings: Any) -> World:
    made = World(folder, **settings)
    made.tester = Untested()  # type: ignore[assignment]  # it tests alike
    return made


def weights(path: Path) -> np.ndarray:
    with WeightsFile(path) as file:
        return np.frombuffer(file.read(8, file.nbytes - 8), "<f4")


def expected(owing: dict[str, np.ndarray], counted: list[set[str]]) -> np.ndarray:
    """The weights after rounds of one number a silo, where `counted` says whose update was taken in each."""
    now = np.full(4, START)
    for silos in counted:
        total = sum(SHARES[silo] for silo in silos)
        for silo in silos:
            wanted = STEPS[silo] + owing[silo]
            sent = np.zeros(4)
            sent[np.argmax(np.abs(wanted))] = wanted[np.argmax(np.abs(wanted))]
            owing[silo] = wanted - sent
            now += SHARES[silo] / total * sent
    return now


def nothing() -> dict[str, np.ndarray]:
    return {silo: np.zeros(4) for silo in STEPS}


@in_loop
async def test_what_an_encoding_loses_comes_with_the_next_update(tmp_path: Path) -> None:
    async with world(tmp_path, compression=TOP) as fed:
        await fed.federate()
    owing = nothing()
    assert np.allclose(weights(fed.model()), expected(owing, [set(STEPS)] * ROUNDS))
    assert len(list((tmp_path / "a" / "residuals").iterdir())) == 2  # of the last update, and of the one before
    for silo in STEPS:
        newest = max((tmp_path / silo / "residuals").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        with WeightsFile(newest) as file:
            assert np.allclose(np.frombuffer(file.read(0, 16), "<f4"), owing[silo])


@in_loop
async def test_without_error_feedback_it_is_lost(tmp_path: Path) -> None:
    async with world(tmp_path, compression={**TOP, "error_feedback": False}) as fed:
        await fed.federate()
    mean = sum(SHARES[silo] * STEPS[silo] for silo in STEPS)
    assert weights(fed.model()).tolist() == [START + ROUNDS * mean, START, START, START]
    assert not (tmp_path / "a" / "residuals").exists()


@in_loop
async def test_an_update_that_was_not_taken_is_not_taken_off_what_is_owed(tmp_path: Path) -> None:
    """Silo a is late in round 2: it had encoded an update, which nobody took."""
    rules = {"compression": TOP, "quorum": "majority"}
    async with world(tmp_path, **rules) as fed:
        late = fed.network.hold("a", "half", round=2)
        fed.join("a", "b", "c")
        async with fed.coordinator() as federator:
            running = asyncio.create_task(run_arms(federator))
            await late.reached.wait()
            await fed.until(lambda: fed.committed(2) == {"b", "c"})
            clock.advance(DEADLINE)
            await running
    assert answered(fed.record(), 2) == {"b", "c"}
    assert np.allclose(weights(fed.model()), expected(nothing(), [set("abc"), set("bc"), set("abc")]))


@in_loop
async def test_a_silo_that_fails_in_a_round_keeps_what_it_owes(tmp_path: Path) -> None:
    async with world(tmp_path, compression=TOP, quorum="majority", script=failing("c", 2)) as fed:
        await fed.federate()
    assert np.allclose(weights(fed.model()), expected(nothing(), [set("abc"), set("ab"), set("abc")]))


@pytest.fixture(scope="module", params=["topk", "fp16"])
def undisturbed(request, tmp_path_factory) -> tuple[dict[str, object], bytes]:
    """Settings of both ways, and the final weights of a run with them that nothing disturbed."""
    compression = {"up": request.param, "down": "int8", "top_share": 0.25}
    folder = tmp_path_factory.mktemp("undisturbed")

    @in_loop
    async def run() -> None:
        async with world(folder, compression=compression, step=uneven) as fed:
            await fed.federate()

    run()
    return compression, (folder / "run" / "models" / f"{ARM}-final.safetensors").read_bytes()


def uneven(silo: str, order: Order) -> float:
    """A step that no codec represents exactly."""
    return STEPS[silo] / (3.1 + order.round)


STEPS_OF_AN_ORDER = ["download", "upload", "half", "sent", "committed"]


@pytest.mark.parametrize("step", STEPS_OF_AN_ORDER)
@pytest.mark.parametrize("round_", [1, 2, 3])
def test_an_agent_killed_at_any_step_comes_to_the_same_weights(tmp_path, undisturbed, step, round_: int) -> None:
    compression, final = undisturbed

    @in_loop
    async def run() -> None:
        async with world(tmp_path, compression=compression, step=uneven) as fed:
            fault = fed.network.hold("b", step, round=round_)
            fed.join("a", "b", "c")
            async with fed.coordinator() as federator:
                running = asyncio.create_task(run_arms(federator))
                await fault.reached.wait()
                await fed.kill("b")
                fault.release()
                fed.join("b")
                await running
        assert fed.model().read_bytes() == final

    run()


@pytest.mark.parametrize("step", STEPS_OF_AN_ORDER)
def test_a_coordinator_killed_at_any_step_comes_to_the_same_weights(tmp_path, undisturbed, step) -> None:
    compression, final = undisturbed

    @in_loop
    async def run() -> None:
        async with world(tmp_path, compression=compression, step=uneven) as fed:
            fault = fed.network.cut("b", step, round=2)
            fed.join("a", "b", "c")
            async with fed.coordinator() as federator:
                running = asyncio.create_task(run_arms(federator))
                await fault.reached.wait()
                fed.network.drop_coordinator()
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            clock.advance(LONGEST_PAUSE)
            await fed.federate_with()
        assert fed.model().read_bytes() == final

    run()


@in_loop
async def test_lost_work_folders_cost_what_was_owed_and_no_more(tmp_path: Path) -> None:
    async with world(tmp_path, compression=TOP) as fed:
        fault = fed.network.hold("a", "order", round=3)
        fed.join("a", "b", "c")
        async with fed.coordinator() as federator:
            running = asyncio.create_task(run_arms(federator))
            await fault.reached.wait()
            await fed.kill("a")
            for path in (tmp_path / "a" / "residuals").iterdir():
                path.unlink()
            fault.release()
            fed.join("a")
            await running
    owing = nothing()
    after_two = expected(owing, [set("abc")] * 2)
    owing["a"] = np.zeros(4)
    assert np.allclose(weights(fed.model()), after_two - START + expected(owing, [set("abc")]))


@in_loop
async def test_silos_train_from_encoded_weights_and_the_coordinators_own_stay_exact(tmp_path: Path) -> None:
    """Half precision cannot hold START + 1e-4, but the sum of all rounds has every step."""
    async with world(tmp_path, compression={"down": "fp16"}, step=lambda silo, order: 2.0**-13) as fed:
        await fed.federate()
    assert value_of(fed.model()) == START + ROUNDS * 2.0**-13
    orders = [order for order in fed.trainers["a"].orders if order.kind == "train"]
    for order, round_ in zip(orders, range(ROUNDS), strict=True):
        content = write_weights(tmp_path / "w.safetensors", LAYOUT, [flat(START + round_ * 2.0**-13, round_ * 0)])
        assert content  # the plain weights have another digest than what is handed out
        assert order.base != content
    received = weights(tmp_path / "a" / "weights.safetensors")
    assert received.tolist() == np.float16(weights(fed.model())).astype(np.float32).tolist()
    assert fed.record().rounds[0].bytes_down == 3 * Codec("fp16").layout(LAYOUT).nbytes


@pytest.mark.parametrize("name", ["fp16", "bf16", "int8", "topk"])
def test_an_update_that_is_not_finite_is_refused_by_any_codec(tmp_path: Path, name: str) -> None:
    def step(silo: str, order: Order) -> float:
        return math.nan if silo == "c" and order.round == 2 else STEPS[silo]

    @in_loop
    async def run() -> None:
        async with world(tmp_path, compression={"up": name}, step=step, quorum="majority") as fed:
            record = await fed.federate()
        assert answered(record, 2) == {"a", "b"}
        assert answered(record, 3) == {"a", "b", "c"}  # what made it so is not owed
        assert any("NaN or infinite" in note for note in fed.notes.texts)
        assert np.isfinite(weights(fed.model())).all()

    run()

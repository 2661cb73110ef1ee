"""The next weights are made while updates arrive, and nothing of what does not count goes into them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from federated import (
    ARM,
    LAYOUT,
    ROUNDS,
    SAMPLES,
    START,
    STEPS,
    World,
    flat,
    in_loop,
    mean_step,
)

from gptfl_dist.exchange.base import Goodbye, UpdateHeader
from gptfl_dist.federation.orders import Order, Report
from gptfl_dist.testing.exchange import MemorySiloExchange
from gptfl_dist.weights import WeightsFile, write_weights


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
async def test_without_a_core_to_spare_they_are_made_when_all_is_there(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        world.ahead = False
        arriving = world.network.hold("c", "sent", round=2)
        run = asyncio.create_task(world.federate())
        await arriving.reached.wait()
        before = world.at_work.arm(ARM)
        await asyncio.sleep(0.3)
        assert _made(world) == {before.start, before.final}
        arriving.release()
        await run
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

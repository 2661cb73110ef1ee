"""What silos tell of themselves stands in `summary.json` only where it can be so.

That the coordinator refuses numbers that are none from whoever sends them is shown in tests/exchange.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
from federated import ARM, LAYOUT, ROUNDS, Metrics, World, in_loop

from gptfl_dist.federation.orders import Order
from gptfl_dist.observe.summary import RoundMeasures
from gptfl_dist.run.result import write_results

STARTED = "2026-01-01T00:00:00+00:00"


def measured(world: World) -> list[RoundMeasures]:
    """The measures of each round, from the start on, as the summary has them."""
    with contextlib.closing(world.ledger()) as ledger:
        ledger.set_fact("started", STARTED)
        arm = write_results(world.file, ledger, LAYOUT, None, None, "").arms.federated[ARM]
    return list(arm.measures)


@pytest.mark.parametrize("told", [-1.0, -1e-9, -1e30])
@in_loop
async def test_negative_seconds_of_training_are_dropped_and_the_update_counts(tmp_path: Path, told: float) -> None:
    def script(silo: str, order: Order) -> Metrics:
        return {"accuracy": 0.5, "seconds": told if silo == "a" else 2.5}

    async with World(tmp_path, script=script) as world:
        record = await world.federate()
        measures = measured(world)
    assert [one.silo_seconds for one in measures] == [{}] + [{"b": 2.5, "c": 2.5}] * ROUNDS
    assert all(r.metric("seconds")["a"] == told for r in record.rounds), "the ledger keeps what was told"


@pytest.mark.parametrize("told", [math.nan, math.inf, -math.inf])
@in_loop
async def test_seconds_that_are_no_number_do_not_leave_the_silo(tmp_path: Path, told: float) -> None:
    def script(silo: str, order: Order) -> Metrics:
        return {"accuracy": 0.5, "seconds": told if (silo, order.round) == ("a", 2) else 2.5}

    async with World(tmp_path, script=script, quorum=2) as world:
        record = await world.federate()
        measures = measured(world)
    every, others = dict.fromkeys("abc", 2.5), dict.fromkeys("bc", 2.5)
    assert [one.silo_seconds for one in measures] == [{}, every, others, every]
    (failed,) = [order.failure for r in record.rounds for order in r.orders if order.failure]
    assert "the metrics seconds are not finite" in failed

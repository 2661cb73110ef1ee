"""A silo whose own function trains, beside one that trains as the coordinator asks."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from support import Commands


def test_the_function_trains_and_the_policy_releases_its_metric(example: Callable[..., Path], gptfl: Commands) -> None:
    folder = example("training_function", ("federation.yaml", "rounds: 8", "rounds: 5"))
    summary = json.loads(gptfl.run("run", folder / "federation.yaml", "--format", "json").stdout)
    arm = summary["arms"]["fedavg_random"]
    assert arm["final_accuracy"] > arm["start_accuracy"] + 0.3

    with closing(sqlite3.connect(folder / "run" / "ledger.sqlite")) as database:
        rows = database.execute("SELECT silo, metrics FROM orders WHERE round = 1").fetchall()
    told = {silo: json.loads(metrics) for silo, metrics in rows}
    assert told["north"]["distance"] > 0
    assert "distance" not in told["south"]
    assert told["south"]["seconds"] > 0

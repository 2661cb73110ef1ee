"""Asynchronous rounds by real processes: over gRPC with a slow silo and a killed run, and over MPI."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing

import pytest
from support import Commands, Federation, wait_for

ROUNDS = 5
RULES = {"mode": "asynchronous", "rounds": ROUNDS, "deadline": "120s", "join_deadline": "120s", "staleness": 1.0}
SLOW = """
import time
from pathlib import Path
from gptfl_dist.learning.local import train

def train_slowly(*arguments, **settings):
    metrics = train(*arguments, **settings)
    while not Path(__file__).with_name("go").exists():
        time.sleep(0.05)
    return metrics
"""


@pytest.fixture
def uneven(federation: Callable[..., Federation]) -> Federation:
    """Three silos, of which the last trains until a file `go` lies in the folder."""
    made = federation(silos=3, epochs=8, federation=RULES)
    (made.folder / "slow.py").write_text(SLOW)
    with (made.folder / "silo-3.yaml").open("a") as silo:
        silo.write("\ncode: {function: 'slow:train_slowly'}\n")
    return made


def counted(federation: Federation) -> list[tuple[int, str, int]]:
    """(round in which it counted, silo, round in which it was ordered) of each update."""
    with closing(sqlite3.connect(federation.run_folder / "ledger.sqlite")) as database:
        return database.execute(
            "SELECT counted, silo, round FROM orders WHERE counted IS NOT NULL ORDER BY counted, silo"
        ).fetchall()


def expect_whole(federation: Federation) -> None:
    found = counted(federation)
    rounds = [[(silo, counted - given) for counted, silo, given in found if counted == r] for r in range(1, ROUNDS + 1)]
    assert rounds[:2] == [[("silo-1", 0), ("silo-2", 0)]] * 2
    assert all(len(updates) >= 2 for updates in rounds), rounds
    assert next(given for _, silo, given in found if silo == "silo-3") == 1  # its first update counted, stale
    assert len({(silo, given) for _, silo, given in found}) == len(found)
    arm = federation.summary()["arms"]["fedavg_random"]
    assert arm["rounds"] == len(arm["curve"]) == ROUNDS
    assert arm["accuracy"] >= 0.9


def test_a_slow_silo_over_grpc_and_a_run_that_is_killed_with_orders_of_several_rounds_open(
    gptfl: Commands, uneven: Federation
) -> None:
    command = gptfl.start("run", uneven.path)
    wait_for(lambda: uneven.owed(3) or command.process.poll() is not None)
    assert uneven.owed(1) == {"silo-3"}
    os.kill(command.process.pid, signal.SIGKILL)
    command.process.wait()
    command.wait_until_gone()
    (uneven.folder / "go").touch()
    again = gptfl.start("run", uneven.path)
    assert again.wait() == 0, again.stderr
    expect_whole(uneven)


def test_over_mpi_all_weights_that_are_needed_reach_the_ranks(gptfl: Commands, uneven: Federation) -> None:
    command = gptfl.mpi(4, "run", uneven.path)
    wait_for(lambda: uneven.owed(3) or command.process.poll() is not None)
    held = uneven.run_folder / "ranks" / "3"
    wait_for(lambda: len(list(held.glob("broadcast-*.safetensors"))) == 2)  # those of its order, and the newest
    (uneven.folder / "go").touch()
    assert command.wait() == 0, command.stderr
    expect_whole(uneven)
    assert len(list(held.glob("broadcast-*.safetensors"))) <= 2  # the newest, and one to write the next over

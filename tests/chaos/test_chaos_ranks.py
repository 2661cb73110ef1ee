"""A rank is killed with -9 at random instants: the job ends at once, and the resumed run ends as an undisturbed one.

GPTFL_CHAOS_KILLS=30 .venv/bin/python -m pytest tests/chaos/test_chaos_ranks.py     (30 kills of each kind)
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support import Command, Commands, Federation

_KILLS = int(os.environ.get("GPTFL_CHAOS_KILLS", "3"))
_GRACE = 15.0  # seconds within which the job has to be gone
_ALL = [("mpi", "exact"), ("mpi", "fast"), ("torch", "exact"), ("torch", "fast")]
_IN_THE_SUITE = [("mpi", "exact"), ("torch", "fast")]


def _federation(folder: Path, reduction: str) -> Federation:
    training = {"batch_size": 8, "learning_rate": 0.01, "warm_up_rounds": 0, "epochs": 8}
    return Federation(folder, training=training, collective={"reduction": reduction}, strategy={"momentum": 0.5})


def _start(gptfl: Commands, launcher: str, federation: Federation) -> Command:
    return {"mpi": gptfl.mpi, "torch": gptfl.torch}[launcher](3, "run", federation.path)


def _result(federation: Federation) -> dict[str, Any]:
    return {"weights": federation.summary()["weights"], "result": federation.result()}


def _kill(pid: int) -> bool:
    """False where it had ended by itself."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.timeout(4000)
@pytest.mark.parametrize(("launcher", "reduction"), _ALL if "GPTFL_CHAOS_KILLS" in os.environ else _IN_THE_SUITE)
def test_a_killed_rank_ends_the_job_and_nothing_is_lost(
    gptfl: Commands, tmp_path: Path, launcher: str, reduction: str
) -> None:
    moments = random.Random(f"ranks/{launcher}/{reduction}")
    first = _federation(tmp_path / "undisturbed", reduction)
    began = time.monotonic()
    command = _start(gptfl, launcher, first)
    assert command.wait() == 0, command.stderr
    seconds, undisturbed = time.monotonic() - began, _result(first)
    count, killed = 1, 0
    federation = _federation(tmp_path / "1", reduction)
    while killed < _KILLS:
        command = _start(gptfl, launcher, federation)
        end = time.monotonic() + moments.uniform(0, seconds)
        while time.monotonic() < end and command.process.poll() is None:
            time.sleep(0.01)
        ranks = [pid for pid in command.pids("-m gptfl_dist run") if pid != command.process.pid]
        victim = moments.choice(sorted(ranks)) if ranks else 0
        if victim and _kill(victim):
            killed += 1
            began = time.monotonic()
            code = command.wait(_GRACE)
            command.wait_until_gone(max(0.1, _GRACE - (time.monotonic() - began)))
            print(
                f"{launcher} {reduction} {killed}: exit code {code}, gone {time.monotonic() - began:.1f} s", flush=True
            )
        elif command.wait() == 0:  # it was quicker than the blow
            assert _result(federation) == undisturbed
            count += 1
            federation = _federation(tmp_path / str(count), reduction)
    command = _start(gptfl, launcher, federation)
    assert command.wait() == 0, command.stderr
    assert _result(federation) == undisturbed

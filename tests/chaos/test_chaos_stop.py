"""A run that is stopped or killed at any moment leaves no process and nothing half-written behind, and goes on later.

The moments are drawn from a fixed seed over the length of an undisturbed run. One after the other they stop the same
run, which goes on from where it was; whenever it comes to its end, its weights must be those of the undisturbed run.

    GPTFL_CHAOS_TRIES=20 pytest tests/chaos -s     more moments, and a run that generates and pre-trains too
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Command, Commands, Federation, wait_for

_TRIES = int(os.environ.get("GPTFL_CHAOS_TRIES", "3"))
_THOROUGH = "GPTFL_CHAOS_TRIES" in os.environ
_GRACE = 10.0  # seconds that a stopped run may take until its last process is gone


def _terminal(command: Command) -> None:
    """Ctrl-C in a terminal: the whole foreground process group hears it."""
    os.killpg(command.process.pid, signal.SIGINT)


def _to_parent(number: signal.Signals) -> Callable[[Command], None]:
    return lambda command: os.kill(command.process.pid, number)


_STOPS = {
    "ctrl-c": (_terminal, 0),
    "sigint": (_to_parent(signal.SIGINT), 0),
    "sigterm": (_to_parent(signal.SIGTERM), 0),
    "kill-9": (_to_parent(signal.SIGKILL), 0),
    "mpiexec-ctrl-c": (_terminal, 3),
    "mpiexec-kill-9": (_to_parent(signal.SIGKILL), 3),
}
_IN_THE_SUITE = ("ctrl-c", "sigterm", "kill-9")

_GENERATOR = {
    "generator": {"source": "embedded", "steps": 2, "batch_size": 4},
    "prompts": {"templates": ["a handwritten digit {label}"]},
    "images_per_label": 16,
    "shard_size": 8,
    "threads": 1,
}


class Chaos:
    """Runs of one federation, and how an undisturbed one ends."""

    def __init__(self, folder: Path, commands: Commands) -> None:
        self._folder = folder
        self._count = 0
        first = self.federation()
        started = time.monotonic()
        commands.run("run", first.path)
        self.seconds = time.monotonic() - started
        self.result = _result(first)

    def federation(self) -> Federation:
        """The federation in a new folder."""
        self._count += 1
        settings: dict[str, Any] = {
            "training": {"batch_size": 8, "learning_rate": [0.01, 0.02], "epochs": 5},
            "tuning": {"rounds": 1},
        }
        if _THOROUGH:
            settings |= {
                "labels": ["one", "two"],
                "arms": ["synthetic_only", "fedavg_random", "gptfl"],
                "synthesis": _GENERATOR,
                "pretraining": {"epochs": 10, "threads": 1},
            }
        return Federation(self._folder / str(self._count), **settings)


def _result(federation: Federation) -> dict[str, Any]:
    """All of a summary that does not depend on time, on the wire, or on where a run was interrupted."""
    summary = federation.summary()
    arms = {name: _without_times(arm) for name, arm in summary["arms"].items()}
    for arm in arms.values():
        arm["measures"] = [_without_times(measures) for measures in arm.get("measures", [])]
    return {"weights": summary["weights"], "arms": arms, "tuning": summary["tuning"]}


def _without_times(told: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in told.items() if not name.startswith(("bytes", "seconds", "silo_seconds"))}


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos(tmp_path_factory.mktemp("chaos"), Commands(tmp_path_factory.mktemp("output")))


@pytest.mark.timeout(4000)
@pytest.mark.parametrize("stop", _STOPS if _THOROUGH else _IN_THE_SUITE)
def test_a_stopped_run_leaves_no_process_and_goes_on_to_the_same_end(gptfl: Commands, chaos: Chaos, stop: str) -> None:
    moments = random.Random(f"chaos/{stop}")
    send, ranks = _STOPS[stop]
    stopped, spent, federation = 0, 0.0, chaos.federation()
    while stopped < _TRIES:
        command = _start(gptfl, federation, ranks)
        # Of what is left of the run, but at least of the time that it takes to start again and end.
        moment = moments.uniform(0, max(chaos.seconds - spent, chaos.seconds / 2))
        spent += moment
        ended = _sleep(command, moment)
        if not ended:
            send(command)
        stopped += not ended
        began = time.monotonic()
        code = command.wait(_GRACE)
        command.wait_until_gone(_GRACE)
        took = time.monotonic() - began
        print(f"{stop} {stopped}: after {moment:.1f} s, exit code {code}, all gone after {took:.1f} s", flush=True)
        if code == 0:
            _check_the_end(federation, chaos)
            spent, federation = 0.0, chaos.federation()
        elif not stop.endswith("kill-9") and not ranks:
            assert code == 130, command.stderr
            assert "the same command goes on" in command.stderr
            assert "Traceback" not in command.stderr
    command = _start(gptfl, federation, ranks)
    assert command.wait() == 0, command.stderr
    _check_the_end(federation, chaos)


def _start(gptfl: Commands, federation: Federation, ranks: int) -> Command:
    """A run whose command line has been read: before that, Python itself answers signals."""
    command = gptfl.mpi(ranks, "run", federation.path) if ranks else gptfl.start("run", federation.path)
    if not ranks:
        wait_for(lambda: _catches(command, signal.SIGTERM) or command.process.poll() is not None)
    return command


def _catches(command: Command, number: signal.Signals) -> bool:
    status = Path(f"/proc/{command.process.pid}/status").read_text()
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def _sleep(command: Command, seconds: float) -> bool:
    """Waits for a moment; true where the command ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and command.process.poll() is None:
        time.sleep(0.01)
    return command.process.poll() is not None


def _check_the_end(federation: Federation, chaos: Chaos) -> None:
    assert _result(federation) == chaos.result
    unfinished = [*federation.folder.rglob("*.part"), *federation.folder.rglob("incoming.safetensors")]
    assert unfinished == []

"""No process outlives the one that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptfl_dist.errors import LaunchError
from gptfl_dist.launch.lifeline import Child

CHILD = """
import sys, time
from gptfl_dist.launch.lifeline import Child, hold_on
hold_on()
child = Child([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], output=None) if len(sys.argv) > 1 else None
print("up", flush=True)
time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_child_and_grandchild_end_when_the_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", CHILD, CHILD, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert [parent.stdout.readline() for _ in range(3)] == ["up\n"] * 3
    (child,) = children(parent.pid)
    (grandchild,) = children(child)
    assert alive(child)
    assert alive(grandchild)
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(child) and not alive(grandchild))
    assert parent.stdout.read() == ""
    parent.stdout.close()


def test_a_child_lives_on_while_its_parent_does_and_stops_when_asked(tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as output:
        child = Child([sys.executable, "-c", CHILD], output=output, cwd=tmp_path)
    wait_for(lambda: log.read_text() == "up\n")
    assert child.process.poll() is None
    assert os.getsid(child.process.pid) == child.process.pid  # Ctrl-C in our terminal does not reach it
    assert child.stop() == -signal.SIGTERM
    assert child.stop() == -signal.SIGTERM  # again does no harm


def test_a_child_that_will_not_stop_is_killed(tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as output:
        child = Child([sys.executable, "-c", STUBBORN], output=output)
    wait_for(lambda: log.read_text() == "up\n")
    assert child.stop(grace=0.2) == -signal.SIGKILL


def test_an_exit_code_is_passed_on():
    child = Child([sys.executable, "-c", "raise SystemExit(7)"], output=None)
    child.process.wait()
    assert child.stop() == 7


def test_no_descriptor_is_left_behind(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    Child([sys.executable, "-c", ""], output=None).stop()
    with pytest.raises(LaunchError, match="no-such-program: No such file"):
        Child([str(tmp_path / "no-such-program")], output=None)
    with pytest.raises(LaunchError, match="no-such-folder"):
        Child([sys.executable], output=None, cwd=tmp_path / "no-such-folder")
    assert len(list(Path("/proc/self/fd").iterdir())) == before

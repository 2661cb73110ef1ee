"""Ctrl-C and SIGTERM of one command at its edges; what they do in mid-run is shown in tests/chaos."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

_ENDING = """
import atexit, os, sys
from gptfl_dist.cli.main import main
atexit.register(os.kill, os.getpid(), int(sys.argv.pop()))
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_last_step_changes_nothing(number: signal.Signals) -> None:
    command = [sys.executable, "-c", _ENDING, "--version", str(int(number))]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")

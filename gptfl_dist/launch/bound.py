"""Becomes another program, which the kernel kills as soon as the process that started it is gone.

    python -IS bound.py PARENT_PID COMMAND...     (started by TrainerProcess, never by hand)

A trainer takes up its channel only once torch and its data are loaded. Until then nothing else would end it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:  # else it was gone before
        os.execvp(command[0], command)


if __name__ == "__main__":
    main()

"""Runs beside a trainer, wherever a launcher started it: the trainer ends with its agent, and how it ended is told.

    python -IS guard.py SESSION SECONDS COMMAND...     (started by a launcher, once for each rank, never by hand)

The agent renews the file `lease` in the session's folder. Once it was found unchanged for SECONDS, by this machine's
clock alone, or the launcher that started this process is gone, the trainer is ended. It may be busy with imports or
data and deaf to its agent. Its exit code goes to the file `exit-RANK`.

Nothing but the standard library: it starts in no time and stays small beside the trainer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

_RANKS = ("GPTFL_RANK", "RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
# What torch.distributed asks for, and Slurm's name of it.
_TORCH = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
_LONGEST_PAUSE = 2.0
_GRACE = 10.0  # seconds that a trainer has after SIGTERM
_FIRST_LOOK = 5.0  # seconds in which the lease must be seen once
_STOPPING = (signal.SIGTERM, signal.SIGINT)


class _Lease:
    """What the file held last, and since when."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: bytes | None = None
        self._since = time.monotonic()

    def age(self) -> float:
        """Seconds for which nothing new was seen."""
        content = self._content
        with contextlib.suppress(OSError):
            content = self._path.read_bytes()
        if content != self._content:
            self._content, self._since = content, time.monotonic()
        return time.monotonic() - self._since

    @property
    def seen(self) -> bool:
        return self._content is not None


def main() -> None:
    session, limit, command = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        sys.exit("this job was requeued by Slurm: its agent submits another one")
    rank = int(next((os.environ[name] for name in _RANKS if name in os.environ), "0"))
    if "RANK" not in os.environ and "MASTER_ADDR" in os.environ and "SLURM_PROCID" in os.environ:
        os.environ |= {name: os.environ[slurm] for name, slurm in _TORCH.items()}
    lease = _Lease(session / "lease")
    while lease.age() < _FIRST_LOOK and not lease.seen:
        time.sleep(0.2)
    if not lease.seen:
        sys.exit(f"{session} is not there: its agent has ended, or launch.folder is not seen on this machine")
    code = _supervise(command, lease, limit)
    part = session / f".exit-{rank}.part"
    with contextlib.suppress(OSError):  # the agent is gone, or learns of it from the launcher
        part.write_text(str(code))
        part.rename(session / f"exit-{rank}")
    sys.exit(code if code >= 0 else 128 - code)


def _supervise(command: list[str], lease: _Lease, limit: float) -> int:
    """Runs the command to its end; returns its exit code, negative for a signal."""
    launcher = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *_STOPPING})
    bound = (sys.executable, "-IS", str(Path(__file__).with_name("bound.py")), str(os.getpid()))
    child = os.posix_spawn(sys.executable, [*bound, *command], os.environ, setsigmask=[], setsid=True)
    pause, end = 0.1, 0.0
    while True:
        arrived = signal.sigtimedwait({signal.SIGCHLD, *_STOPPING}, pause)
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            _kill(child)  # what it started
            return os.waitstatus_to_exitcode(status)
        if end and time.monotonic() > end:
            _kill(child)
        asked = arrived is not None and arrived.si_signo in _STOPPING
        if not end and (asked or os.getppid() != launcher or lease.age() > limit):
            if not asked:
                print("the agent of this trainer is gone: it is ended", file=sys.stderr, flush=True)
            os.kill(child, signal.SIGTERM)
            end = time.monotonic() + _GRACE
        pause = min(1.5 * pause, _LONGEST_PAUSE, limit / 4)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()

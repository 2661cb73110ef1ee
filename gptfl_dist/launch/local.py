"""`torchrun` and `mpirun`: the ranks of a trainer, started from this machine by a launcher that ends with its agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from gptfl_dist.errors import LaunchError
from gptfl_dist.files import storage_error
from gptfl_dist.launch import bound, guard
from gptfl_dist.launch.base import JobState
from gptfl_dist.launch.channel import ENV
from gptfl_dist.launch.trainer import require_program
from gptfl_dist.learning.group import outside

_GRACE = 15.0  # seconds that a launcher has to end its ranks


def guarded(session: Path, lease: float, trainer: Sequence[str]) -> list[str]:
    """The command of a rank."""
    return [sys.executable, "-IS", guard.__file__, str(session), f"{lease:g}", *trainer]


class LocalLauncher:
    """Runs `launcher`, if it has one, followed by the guarded command of a rank."""

    def __init__(
        self,
        launcher: Sequence[str],
        trainer: Sequence[str],
        *,
        lease: float,
        log: Path,
        cwd: Path,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`variables` are set in the environment of what is started."""
        self.log = log
        self._variables = variables
        self._launcher = launcher
        self._trainer = trainer
        self._lease = lease
        self._cwd = cwd
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, session: Path, run: str) -> None:
        try:
            self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            log = self.log.open("ab")
        except OSError as error:
            raise storage_error(error, self.log) from None
        with log:
            try:
                if self._launcher:
                    require_program(self._launcher[0])
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-IS", bound.__file__, str(os.getpid())),
                    *self._launcher,
                    *guarded(session, self._lease, self._trainer),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._cwd,
                    env={**outside(os.environ), **self._variables, ENV: str(session)},
                    start_new_session=True,
                )
            except OSError as error:
                raise LaunchError(
                    f"cannot start {self._name}: {error.strerror}", hint="check launch in the silo file, and PATH"
                ) from None

    async def state(self) -> JobState:
        assert self._process is not None
        code = self._process.returncode
        if code is None:
            return JobState("running", f"{self._name} runs")
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return JobState("ended", f"{self._name} {how}")

    @property
    def _name(self) -> str:
        return Path(self._launcher[0]).name if self._launcher else "the trainer"

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        # Asked first: only the launcher knows ranks that are in no group of ours, or on other machines.
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            process.terminate()
            await asyncio.wait_for(process.wait(), _GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

    async def sweep(self) -> None:
        """Nothing is left: the kernel ended the launcher with its agent, and guards end their ranks."""

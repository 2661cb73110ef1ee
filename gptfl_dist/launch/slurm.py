"""Slurm: the ranks of a trainer as a job of the silo's user.

A job is known by its name, which no other has and which is there before `sbatch` answers with a number. Its comment
says whose it is: an agent that was killed and started again finds its job by it, and cancels it.

How a job stands is asked of `squeue`, which forgets jobs some minutes after their end, then of `sacct`, which a
cluster may not have. Jobs are never requeued by Slurm: the agent submits another, so that no second trainer reads the
messages of the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from gptfl_dist.errors import LaunchError, TrainerLost
from gptfl_dist.launch.base import JobState
from gptfl_dist.launch.channel import ENV
from gptfl_dist.launch.local import guarded
from gptfl_dist.learning.group import outside

_log = logging.getLogger(__name__)

_SEPARATOR = "|"
_QUEUE = f"--Format=JobID:{_SEPARATOR},State:{_SEPARATOR},Reason:{_SEPARATOR},Name:{_SEPARATOR},Comment:{_SEPARATOR}"
_WAITING = {"PENDING": "queued", "CONFIGURING": "queued", "SUSPENDED": "suspended", "STOPPED": "suspended"}
_RUNNING = {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT"}
_ENDED = {
    "BOOT_FAIL": "could not boot its nodes",
    "CANCELLED": "was cancelled",
    "COMPLETED": "ended",
    "DEADLINE": "ended at its deadline",
    "FAILED": "failed",
    "NODE_FAIL": "lost a node",
    "OUT_OF_MEMORY": "ran out of memory",
    "PREEMPTED": "was preempted",
    "REVOKED": "was revoked",
    "TIMEOUT": "reached its time limit",
}
_ANSWER = 60.0  # seconds that a command of Slurm may take
_TRIES, _PAUSE = 3, 2.0  # of scancel, where Slurm's controller does not answer

# srun only where there are several ranks, or one rank would wait for a step. Where there are, torch.distributed learns
# from the guard which rank it is, and from here where rank 0 is: srun puts it onto the node of this script.
_SCRIPT = """\
#!/bin/bash
export {env}={session}
if [ "${{SLURM_NTASKS:-1}}" = 1 ]; then
  exec {rank}
fi
MASTER_ADDR=$(hostname)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
if [ -n "${{SLURM_CPUS_PER_TASK:-}}" ]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
exec srun --kill-on-bad-exit=1 {rank}
"""


class SlurmLauncher:
    """Submits a trainer with `sbatch` and the options of the silo file."""

    def __init__(
        self, silo: str, options: Sequence[str], trainer: Sequence[str], *, lease: float, log: Path, cwd: Path
    ) -> None:
        """`log` must be in a folder that the nodes see."""
        self.log = log
        self._silo = silo
        self._options = options
        self._trainer = trainer
        self._lease = lease
        self._cwd = cwd
        self._name = ""
        self._id = ""

    async def start(self, session: Path, run: str) -> None:
        self._name, self._id = f"gptfl-{self._silo}-{session.name}", ""
        self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        rank = shlex.join(guarded(session, self._lease, self._trainer))
        script = _SCRIPT.format(env=ENV, session=shlex.quote(str(session)), rank=rank)
        submitting = asyncio.create_task(
            _slurm(
                *("sbatch", "--parsable", "--no-requeue", f"--job-name={self._name}"),
                *(f"--comment=gptfl {run} {self._whose}", f"--chdir={self._cwd}"),
                *(f"--output={_literal(self.log)}", "--open-mode=append"),
                *self._options,
                script=script,
            )
        )
        try:
            code, out, said = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            await submitting  # else the job could come after `stop` had looked for it
            raise
        if code != 0:
            raise TrainerLost(f"sbatch refused the job\n{said}", hint="see launch.slurm.options in the silo file")
        self._id = out.strip().partition(";")[0]
        _log.info("Slurm job %s was submitted (%s)", self._id, self._name)

    @property
    def _whose(self) -> str:
        return f"{self._silo} {self.log.parent}"

    async def state(self) -> JobState:
        called = f"Slurm job {self._id}"
        code, out, said = await _slurm("squeue", "--noheader", "--me", "--states=all", f"--name={self._name}", _QUEUE)
        if code != 0:
            return JobState("running", f"{called}: squeue does not answer ({said})")
        if out.strip():
            _, state, reason, *_ = out.split(_SEPARATOR)
            if state in _WAITING:
                told = "" if reason in ("None", "") else f": {reason}"
                return JobState("waiting", f"{called} is {_WAITING[state]}{told}")
            if state in _RUNNING:
                return JobState("running", f"{called} runs")
            return JobState("ended", f"{called} {_ENDED.get(state, f'is {state}')}")
        state = await self._accounted()
        return JobState("ended", f"{called} {_ENDED.get(state, 'is not known to Slurm any more')}")

    async def _accounted(self) -> str:
        """The state of a job that has left the queue, where the cluster keeps accounts."""
        with contextlib.suppress(LaunchError):
            command = ("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={self._id}", "--format=State")
            code, out, _ = await _slurm(*command)
            if code == 0 and out.strip():
                return out.split()[0]  # of "CANCELLED by 1000" too
        return ""

    async def stop(self) -> None:
        if self._name:
            await _cancel(self._name, self._lease)
            self._name = ""

    async def sweep(self) -> None:
        """Raises LaunchError where Slurm is not here."""
        code, out, said = await _slurm("squeue", "--noheader", "--me", _QUEUE)
        if code != 0:
            raise LaunchError(f"squeue does not answer: {said}", hint="launch.how: slurm needs a working Slurm here")
        for line in out.splitlines():
            number, _, _, name, comment = line.split(_SEPARATOR, 4)
            if comment.startswith("gptfl ") and comment.rstrip(_SEPARATOR).endswith(f" {self._whose}"):
                _log.warning("Slurm job %s is of an earlier agent of this silo and is cancelled", number)
                await _cancel(name, self._lease)


async def _cancel(name: str, lease: float) -> None:
    said = ""
    for attempt in range(_TRIES):
        if attempt:
            await asyncio.sleep(_PAUSE)
        code, _, said = await _slurm("scancel", f"--user={getpass.getuser()}", f"--name={name}")
        if code == 0:
            return
    _log.error(
        "the job %s could not be cancelled: %s; where it runs it ends by itself within %g s, else cancel it by hand",
        *(name, said, lease),
    )


async def _slurm(*command: str, script: str = "") -> tuple[int, str, str]:
    """Runs a command of Slurm: its exit code, its output, the first line of what it complains of.

    Raises LaunchError where there is no such command.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**outside(os.environ), "LC_ALL": "C"},
        )
    except OSError as error:
        raise LaunchError(
            f"cannot start {command[0]}: {error.strerror}",
            hint="launch.how: slurm needs Slurm's commands where the agent runs: a login node, or another launcher",
        ) from None
    try:
        out, complaint = await asyncio.wait_for(process.communicate(script.encode()), _ANSWER)
    except TimeoutError:
        process.kill()
        await process.wait()
        return 1, "", f"no answer within {_ANSWER:g} s"
    assert process.returncode is not None
    said = complaint.decode(errors="replace").strip() or f"exit code {process.returncode}"
    return process.returncode, out.decode(errors="replace"), said.splitlines()[0]


def _literal(path: Path) -> str:
    """A path for --output, where % begins a pattern."""
    return str(path).replace("%", "%%")

"""What an agent needs of its trainer, however that was started: `TrainerLine`. What a launcher does: `Launcher`.

child                        TrainerProcess (trainer.py): messages through a socket pair, weights by their paths
torchrun, mpirun, slurm      TrainerJob (job.py): messages and weights through a shared folder (folder.py), started
                             by a LocalLauncher (local.py) or a SlurmLauncher (slurm.py), a guard at each rank
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from gptfl_dist.launch.folder import Message


class Progress(Protocol):
    """Is told how far a training is; or, in words, what it waits for."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


def unheard(done: int, total: int, note: str = "") -> None:
    """A Progress that nobody listens to."""


class TrainerLine(Protocol):
    """An agent's hold on its trainer."""

    @property
    def running(self) -> bool:
        """Whether it was started and, as far as is known, has not ended."""

    async def start(self, run: str = "") -> None:
        """Starts it; `run` is named where people see it, as in a queue. Raises LaunchError or TrainerLost."""

    async def ask(self, message: Message, answer: str, progress: Progress = unheard) -> Message:
        """Sends a message and waits for the answer of this type.

        Raises the error that the trainer met, TrainerLost where it is gone and starting it again may help, else
        TrainerError.
        """

    async def finish(self, message: Message) -> None:
        """Sends a last message and gives the trainer time to end by itself."""

    async def stop(self) -> None:
        """Ends the trainer and what it started."""


@dataclass(frozen=True, slots=True)
class JobState:
    """Where a job stands, and that in words, such as "Slurm job 12 is queued: Resources"."""

    life: Literal["waiting", "running", "ended"]
    words: str


class Launcher(Protocol):
    """Starts the ranks of a trainer, each under a guard, one job at a time."""

    log: Path
    """Where the output of the ranks goes."""

    async def start(self, session: Path, run: str) -> None:
        """Starts the job of a session. Raises LaunchError, or TrainerLost where trying again may help."""

    async def state(self) -> JobState:
        """How the job stands. To be asked with pauses."""

    async def stop(self) -> None:
        """Ends the job, also one that waits."""

    async def sweep(self) -> None:
        """Ends jobs that an agent of this silo left when it was killed."""

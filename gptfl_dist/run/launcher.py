"""Which launcher started this process, and so which exchange `--exchange auto` takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum

from gptfl_dist.errors import ConfigError, LaunchError


class Wire(StrEnum):
    """The values of `--exchange`."""

    auto = "auto"
    grpc = "grpc"
    mpi = "mpi"
    torch = "torch"
    memory = "memory"


@dataclass(frozen=True, slots=True)
class Launcher:
    """What a launcher of several processes says of itself in the environment, and of this one of them."""

    wire: Wire
    variable: str
    ranks: int
    rank: int

    @property
    def told(self) -> str:
        return f"{self.variable}={os.environ[self.variable]}"


_MPI = {
    "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MPI_LOCALNRANKS": "MPI_LOCALRANKID",
}
"""Environment variables of MPI launchers: number of ranks, own rank. Slurm's own alone say nothing of an MPI."""

_TORCHRUN = "TORCHELASTIC_RUN_ID"


def torchrun() -> Launcher | None:
    """torchrun, where it started this process. Its run id is asked for: other programs set RANK and WORLD_SIZE too."""
    if _TORCHRUN not in os.environ:
        return None
    return Launcher(Wire.torch, _TORCHRUN, int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))


def mpi_launcher() -> Launcher | None:
    """The MPI launcher that started this process."""
    for size, rank in _MPI.items():
        if size in os.environ:
            return Launcher(Wire.mpi, size, int(os.environ[size]), int(os.environ.get(rank, "0")))
    return None


@dataclass(frozen=True, slots=True)
class Choice:
    """The exchange that is taken, and why."""

    wire: Wire
    why: str


def choose(asked: Wire) -> Choice:
    """The exchange of this process. torchrun comes first: it may have been started by mpiexec, once a node.

    Raises ConfigError where a launcher started several processes that are to be none of a world, LaunchError where
    torchrun is to have started this one and has not.
    """
    launcher = torchrun() or mpi_launcher()
    if asked in (Wire.grpc, Wire.memory):
        if launcher is not None and launcher.ranks > 1:
            raise ConfigError(
                f"--exchange {asked} under a launcher ({launcher.told}) would start every process several times",
                hint=f"leave --exchange out, or start it without the launcher: gptfl run FILE --exchange {asked}",
            )
        return Choice(asked, f"--exchange {asked}")
    if asked is Wire.torch and torchrun() is None:
        raise LaunchError(
            f"--exchange torch, but torchrun did not start this process ({_TORCHRUN} is not set)",
            hint="start it with: torchrun --nproc-per-node N -m gptfl_dist run FILE",
        )
    if asked is not Wire.auto:
        return Choice(asked, f"--exchange {asked}")
    if launcher is not None:
        return Choice(launcher.wire, f"a launcher set {launcher.told}")
    slurm = "; Slurm's variables alone start no world" if "SLURM_JOB_ID" in os.environ else ""
    return Choice(Wire.grpc, f"neither an MPI launcher nor torchrun started this process{slurm}")

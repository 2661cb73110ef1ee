"""The world of ranks: opened over the backend that was chosen, checked, and shared out among the silos."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from gptfl_dist.errors import LaunchError
from gptfl_dist.exchange.collective.base import Collective
from gptfl_dist.run.launcher import Wire, mpi_launcher

NAMES = {"mpi": "MPI", "torch": "torch.distributed"}
_COMMANDS = {
    Wire.mpi: "mpiexec -n N gptfl run FILE",
    Wire.torch: "torchrun --nproc-per-node N -m gptfl_dist run FILE",
}


def assign(silos: Sequence[str], ranks: int) -> dict[str, range]:
    """The ranks of each silo, of a world of `ranks` whose first is the coordinator; silos in sorted order.

    With fewer ranks than silos, a rank serves several consecutive silos; with more, a silo has several consecutive
    ranks. No rank is idle, and shares differ by one at most: the first ones have more.
    """
    names, working = sorted(silos), ranks - 1
    if working >= len(names):
        shares = _cut(working, len(names))
        return {name: range(1 + first, 1 + stop) for name, (first, stop) in zip(names, shares, strict=True)}
    shares = _cut(len(names), working)
    return {
        names[place]: range(rank, rank + 1)
        for rank, (first, stop) in enumerate(shares, start=1)
        for place in range(first, stop)
    }


def _cut(whole: int, parts: int) -> list[tuple[int, int]]:
    """Cuts 0..whole into consecutive parts that differ by one at most, the larger ones first."""
    size, larger = divmod(whole, parts)
    starts = [part * size + min(part, larger) for part in range(parts + 1)]
    return list(pairwise(starts))


def open_world(wire: Wire) -> Collective:
    """Joins the world. Raises LaunchError where there is none, or none of several ranks."""
    collective = _torch_world() if wire is Wire.torch else _mpi_world()
    if collective.size < 2:
        raise LaunchError(
            f"the {NAMES[collective.transport]} world has {collective.size} rank, expected 2 or more: one coordinator, "
            "and one or more for the silos",
            hint=f"start it with: {_COMMANDS[wire]}, where N is best silos + 1",
        )
    return collective


def _torch_world() -> Collective:
    from gptfl_dist.exchange.collective.torch import TorchCollective

    return TorchCollective()


def _mpi_world() -> Collective:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"no MPI library can be loaded: {str(error).splitlines()[0]}",
            hint="install one with: pip install 'gptfl-dist[mpi]', or load your cluster's MPI module",
        ) from None
    from gptfl_dist.exchange.collective.mpi import MpiCollective

    start = mpi_launcher()
    if start is not None and start.ranks > 1 and MPI.COMM_WORLD.Get_size() == 1:
        library = MPI.Get_library_version().splitlines()[0].strip()
        raise LaunchError(
            f"the launcher started {start.ranks} processes ({start.variable}), but each is alone in its MPI world: "
            f"the launcher belongs to another MPI than the library that mpi4py loaded ({library})",
            hint="use the mpiexec of that library (`which -a mpiexec`), or install the launcher's MPI",
        )
    return MpiCollective(MPI.COMM_WORLD)

"""The least that a round can cost between ranks: `Bcast` and `Reduce` of typed buffers, nothing written or checked.

    mpiexec -n RANKS python mpi_floor.py      (started by collectives.py)

Rank k adds k to the weights and gives its share, as silo k does with 100 k samples; rank 0 gives nothing.
NULL_PARAMETERS and NULL_ROUNDS say how much of it. Rank 0 notes the end of each round in NULL_MARKS.
"""

from __future__ import annotations

import os

import numpy as np
from marks import mark
from mpi4py import MPI


def main() -> None:
    world = MPI.COMM_WORLD
    rank, silos = world.Get_rank(), world.Get_size() - 1
    parameters = int(os.environ["NULL_PARAMETERS"])
    share = np.float32(rank / (silos * (silos + 1) / 2))
    weights = np.zeros(parameters, np.float32)
    update = np.zeros(parameters, np.float32)
    if rank == 0:
        weights[:] = np.random.default_rng(7).standard_normal(parameters, dtype=np.float32)
    for _ in range(int(os.environ["NULL_ROUNDS"])):
        world.Bcast(weights, root=0)
        if rank:
            np.add(weights, np.float32(rank), out=update)
            update *= share
            world.Reduce(update, None, op=MPI.SUM, root=0)
        else:
            world.Reduce(update, weights, op=MPI.SUM, root=0)
            mark(what="round")


if __name__ == "__main__":
    main()

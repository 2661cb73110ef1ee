"""The wire of `collective.trust: tls` by itself, doing what floor.py does over gRPC: nothing written, nothing checked.

    mpiexec -n RANKS python tls_wire.py FOLDER      (started by collectives.py; FOLDER holds the certificates)

Each round rank 0 sends the whole model to every rank, and each sends it all back; rank 0 multiplies what comes by the
rank's weight and adds it into one float32 buffer. NULL_PARAMETERS and NULL_ROUNDS say how much of it. Rank 0 notes the
end of each round in NULL_MARKS.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import numpy as np
from marks import mark
from mpi4py import MPI

from gptfl_dist.exchange.collective.base import SEGMENT
from gptfl_dist.exchange.collective.tls import TlsCollective
from gptfl_dist.security.credentials import load_credentials
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.session import Session

PARAMETERS, ROUNDS = (int(os.environ[name]) for name in ("NULL_PARAMETERS", "NULL_ROUNDS"))
PART = SEGMENT // 4  # numbers


async def serve(wire: TlsCollective, silos: int) -> None:
    model = np.random.default_rng(7).standard_normal(PARAMETERS, dtype=np.float32)
    total = np.zeros(PARAMETERS, np.float32)
    part = np.empty(PART, np.float32)
    for _ in range(ROUNDS):
        for start in range(0, PARAMETERS, PART):
            await wire.broadcast(memoryview(model[start : start + PART]).cast("B"))
        for rank in range(1, silos + 1):
            await wire.say(rank, {"type": "send"})
            for start in range(0, PARAMETERS, PART):
                arrived = part[: PARAMETERS - start]
                await wire.receive(memoryview(arrived).cast("B"), rank)
                total[start : start + PART] += arrived * np.float32(100 * rank)
        np.divide(total, np.float32(100 * silos * (silos + 1) / 2), out=model)
        total[:] = 0
        mark(what="round")


async def join(wire: TlsCollective, rank: int) -> None:
    model = np.empty(PARAMETERS, np.float32)
    for _ in range(ROUNDS):
        for start in range(0, PARAMETERS, PART):
            await wire.broadcast(memoryview(model[start : start + PART]).cast("B"))
        model += np.float32(rank)
        await wire.hear()
        for start in range(0, PARAMETERS, PART):
            await wire.send(memoryview(model[start : start + PART]).cast("B"), 0)


async def main() -> None:
    world = MPI.COMM_WORLD
    rank, silos = world.Get_rank(), world.Get_size() - 1
    folder = Path(sys.argv[1]) / (f"silo-{rank}" if rank else "coordinator")
    credentials, _ = load_credentials(*(folder / f"{name}.pem" for name in ("authority", "certificate", "key")))
    peers = {0: Identity("floor", "coordinator", "coordinator")}
    if rank == 0:
        peers = {number: Identity("floor", "silo", f"silo-{number}") for number in range(1, silos + 1)}
    wire = TlsCollective(
        world, {number: Session(credentials, peer, f"rank {number}") for number, peer in peers.items()}
    )
    await wire.shake_hands()
    await (join(wire, rank) if rank else serve(wire, silos))


if __name__ == "__main__":
    asyncio.run(main())

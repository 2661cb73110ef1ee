"""Groups of real processes: how `torchrun` and `mpiexec` start a program as several ranks."""

from __future__ import annotations

import sys
from pathlib import Path

from support import MPIEXEC

from gptfl_dist.learning.group import RENDEZVOUS


def torchrun(ranks: int) -> list[str]:
    """The command that starts a script, or `-m` and a module, so often."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def mpiexec(ranks: int, meeting: Path) -> list[str]:
    """The same by an MPI's launcher, which sets no address: rank 0 writes it to the file `meeting`."""
    return ["env", f"{RENDEZVOUS}={meeting}", MPIEXEC, "-n", str(ranks), sys.executable]

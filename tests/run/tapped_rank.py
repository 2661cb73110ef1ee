"""Runs a Python module as a rank, with a tap on what it sends through the MPI.

python tapped_rank.py FOLDER PYTHON -m MODULE ARGUMENTS: the bytes go to FOLDER/RANK, the operations alone are others.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from mpi4py import MPI


class Tapped(MPI.Intracomm):
    def Isend(self, buffer: Any, *arguments: Any, **named: Any) -> MPI.Request:  # noqa: N802  (MPI's name)
        tap.write(buffer)
        return super().Isend(buffer, *arguments, **named)

    def Ibcast(self, buffer: Any, root: int = 0) -> MPI.Request:  # noqa: N802  (MPI's name)
        if self.Get_rank() == root:
            tap.write(buffer)
        return super().Ibcast(buffer, root)

    def Ireduce(self, buffer: Any, *arguments: Any, **named: Any) -> MPI.Request:  # noqa: N802  (MPI's name)
        if buffer is not MPI.IN_PLACE:
            tap.write(buffer)
        return super().Ireduce(buffer, *arguments, **named)


if __name__ == "__main__":
    tap = (Path(sys.argv[1]) / str(MPI.COMM_WORLD.Get_rank())).open("wb", buffering=0)
    MPI.COMM_WORLD = Tapped(MPI.COMM_WORLD)  # type: ignore[misc]  # mpi4py calls it final
    module, sys.argv = sys.argv[4], sys.argv[4:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)

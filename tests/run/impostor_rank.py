"""Runs `gptfl` as a rank that shows certificates which its own checks would not have let pass.

python impostor_rank.py RANK FOLDER PYTHON -m MODULE ARGUMENTS: of the ranks, RANK shows what lies in FOLDER.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from mpi4py import MPI

from gptfl_dist.run import collective
from gptfl_dist.security.authority import Credentials
from gptfl_dist.security.identity import Identity

if __name__ == "__main__":
    if int(sys.argv[1]) == MPI.COMM_WORLD.Get_rank():
        shown = Credentials(*((Path(sys.argv[2]) / f"{name}.pem").read_bytes() for name in Credentials.__match_args__))
        collective.coordinator_credentials = lambda path, settings: shown
        collective.silo_credentials = lambda path, silo, folder=None: (shown, Identity("tiny", "silo", "silo-2"))
    module, sys.argv = sys.argv[5], sys.argv[5:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)

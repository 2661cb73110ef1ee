"""Runs null programs to their end and measures their rounds; exchange.py and collectives.py compare them.

A federation whose silos train for nothing, the floor over gRPC (floor.py), and floors of somebody else's. Linux alone.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from marks import read_marks
from processes import Monitor

HERE = Path(__file__).resolve().parent
NUMBER_SIZE = 4  # bytes of a float32
MB = 1_000_000

_BESIDE = Path(sys.executable).with_name("mpiexec")  # the wheel's, where there is one
MPIEXEC = (str(_BESIDE) if _BESIDE.exists() else "mpiexec", "-n", "{ranks}", sys.executable)
"""Starts ranks of Python."""
TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run"),
    *("--standalone", "--nproc-per-node", "{ranks}", "--no-python", sys.executable),
)


@dataclass
class Run:
    """What one program took: per round, and from its start to the end of its first round."""

    cpu: list[float]
    wall: list[float]
    wire: list[float]
    first_round: float
    memory: dict[str, float]


def set_environment(parameters: int, silos: int) -> None:
    """What all null programs read."""
    os.environ |= {
        "NULL_PARAMETERS": str(parameters),
        "NULL_SILOS": str(silos),
        "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }


def write_federation(
    folder: Path, silos: int, rounds: int, silo_settings: Callable[[str], dict[str, Any]], **sections: Any
) -> Path:
    """A null federation in a new folder, with these settings of each silo and other sections; returns its file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = [f"silo-{number}" for number in range(1, silos + 1)]
    for name in names:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **silo_settings(name)}))
    federation = {
        "name": "null",
        "labels": ["a", "b"],
        "model": {"name": "function", "source": "model:null_model"},
        "arms": ["fedavg_random"],
        "federation": {"rounds": rounds, "quorum": "all"},
        "silos": [{"name": name, "file": f"{name}.yaml"} for name in names],
        **sections,
    }
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump(federation))
    shutil.copy(HERE / "model.py", folder)  # model.source names it beside the file
    return path


def check_result(folder: Path, silos: int, rounds: int) -> None:
    """The numbers that came out are those of the weighted mean: silo k adds k with 100 k samples."""
    import numpy as np

    from gptfl_dist.weights import WeightsFile

    step = sum(k * k for k in range(1, silos + 1)) / sum(range(1, silos + 1))
    models = folder / "run" / "models" / "fedavg_random-final.safetensors"
    with WeightsFile(folder / "run" / "random.safetensors") as start, WeightsFile(models) as end:
        size = min(1 << 20, start.nbytes)
        difference = np.frombuffer(end.read(0, size), "<f4") - np.frombuffer(start.read(0, size), "<f4")
    error = float(np.abs(difference - rounds * step).max())
    if error > 1e-3 * rounds * step:
        sys.exit(f"the weights are off by {error}")


def clear(folder: Path) -> None:
    """Removes a federation's run: gigabytes that wait to be written to the disk would slow the program that is next."""
    shutil.rmtree(folder / "run")


def save_credentials(folder: Path, federation: str, silos: int) -> None:
    """A set of certificates a side, in `coordinator` and `silo-1`, `silo-2` ... of a folder."""
    from gptfl_dist.security.authority import Authority

    authority = Authority.new(federation, valid=timedelta(days=1))
    authority.issue_coordinator(["127.0.0.1", "localhost"]).save(folder / "coordinator")
    for number in range(1, silos + 1):
        authority.issue_silo(f"silo-{number}").save(folder / f"silo-{number}")


def run_floor(folder: Path, silos: int, rounds: int) -> Run:
    """The floor over gRPC, with one more round than is measured: it is the beginning of the first that counts."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_credentials(folder, "floor", silos)
    return run_marked([sys.executable, str(HERE / "floor.py"), str(folder)], folder, rounds)


def run_marked(command: Sequence[str], folder: Path, rounds: int) -> Run:
    """A floor that marks the end of each of its rounds, of which it is told to do one more than is measured."""
    marks = folder / "marks.jsonl"
    environment = {**os.environ, "NULL_MARKS": str(marks), "NULL_ROUNDS": str(rounds + 1)}
    monitor, started = follow(command, environment, folder / "output.txt")
    return run_of(monitor, [mark["time"] for mark in read_marks(marks)], started, {})


def run_reference(kind: str, reference: Path, folder: Path, parameters: int, silos: int, rounds: int) -> dict[str, Any]:
    """What a floor that is not ours tells of itself; `runs/run.sh grpc|mpi PARAMETERS` prints it as JSON."""
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    # The Python and the MPI of our own programs. That floor gives the launcher first a word that Open MPI alone knows.
    for name, command in (("python", f'{sys.executable} "$@"'), ("mpirun", f'{MPIEXEC[0]} "${{@:2}}"')):
        (programs / name).write_text(f"#!/bin/bash\nexec {command}\n")
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "FEDBENCH_WORK": str(folder),
        "FEDBENCH_CLIENTS": str(silos),
        "FEDBENCH_ROUNDS": str(rounds + 1),
        "FEDBENCH_NETNS": "0",
        "FEDBENCH_LIMIT_S": "1200",
        "FEDBENCH_VENV_FLOOR": str(programs.parent),
    }
    run = ["bash", str(reference / "runs" / "run.sh"), kind, str(parameters)]
    subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads((folder / "results.jsonl").read_text().splitlines()[-1])
    if not result["round_wall"]:
        sys.exit(f"{reference} measured nothing; its logs lie in {folder}")
    return result


def follow(command: Sequence[str], environment: dict[str, str], output: Path) -> tuple[Monitor, float]:
    """Runs a command to its end; returns what was seen of it and when it began."""
    with output.open("wb") as file:
        started = time.time()
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        monitor = Monitor(process.pid)
        monitor.start()
        code = process.wait()
        monitor.stop()
    if code:
        sys.exit(f"{' '.join(command)} ended with code {code}:\n{output.read_text()[-3000:]}")
    return monitor, started


def run_of(monitor: Monitor, times: list[float], started: float, memory: dict[str, float]) -> Run:
    """The rounds between these moments."""
    spans = list(pairwise(times))
    return Run(
        cpu=[monitor.cpu_at(stop) - monitor.cpu_at(start) for start, stop in spans],
        wall=[stop - start for start, stop in spans],
        wire=[monitor.wire_at(stop) - monitor.wire_at(start) for start, stop in spans],
        first_round=times[1] - started,
        memory=memory,
    )


def median(runs: list[Run], what: str) -> float:
    """Over all rounds of several runs of one program."""
    return statistics.median(value for run in runs for value in getattr(run, what))


def write_result(result: dict[str, Any], path: Path | None) -> None:
    print(json.dumps(result, indent=1))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")

"""Real `gptfl` commands as processes, found again by a mark in their environment, and federations for them to run."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gptfl_dist.testing.federations import LABELS, tiny_federation, tiny_images
from gptfl_dist.weights import WeightsFile

_T = TypeVar("_T")
_MARK = "GPTFL_TEST_MARK"
GPTFL = (sys.executable, "-m", "gptfl_dist")
MPIEXEC = str(Path(sys.executable).with_name("mpiexec"))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def wait_for(found: Callable[[], _T], seconds: float = 60.0) -> _T:
    """The first true answer of `found`."""
    end = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < end, f"waited {seconds:g} s in vain"
        time.sleep(0.02)
    return answer


class Command:
    """A command in a process group of its own, and all processes that came of it."""

    def __init__(
        self, command: Sequence[str], folder: Path, environment: dict[str, str], cwd: Path | None = None
    ) -> None:
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        self._files = folder / f"{value}.out", folder / f"{value}.err"
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd,
                env={**os.environ, **environment, name: value},
                process_group=0,
            )

    @property
    def stdout(self) -> str:
        return self._files[0].read_text()

    @property
    def stderr(self) -> str:
        return self._files[1].read_text()

    def wait(self, seconds: float = 240.0) -> int:
        """The exit code."""
        return self.process.wait(seconds)

    def alive(self) -> dict[int, str]:
        """Command line by process id of everything that this command started and that still runs, itself included."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:  # gone meanwhile, or somebody else's
                continue
        return found

    def wait_until_gone(self, seconds: float = 10.0) -> None:
        """Expects that none of it is left by then."""
        wait_for(lambda: not self.alive(), seconds)

    def rank(self, number: str) -> int:
        """The process id of a rank that torchrun started."""
        for pid in self.pids("gptfl_dist"):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={number}".encode() in variables:
                return pid
        raise AssertionError(f"no rank {number}")

    def pids(self, part: str) -> list[int]:
        """The process ids whose command line holds `part`."""
        return [pid for pid, command in self.alive().items() if part in command]

    def kill(self) -> None:
        """Ends all of it."""
        while alive := self.alive():
            for pid in alive:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.process.poll()
        self.process.wait()


class Commands:
    """Starts commands; none outlives the fixture."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Command] = []

    def start(
        self,
        *arguments: str | Path,
        launcher: Sequence[str] = (),
        program: Sequence[str] = GPTFL,
        **environment: str,
    ) -> Command:
        """Starts `gptfl ARGUMENTS`; `program` takes the place of `gptfl`."""
        command = Command([*launcher, *program, *map(str, arguments)], self._folder, environment)
        self._started.append(command)
        return command

    def script(self, *command: str | Path, cwd: Path, **environment: str) -> Command:
        """Starts another program than `gptfl`, in a folder."""
        started = Command(list(map(str, command)), self._folder, environment, cwd)
        self._started.append(started)
        return started

    def mpi(self, ranks: int, *arguments: str | Path) -> Command:
        """Starts `mpiexec -n RANKS gptfl ARGUMENTS`."""
        return self.start(*arguments, launcher=(MPIEXEC, "-n", str(ranks)))

    def torch(self, ranks: int, *arguments: str | Path) -> Command:
        """Starts `torchrun --nproc-per-node RANKS -m gptfl_dist ARGUMENTS`."""
        launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", str(ranks), "-m", "gptfl_dist")
        command = Command([*launcher, *map(str, arguments)], self._folder, {})
        self._started.append(command)
        return command

    def run(self, *arguments: str | Path) -> Command:
        """Starts a command, waits for its end and expects it to go well."""
        command = self.start(*arguments)
        assert command.wait() == 0, command.stderr
        return command

    def kill(self) -> None:
        for command in self._started:
            command.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Whether anybody takes connections at a port of this machine."""
    with socket.socket() as line:
        return line.connect_ex(("127.0.0.1", port)) == 0


RULES = {"rounds": 3, "cohort": "all", "quorum": "all", "deadline": "120s", "join_deadline": "120s"}


Floats = np.ndarray[Any, np.dtype[np.float32]]


def numbers(path: Path) -> Floats:
    """The weights in a file, all of which are float32."""
    with WeightsFile(path) as file:
        assert {tensor.dtype for tensor in file.layout.tensors} == {"F32"}
        return np.frombuffer(file.read(0, file.nbytes), "<f4")


class Federation:
    """A federation file of rounds of about a second, which can be disturbed, and what a run of it leaves behind."""

    def __init__(self, folder: Path, *, silos: int = 2, epochs: int = 15, **settings: Any) -> None:
        training = {"batch_size": 8, "learning_rate": 0.01, "warm_up_rounds": 0, "epochs": epochs}
        settings = {"training": training, "federation": RULES, **settings}
        self.folder = folder
        self.silos = [f"silo-{number}" for number in range(1, silos + 1)]
        self.path = tiny_federation(folder, silos=silos, **settings)
        labels = settings.get("labels", LABELS)
        for number, silo in enumerate(self.silos, start=1):
            tiny_images(folder / f"{silo}.npz", count=160 + 40 * number, labels=labels, seed=number)
        self.run_folder = folder / "run"

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.run_folder / "summary.json").read_text())
        return summary

    def result(self) -> tuple[str, list[float]]:
        """What any way of running the federation must come to alike: final weights, and accuracy by round."""
        summary = self.summary()
        return summary["weights"]["fedavg_random"]["final"], summary["arms"]["fedavg_random"]["curve"]

    def owed(self, round_: int) -> set[str]:
        """The silos whose update of a round is awaited at this moment."""
        ledger = self.run_folder / "ledger.sqlite"
        if not ledger.exists():
            return set()
        with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as database:
            try:
                rows = database.execute(
                    "SELECT silo FROM orders WHERE round = ? AND digest IS NULL AND failure IS NULL", (round_,)
                ).fetchall()
            except sqlite3.OperationalError:  # no table yet
                return set()
        return {silo for (silo,) in rows}

"""The federation that is struck: its files and its start weights, and what its ledger says at any moment."""

from __future__ import annotations

import contextlib
import random
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_plan import ROUNDS, SILOS

from gptfl_dist.config.document import dump_yaml
from gptfl_dist.weights import WeightsFile

GPTFL = (sys.executable, "-m", "gptfl_dist")
TRAINER = Path(__file__).with_name("null_trainer.py")
ARM = "fedavg_random"


class World:
    """What all runs share: certificates, the start weights, and how the undisturbed run ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layout = folder / "layout.json"
        self.start = folder / "random.safetensors"
        self.final = ""
        self.seconds = 0.0

    def prepare(self) -> None:
        template = self.folder / "template"
        path = write_federation(template, "127.0.0.1:0", dict.fromkeys(SILOS, 1), self.folder / "credentials")
        code = (
            "import sys; from pathlib import Path; from gptfl_dist.config.load import load_federation;"
            "from gptfl_dist.learning.models import build_model; from gptfl_dist.weights.flat import FlatModel;"
            "file = load_federation(Path(sys.argv[1]));"
            "model = build_model(file.model, file.task, len(file.labels), file.seed);"
            "FlatModel(model).save(Path(sys.argv[2]))"
        )
        subprocess.run([sys.executable, "-c", code, str(path), str(self.start)], check=True)
        command = [*GPTFL, "credentials", str(path), "--host", "127.0.0.1", "--out", str(self.folder / "credentials")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with WeightsFile(self.start) as weights:
            assert {tensor.dtype for tensor in weights.layout.tensors} == {"F32"}
            self.layout.write_text(weights.layout.to_json())


def write_federation(folder: Path, listen: str, ports: dict[str, int], credentials: Path, **settings: Any) -> Path:
    """Writes the federation file and a silo file NAME.yaml for each silo; `ports` are those that the silos dial."""
    folder.mkdir(parents=True)

    def pems(side: str) -> dict[str, str]:
        return {name: str(credentials / side / f"{name}.pem") for name in ("authority", "certificate", "key")}

    for silo, port in ports.items():
        content = {
            "name": silo,
            "coordinator": {"address": f"127.0.0.1:{port}", **pems(silo)},
            "code": {"script": str(TRAINER)},
        }
        (folder / f"{silo}.yaml").write_text(dump_yaml(content))
    rules = {"rounds": ROUNDS, "cohort": "all", "quorum": "all", "deadline": "600s", "join_deadline": "600s"}
    content = {
        "name": "chaos",
        "labels": ["left", "right"],
        "model": {"name": "cnn"},
        "arms": [ARM],
        "federation": rules,
        "strategy": {"momentum": 0.5},  # which has a state on disk
        "exchange": {"listen": listen, "chunk": "64KiB", "keepalive": "5s", **pems("coordinator")},
        "silos": [{"name": silo} for silo in ports],
        **settings,
    }
    path = folder / "federation.yaml"
    path.write_text(dump_yaml(content))
    return path


def free_port() -> int:
    """A port that is free now and is not handed out to those who ask for any: the coordinator comes back to it."""
    for port in random.sample(range(10_000, 30_000), 1000):
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


@dataclass
class Ledger:
    """What a run's ledger says now."""

    there: bool = False
    round: int = 0
    kind: str = ""
    closed: bool = False
    finished: bool = False
    committed: set[str] = field(default_factory=set)  # in the newest round
    weights: set[str] = field(default_factory=set)  # digests that it names

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        now, path = cls(), folder / "ledger.sqlite"
        if not path.exists():
            return now
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1)) as database:
                now.finished = bool(database.execute("SELECT count(*) FROM arms WHERE finished").fetchone()[0])
                now.there = True
                rows = database.execute("SELECT round, kind, weights FROM rounds ORDER BY round DESC LIMIT 1")
                for round_, kind, weights in rows:
                    now.round, now.kind, now.closed = round_, kind, weights is not None
                rows = database.execute("SELECT start FROM arms UNION SELECT weights FROM rounds")
                now.weights = {digest for (digest,) in rows}
                rows = database.execute(
                    "SELECT silo FROM orders WHERE round = ? AND samples IS NOT NULL AND failure IS NULL", (now.round,)
                )
                now.committed = {silo for (silo,) in rows}
        except sqlite3.OperationalError:  # no table yet, or locked for the moment
            pass
        return now

    def holds(self, silo: str, round_: int) -> bool:
        """Whether a silo's update of a round is committed, as all are of the rounds before the newest."""
        return self.round > round_ or (self.round == round_ and silo in self.committed)

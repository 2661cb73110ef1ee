"""`gptfl health`, as Docker and a kubelet call it: of what runs on this machine, by its command line and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gptfl_dist.cli.main import app
from gptfl_dist.ledger.lock import locked
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.observe.live import LIVE
from gptfl_dist.run import health
from gptfl_dist.testing.federations import tiny_federation

Asked = Callable[..., tuple[int, str]]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Calls `gptfl health` beside a /proc of our own; gives the exit code and what it says."""
    monkeypatch.setattr(health, "PROC", tmp_path / "proc")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "uptime").write_text("5000.0 1.0\n")

    def call(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["health", *arguments])
        return done.exit_code, done.output.strip()

    return call


def running(folder: Path, *command: str, ticks: int = 490_000) -> None:
    """A process that began so many hundredths of a second after the boot."""
    process = folder / "proc" / "7"
    process.mkdir()
    (process / "cmdline").write_text("\0".join(command) + "\0")
    (process / "stat").write_text("7 (python (3)) " + " ".join(["S", *["0"] * 18, str(ticks), "0"]))
    (process / "cwd").symlink_to(folder)


def test_health_without_a_process(asked: Asked, tmp_path: Path) -> None:
    running(tmp_path, "/opt/gptfl/bin/python", "/opt/gptfl/bin/gptfl", "status", "federation.yaml")
    assert asked() == (1, "no gptfl coordinator or silo runs here")


def test_the_health_of_a_silo_is_what_its_log_says_last_in_this_life_of_the_agent(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "silo.yaml").write_text("name: north\ndata: {path: data}\nwork_folder: work\n")
    (tmp_path / "other.yaml").write_text("name: south\ndata: {path: data}\n")
    running(tmp_path, "/opt/gptfl/bin/python", "/opt/gptfl/bin/gptfl", "silo", "silo.yaml")
    log = tmp_path / "work" / "agent.jsonl"

    def add(message: str, age: float) -> None:
        time = datetime.now(UTC) - timedelta(seconds=age)
        with log.open("a") as file:
            file.write(json.dumps({"time": time.isoformat(), "level": "info", "message": message}) + "\n")

    assert asked()[0] == 1
    log.parent.mkdir()
    add("connected to the run 1 of the federation f", age=4000)
    assert asked() == (1, "not connected yet")  # an earlier agent was
    add("connected to the run 1 of the federation f", age=90)
    add("round 1 of gptfl: update delivered", age=80)
    assert asked()[0] == 0
    add("not connected: it does not answer", age=70)
    assert asked() == (1, "not connected: it does not answer")
    add("connected again", age=60)
    for file in ((), ("silo.yaml",), (str(tmp_path / "silo.yaml"), "--alive")):
        assert asked(*file) == (0, "connected again")
    assert asked("other.yaml") == (1, "no gptfl silo runs here with other.yaml")


def test_a_silo_is_asked_for_in_the_work_folder_that_it_was_started_with(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "silo.yaml").write_text("name: north\ndata: {path: data}\n")
    running(tmp_path, "gptfl", "silo", "--work-folder", "elsewhere", "silo.yaml")
    assert asked() == (1, f"{tmp_path / 'elsewhere'}: No such file or directory")


def test_the_check_reads_what_a_silo_logs() -> None:
    source = (Path(health.__file__).parent / "silo.py").read_text()
    for words in ('_log.info("connected to the run', '_log.info("connected again"', '_log.warning("not connected: '):
        assert words in source


def test_the_health_of_a_coordinator_is_whether_it_takes_silos_now(asked: Asked, tmp_path: Path) -> None:
    path = tiny_federation(tmp_path)
    running(tmp_path, "/sbin/init", "--", "gptfl", "coordinator", path.name)
    assert asked() == (1, "not started")
    assert asked(path.name, "--alive") == (1, "not started")
    folder = tmp_path / "run"
    folder.mkdir()
    request = {"name": "tiny", "silos": [{"name": "silo-1"}], "federation": {"rounds": 3}, "tuning": {"rounds": 1}}
    Ledger(folder, json.dumps(request)).close()
    with locked(folder) as life:
        live = {"life": life, "pid": 1, "started": "2025-11-03T02:00:00+00:00", "stage": "generate", "silos": {}}
        (folder / LIVE).write_text(json.dumps(live))
        assert asked() == (1, "running, generate: it takes no silos now")
        assert asked("--alive") == (0, "running, generate")
        (folder / LIVE).write_text(json.dumps({**live, "stage": "federate", "serving": True}))
        assert asked() == (0, "running, federate: it takes silos")
        assert asked(path.name, "--format", "json") == (
            0, json.dumps({"well": True, "why": "running, federate: it takes silos"})
        )  # fmt: skip
    assert asked("--alive") == (1, "killed")

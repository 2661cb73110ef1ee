"""The health check of the image: what it makes of a process and of what a run leaves behind."""

from __future__ import annotations

import importlib.util
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest
from deploy_files import DEPLOY, ROOT

from gptfl_dist.testing.federations import tiny_federation


@pytest.fixture
def health(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The check, with a /proc of our own."""
    spec = importlib.util.spec_from_file_location("health", DEPLOY / "docker" / "health.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PROC", tmp_path / "proc")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "uptime").write_text("5000.0 1.0\n")
    return module


def running(folder: Path, *command: str, ticks: int = 490_000) -> None:
    """A process that began so many hundredths of a second after the boot."""
    process = folder / "proc" / "7"
    process.mkdir()
    (process / "cmdline").write_text("\0".join(command) + "\0")
    (process / "stat").write_text("7 (python (3)) " + " ".join(["S", *["0"] * 18, str(ticks), "0"]))
    (process / "cwd").symlink_to(folder)


def test_health_without_a_process(health: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running(tmp_path, "/opt/gptfl/bin/python", "/opt/gptfl/bin/gptfl", "status", "federation.yaml")
    assert health.main() == 1
    assert capsys.readouterr().out == "no gptfl coordinator or silo runs here\n"


def test_the_health_of_a_silo(health: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the log says last of the connection, in this life of the agent."""
    (tmp_path / "silo.yaml").write_text("name: north\ndata: {path: data}\nwork_folder: work\n")
    running(tmp_path, "/opt/gptfl/bin/python", "/opt/gptfl/bin/gptfl", "silo", "silo.yaml")
    log = tmp_path / "work" / "agent.jsonl"

    def asked() -> tuple[int, str]:
        code: int = health.main()
        return code, capsys.readouterr().out.strip()

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
    assert asked() == (0, "connected again")


def test_the_health_check_reads_what_a_silo_logs() -> None:
    source = (ROOT / "gptfl_dist" / "run" / "silo.py").read_text()
    for words in ('_log.info("connected to the run', '_log.info("connected again"', '_log.warning("not connected: '):
        assert words in source


def test_the_health_of_a_coordinator(health: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_federation(tmp_path)
    running(tmp_path, "/sbin/init", "--", "gptfl", "coordinator", "federation.yaml")
    assert health.main() == 1
    assert capsys.readouterr().out == "not started\n"

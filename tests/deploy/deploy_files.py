"""Where the files are that deploy a coordinator or a silo, and how they are looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import helm_python
import typer.main
import yaml

from gptfl_dist import errors
from gptfl_dist.cli.main import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "gptfl"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
COMPOSE = sorted((DEPLOY / "compose").glob("*.yaml"))
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
BIN = Path(sys.executable).parent
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group has them
CODES = {value.exit_code for value in vars(errors).values() if hasattr(value, "exit_code")}
FILES = {"coordinator": "federation.yaml", "silo": "silo.yaml"}
OLDEST_CLUSTER = "1.29.0"


def check(*command: str | Path, cwd: Path | None = None) -> str:
    """What a validator says; it must be content."""
    done = subprocess.run([*command], capture_output=True, text=True, cwd=cwd, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_yaml(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def parse_command(words: list[str]) -> None:
    """Expects that `gptfl` takes these words."""
    command, rest = COMMANDS[words[0]], words[1:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(" ".join(words[:1]), rest)


def values(role: str, /, **more: Any) -> dict[str, Any]:
    text = (DEPLOY / "config" / FILES[role]).read_text()
    return {**read_yaml(CHART / "ci" / f"{role}-values.yaml"), "file": text, **more}


def rendered(role: str, /, **more: Any) -> list[dict[str, Any]]:
    with helm_python.Chart.load(CHART) as chart:
        texts = chart.render(values(role, **more), name="north", namespace="federation")
    found = [yaml.safe_load(text) for name, text in texts.items() if name.endswith(".yaml")]
    return [manifest for manifest in found if manifest]


def one(kind: str, manifests: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def job(role: str, /, **more: Any) -> dict[str, Any]:
    return one("Job", rendered(role, **more))

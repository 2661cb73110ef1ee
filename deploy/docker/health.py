"""Whether the coordinator or silo of this container is well: exit code 0 or 1, and a line that says why.

A coordinator is well while it holds its run, which `gptfl status` tells. A silo is well while it is connected, which
the last word about it in its agent.jsonl tells, if it is of the agent that runs now. The command line of that process
tells which file is meant, so the check needs no setting.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import typer.main

from gptfl_dist.cli.main import app
from gptfl_dist.config.load import load_silo
from gptfl_dist.errors import GptflError
from gptfl_dist.run.status import status_of

PROC = Path("/proc")
ROLES = ("coordinator", "silo")
AT_WORK = ("running", "pausing", "paused", "aborting", "finished")
SLACK = timedelta(seconds=2)  # the clock of a process's start is coarse


def main() -> int:
    found = find()
    if found is None:
        print("no gptfl coordinator or silo runs here")
        return 1
    process, role, parameters = found
    os.chdir(process / "cwd")
    try:
        well, why = coordinator(parameters) if role == "coordinator" else silo(parameters, started(process))
    except GptflError as error:
        well, why = False, error.message
    print(why)
    return 0 if well else 1


def find() -> tuple[Path, str, dict[str, Any]] | None:
    """The process, its role, and the parameters of its command."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group has them
    for process in PROC.glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")[:-1]
        except OSError:  # it ended meanwhile
            continue
        for at, word in enumerate(words[:-1]):
            if Path(word).name == "gptfl" and words[at + 1] in ROLES:
                role = words[at + 1]
                return process, role, commands[role].make_context(role, words[at + 2 :]).params
    return None


def started(process: Path) -> datetime:
    """When a process began, by how long it has run."""
    ticks = int((process / "stat").read_text().rpartition(")")[2].split()[19])
    up = float((PROC / "uptime").read_text().split()[0])
    return datetime.now(UTC) - timedelta(seconds=up - ticks / os.sysconf("SC_CLK_TCK"))


def coordinator(parameters: dict[str, Any]) -> tuple[bool, str]:
    state = status_of(Path(parameters["file"])).state
    return state in AT_WORK, state


def silo(parameters: dict[str, Any], since: datetime) -> tuple[bool, str]:
    file = Path(parameters["file"])
    settings = load_silo(file)
    folder = parameters["work_folder"] or settings.work_folder or file.parent / f"{settings.name}-work"
    last = None
    try:
        with (Path(folder) / "agent.jsonl").open(encoding="utf-8") as log:
            for text in log:
                if '"message": "connected' in text or '"message": "not connected' in text:
                    last = text
    except OSError as error:
        return False, f"{folder}: {error.strerror}"
    line = None if last is None else json.loads(last)
    if line is None or datetime.fromisoformat(line["time"]) < since - SLACK:
        return False, "not connected yet"
    return line["message"].startswith("connected"), line["message"]


if __name__ == "__main__":
    sys.exit(main())

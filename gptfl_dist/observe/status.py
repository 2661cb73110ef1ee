"""What an operator is told of a run at this moment, as values and as text. `run.status` finds it out."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from gptfl_dist.observe.wording import UNKNOWN, duration, percent, size

State = Literal[
    "not started", "running", "pausing", "paused", "aborting", "aborted", "finished", "stopped", "failed", "killed"
]
Work = Literal["delivered", "training", "awaited", "failed", "refused", "recalled", "not called on", "idle"]


@dataclass(frozen=True, slots=True)
class SiloStatus:
    """One silo. `connected` is None where no coordinator is at work; `behind` counts the rounds in which it was called
    on and did not deliver since it last did; `progress` is the share of its training that is done; `refused` counts
    its refused updates; `revoked` is whether its certificate was, and it has no other."""

    name: str
    connected: bool | None
    work: Work
    reason: str
    progress: float | None
    behind: int
    seen: str | None
    refused: int = 0
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class RoundStatus:
    """The round in progress, or the last one. Seconds so far, and until the deadline where one is running."""

    arm: str
    round: int
    rounds: int
    state: str
    seconds: float | None
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class ArmStatus:
    """What an arm has come to; `stopped_by` is the setting that ended it early. Best is meant on validation data."""

    arm: str
    done: int
    rounds: int
    finished: bool
    stopped_by: str | None
    validation_accuracy: float | None
    best_round: int | None
    seconds: float
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True, slots=True)
class Status:
    """A run. Times are in UTC, ISO 8601. `next` says what the operator can do, most urgent first."""

    run: str
    folder: str
    state: State
    at: str
    since: str | None = None
    pid: int | None = None
    stage: str | None = None
    message: str = ""
    round: RoundStatus | None = None
    silos: list[SiloStatus] = field(default_factory=list)
    arms: list[ArmStatus] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    next: list[str] = field(default_factory=list)


_STAGES = {
    "generate": "making the synthetic images",
    "pretrain": "training the start model on the synthetic images",
    "federate": "starting the federation",
    "report": "writing the report",
}
_STATES = {
    "gather": "waiting for silos",
    "train": "silos train",
    "aggregate": "aggregating",
    "evaluate": "final evaluation",
    "paused": "paused before it",
    "done": "done",
    "broken off": "was in progress",
}


def status_lines(status: Status) -> list[str]:
    """The status as a person reads it, one line after the other."""
    lines = [f"{status.run}: {_headline(status)}"]
    if status.message:
        lines.append(f"  {status.message}")
    if status.round is not None:
        lines += ["", _round_line(status.round)]
    if status.silos:
        head = ["silo", "connection", "behind", "last heard", "work"]
        lines += ["", *_table([head, *(_silo(silo, status.at) for silo in status.silos)])]
    if status.arms:
        head = ["arm", "rounds", "best on validation data", "time", "down", "up"]
        lines += ["", *_table([head, *map(_arm, status.arms)])]
    taken = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in status.seconds.items() if seconds >= 0.1)
    if taken:
        lines += ["", f"time of stages that are over: {taken}"]
    if status.next:
        lines += ["", *(f"-> {step}" for step in status.next)]
    return lines


def ago(since: str, at: str) -> str:
    """How long before `at` the time `since` was."""
    return duration(max(0.0, (_time(at) - _time(since)).total_seconds()))


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _headline(status: Status) -> str:
    told = str(status.state)
    if status.since is not None:
        told += f" since {_clock(status.since)} ({ago(status.since, status.at)})"
    if status.pid is not None:
        told += f", process {status.pid}"
    if status.stage and status.round is None:
        told += f", {_STAGES.get(status.stage, status.stage)}"
    return told


def _clock(time: str) -> str:
    return f"{_time(time):%Y-%m-%d %H:%M:%S} UTC"


def _round_line(now: RoundStatus) -> str:
    which = f"round {now.round} of {now.rounds}" if now.round <= now.rounds else f"after round {now.round - 1}"
    told = f"{now.arm}, {which}: {_STATES.get(now.state, now.state)}"
    if now.seconds is not None:
        told += f", {duration(now.seconds)} so far"
    if now.seconds_left is not None:
        left = now.seconds_left
        told += f", {duration(left)} until its deadline" if left > 0 else ", its deadline has passed"
    return told


def _silo(silo: SiloStatus, at: str) -> list[str]:
    away = "revoked" if silo.revoked else "missing"
    connection = UNKNOWN if silo.connected is None else "connected" if silo.connected else away
    work = str(silo.work)
    if silo.progress is not None:
        work += f" {100 * silo.progress:.0f} %"
    if silo.reason:
        work += f": {silo.reason}"
    behind = f"{silo.behind} round{'' if silo.behind == 1 else 's'}" if silo.behind else UNKNOWN
    seen = UNKNOWN if silo.seen is None else f"{ago(silo.seen, at)} ago"
    return [silo.name, connection, behind, seen, work]


def _arm(arm: ArmStatus) -> list[str]:
    best = UNKNOWN
    if arm.validation_accuracy is not None:
        best = f"{percent(arm.validation_accuracy)} after round {arm.best_round}"
    rounds = f"{arm.done} of {arm.rounds}" + (f" ({arm.stopped_by})" if arm.stopped_by else "")
    return [arm.arm, rounds, best, duration(arm.seconds), size(arm.bytes_down), size(arm.bytes_up)]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

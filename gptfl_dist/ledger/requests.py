"""What an operator asks of a run from another process: to pause, to go on, to end for good.

A request is a row among the ledger's facts. The coordinator at work looks for it about once a second; where none is at
work it stays, and counts at the next start.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from gptfl_dist.errors import ConfigError, StorageError
from gptfl_dist.ledger.record import FILE_NAME

LOOK_EVERY = 1.0
"""Seconds between two looks of a coordinator at what was asked."""

PAUSE, ABORT = "pause", "abort"
"""The names of the facts."""

_PATIENCE = 10.0  # seconds that a request waits for a coordinator that is just writing


@dataclass(frozen=True, slots=True)
class Abort:
    """The run shall end for good. `reason` is the operator's, for the silos' operators; `at` is a time in UTC."""

    reason: str
    at: str


class Facts(Protocol):
    """The ledger, or a reader of it."""

    def fact(self, name: str) -> str | None: ...


def paused_since(facts: Facts) -> str | None:
    """When it was asked that no other round be begun (UTC, ISO 8601); None where rounds may be begun."""
    return facts.fact(PAUSE)


def abort_asked(facts: Facts) -> Abort | None:
    """The wish to end the run for good, if somebody has it."""
    told = facts.fact(ABORT)
    return None if told is None else Abort(**json.loads(told))


def ask_to_pause(folder: Path) -> None:
    """Raises ConfigError where no run was started in the folder, StorageError where it cannot be written."""
    _write(folder, "INSERT OR IGNORE INTO facts VALUES (?, ?)", (PAUSE, _now()))


def ask_to_resume(folder: Path) -> None:
    """Raises as `ask_to_pause`."""
    _write(folder, "DELETE FROM facts WHERE name = ?", (PAUSE,))


def ask_to_abort(folder: Path, reason: str) -> None:
    """The first wish stands. Raises as `ask_to_pause`."""
    wish = json.dumps(asdict(Abort(reason, _now())))
    _write(folder, "INSERT OR IGNORE INTO facts VALUES (?, ?)", (ABORT, wish))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(folder: Path, statement: str, values: tuple[str, ...]) -> None:
    path = folder / FILE_NAME
    if not path.exists():
        raise ConfigError(f"{folder}: no run was started here", hint="start it first, with gptfl run or its like")
    try:
        address = f"file:{quote(str(path.absolute()))}?mode=rw"
        database = sqlite3.connect(address, uri=True, timeout=_PATIENCE, isolation_level=None)
        with contextlib.closing(database):
            database.execute(statement, values)
    except sqlite3.Error as error:
        raise StorageError(
            f"{path}: {error}", hint="ask as the user who runs the coordinator, on its machine"
        ) from None

"""What only a coordinator at work knows, in a small file for `gptfl status`: who is connected, how far each one is.

It is written at most once a second and only when something changed, whole or not at all, but not forced to the disk:
after a power cut it is worth nothing. Everything else that an operator asks stands in the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from gptfl_dist.errors import StorageError
from gptfl_dist.files import replacing, write_at

LIVE = "live.json"
"""In the run folder."""

_EVERY = 1.0  # seconds between two writes, at least


@dataclass(frozen=True, slots=True)
class Standing:
    """Where an arm stands: the state of its round, who is connected, who may not come back as their certificate was
    revoked, and the seconds until the state's deadline."""

    arm: str
    rounds: int
    round: int
    state: str
    connected: frozenset[str]
    revoked: frozenset[str]
    seconds_left: float | None


@dataclass(slots=True)
class LiveSilo:
    """`seen` is when it was heard last, by this coordinator or an earlier one (UTC, ISO 8601); `note` says in the
    silo's words what its training waits for."""

    connected: bool = False
    revoked: bool = False
    seen: str | None = None
    done: int | None = None
    total: int | None = None
    note: str = ""


@dataclass(slots=True)
class Live:
    """The file's content. `life` names the coordinator as the lock does; `since` is when `state` began; `serving` is
    whether silos are taken.

    Times are in UTC, ISO 8601.
    """

    life: str
    pid: int
    started: str
    stage: str = ""
    serving: bool = False
    arm: str | None = None
    rounds: int | None = None
    round: int | None = None
    state: str | None = None
    since: str | None = None
    deadline: str | None = None
    silos: dict[str, LiveSilo] = field(default_factory=dict)


class LiveFile:
    """Keeps the file of a run folder. To be used from the event loop."""

    def __init__(self, folder: Path, life: str) -> None:
        """What an earlier coordinator heard of the silos last is taken over."""
        before = read_live(folder)
        self._path = folder / LIVE
        self._live = Live(life, os.getpid(), now())
        if before is not None:
            self._live.silos = {name: LiveSilo(seen=silo.seen) for name, silo in before.silos.items()}
        self._due: asyncio.TimerHandle | None = None
        self._write()  # at once: what the earlier one wrote of connections is not true any more

    def stage(self, name: str) -> None:
        """A stage of the run begins."""
        self._live.stage = name
        self._changed()

    def serves(self, yes: bool) -> None:
        """Silos are taken from now on, or no more."""
        self._live.serving = yes
        self._changed()

    def stands(self, standing: Standing) -> None:
        live = self._live
        if (live.arm, live.round, live.state) != (standing.arm, standing.round, standing.state):
            live.since = now()
        live.arm, live.rounds, live.round = standing.arm, standing.rounds, standing.round
        live.state = standing.state
        left = standing.seconds_left
        live.deadline = None if left is None else now(left)
        for name in standing.connected | standing.revoked | live.silos.keys():
            self._silo(name).connected = name in standing.connected
            self._silo(name).revoked = name in standing.revoked
        self._changed()

    def heard(self, silo: str) -> None:
        """A silo gave a sign of life."""
        self._silo(silo).seen = now()
        self._changed()

    def progress(self, silo: str, done: int, total: int, note: str = "") -> None:
        known = self._silo(silo)
        known.done, known.total, known.note = done, total, note
        self._changed()

    def done(self, silo: str) -> None:
        """A silo is at work no more."""
        known = self._silo(silo)
        known.done, known.total, known.note = None, None, ""
        self._changed()

    def close(self) -> None:
        """Writes what is not written yet."""
        if self._due is not None:
            self._due.cancel()
            self._write()

    def _silo(self, name: str) -> LiveSilo:
        return self._live.silos.setdefault(name, LiveSilo())

    def _changed(self) -> None:
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(_EVERY, self._write)

    def _write(self) -> None:
        self._due = None
        content = memoryview(json.dumps(asdict(self._live)).encode())
        # Nobody ends a run because its progress cannot be told.
        with contextlib.suppress(StorageError), replacing(self._path, durable=False) as fd:
            write_at(fd, 0, content)


def read_live(folder: Path) -> Live | None:
    """What the last coordinator wrote; None where there is nothing, or nothing that can be understood."""
    try:
        content = json.loads((folder / LIVE).read_bytes())
        silos = {str(name): LiveSilo(**silo) for name, silo in content.pop("silos").items()}
        return Live(**content, silos=silos)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def now(seconds_later: float = 0.0) -> str:
    """The time in UTC, ISO 8601."""
    return (datetime.now(UTC) + timedelta(seconds=seconds_later)).isoformat(timespec="seconds")

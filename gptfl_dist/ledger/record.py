"""The reading side of a run's record, for the coordinator that writes it (`store`) and for others (`reader`)."""

from __future__ import annotations

import contextlib
import errno
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from gptfl_dist.aggregation.diversity import Diversity
from gptfl_dist.errors import StorageError
from gptfl_dist.files import storage_error
from gptfl_dist.learning.measures import Measures
from gptfl_dist.ledger.records import ArmRecord, CountedUpdate, OrderRecord, RoundRecord, Waiting

FILE_NAME = "ledger.sqlite"
VERSION = 2  # of the schema; SQLite keeps it as user_version
AUDITED = "audit"  # the fact that names the newest entry of the audit log which is known to be written
EPOCH = "epoch"  # the fact that tells the epoch of the run and what began it; there is none in the first
ANEW = "bring the run folder back from a backup, or start anew with --fresh"


def judged_name(arm: str) -> str:
    """The fact that tells how an arm's weights do on held-out synthetic data."""
    return f"judged/{arm}"


class Record:
    """What can be read of a run's record, whoever opened it. Every call is safe from any thread."""

    folder: Path
    _path: Path
    _database: sqlite3.Connection
    _lock: threading.RLock

    def _require_our_schema(self) -> None:
        tables = self._database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if tables and version != VERSION:
            raise StorageError(
                f"{self._path}: the record was made by another release (its version is {version}, ours {VERSION})",
                hint="finish the run with that release, set another run_folder, or start anew with --fresh",
            )

    def fact(self, name: str) -> str | None:
        """A text noted under a name, or None."""
        row = self._execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def seconds(self) -> dict[str, float]:
        """Seconds by stage."""
        rows = self._execute("SELECT name, value FROM facts WHERE name LIKE 'seconds/%' ORDER BY rowid")
        return {name.removeprefix("seconds/"): float(value) for name, value in rows.fetchall()}

    def arm(self, arm: str) -> ArmRecord | None:
        """All that is known of an arm."""
        row = self._execute(
            "SELECT arm, learning_rate, start, finished, best_round, tested FROM arms WHERE arm = ?", (arm,)
        ).fetchone()
        if row is None:
            return None
        orders: dict[int, list[OrderRecord]] = {}
        updates: dict[int, list[CountedUpdate]] = {}
        for round_, silo, nonce, samples, metrics, digest, failure, counted in self._execute(
            "SELECT round, silo, nonce, samples, metrics, digest, failure, counted FROM orders WHERE arm = ? "
            "ORDER BY silo",
            (arm,),
        ).fetchall():
            told = None if metrics is None else json.loads(metrics)
            orders.setdefault(round_, []).append(OrderRecord(silo, nonce, samples, told, digest, failure, counted))
            if counted is not None:
                updates.setdefault(counted, []).append(CountedUpdate(silo, samples, counted - round_))
        rounds = tuple(
            RoundRecord(
                round_,
                kind,
                base,
                tuple(json.loads(cohort)),
                weights,
                seconds,
                down,
                up,
                _measures(tested),
                tuple(orders.get(round_, [])),
                tuple(updates.get(round_, [])),
                None if diversity is None else Diversity(**json.loads(diversity)),
            )
            for round_, kind, base, cohort, weights, seconds, down, up, tested, diversity in self._execute(
                "SELECT round, kind, base, cohort, weights, seconds, bytes_down, bytes_up, tested, diversity "
                "FROM rounds WHERE arm = ? ORDER BY round",
                (arm,),
            ).fetchall()
        )
        return ArmRecord(row[0], row[1], row[2], bool(row[3]), row[4], rounds, _measures(row[5]), self._judged(arm))

    def begun_arm(self, arm: str) -> ArmRecord:
        """All that is known of an arm that was begun."""
        record = self.arm(arm)
        assert record is not None
        return record

    def _judged(self, arm: str) -> tuple[tuple[float, float], ...]:
        return tuple((accuracy, loss) for accuracy, loss in json.loads(self.fact(judged_name(arm)) or "[]"))

    def arms(self) -> list[str]:
        """The names of all arms and trials, in the order of their beginning."""
        return [str(row[0]) for row in self._execute("SELECT arm FROM arms ORDER BY rowid").fetchall()]

    def waiting(self) -> list[Waiting]:
        """The oldest of the events that are not known to stand in the audit log, a thousand at most."""
        rows = self._execute("SELECT number, token, time, event, fields FROM outbox ORDER BY number LIMIT 1000")
        return [
            Waiting(number, token, at, event, json.loads(fields))
            for number, token, at, event, fields in rows.fetchall()
        ]

    @property
    def audited(self) -> tuple[int, str] | None:
        """Number and hash of the newest entry of the audit log that is known to be written; None before the first."""
        known = self.fact(AUDITED)
        return None if known is None else (json.loads(known)["number"], json.loads(known)["hash"])

    def weights_path(self, digest: str) -> Path:
        """Where the weights of this digest lie."""
        return self.folder / "weights" / f"{digest}.safetensors"

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        with self._lock, self._storing():
            return self._database.execute(statement, values)

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        """Turns what SQLite and the disk refuse into StorageError."""
        try:
            yield
        except OSError as error:
            raise storage_error(error, self._path) from None
        except (sqlite3.NotSupportedError, sqlite3.OperationalError) as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise storage_error(OSError(errno.ENOSPC, str(error)), self._path) from None
            raise StorageError(
                f"{self._path}: {error}", hint="check the folder, its permissions and the disk"
            ) from None
        except sqlite3.Error as error:
            raise StorageError(
                f"{self._path}: the record is damaged ({error})",
                hint=ANEW,
            ) from None


def _measures(told: str | None) -> Measures | None:
    return None if told is None else Measures(**json.loads(told))

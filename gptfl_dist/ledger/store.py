"""The coordinator's durable record: SQLite beside weights files that are named by their content.

Every step of a round is one transaction, so a coordinator that was killed finds the round it was in, the orders it
gave and the updates it had committed. A durable ledger is there after a power cut too: each transaction, and every file
that it names, is on the disk before it counts. The whole of a run folder belongs to one federation file: another is
refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gptfl_dist.errors import ConfigError, ModelError, StorageError
from gptfl_dist.files import storage_error, sync_folder
from gptfl_dist.weights import Layout, WeightsFile, write_weights

_VERSION = 1  # of the schema; SQLite keeps it as user_version
_SCHEMA = f"""
PRAGMA user_version = {_VERSION};
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS arms (
    arm TEXT PRIMARY KEY, learning_rate REAL NOT NULL, start TEXT NOT NULL, finished INTEGER NOT NULL DEFAULT 0,
    best_round INTEGER
);
CREATE TABLE IF NOT EXISTS rounds (
    arm TEXT NOT NULL, round INTEGER NOT NULL, kind TEXT NOT NULL, base TEXT NOT NULL, cohort TEXT NOT NULL,
    weights TEXT, seconds REAL, bytes_down INTEGER, bytes_up INTEGER, test_accuracy REAL,
    PRIMARY KEY (arm, round)
);
CREATE TABLE IF NOT EXISTS orders (
    arm TEXT NOT NULL, round INTEGER NOT NULL, silo TEXT NOT NULL, nonce TEXT NOT NULL,
    samples INTEGER, metrics TEXT, digest TEXT, failure TEXT, counted INTEGER,
    PRIMARY KEY (arm, round, silo)
);
"""

_ANEW = "bring the run folder back from a backup, or start anew with --fresh"


@dataclass(frozen=True, slots=True)
class OrderRecord:
    """An order that was given. `samples`, `metrics` and `digest` are None until it was answered.

    The metrics are those of the weights that the order named. `counted` is the round in which the update counted.
    """

    silo: str
    nonce: str
    samples: int | None
    metrics: dict[str, float] | None
    digest: str | None
    failure: str | None
    counted: int | None = None


@dataclass(frozen=True, slots=True)
class CountedUpdate:
    """An update that a round was made of. `staleness`: how many rounds before, its order was given."""

    silo: str
    samples: int
    staleness: int


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """A round. `weights` is None until it was aggregated; digests are BLAKE3 in hex.

    `orders` are those that were given in it, `updates` those that counted in it, whenever they were ordered.
    """

    round: int
    kind: str
    base: str
    cohort: tuple[str, ...]
    weights: str | None
    seconds: float | None
    bytes_down: int | None
    bytes_up: int | None
    test_accuracy: float | None
    orders: tuple[OrderRecord, ...]
    updates: tuple[CountedUpdate, ...] = ()

    def mean_metric(self, name: str) -> float | None:
        """The mean of a metric of the round's base over the silos that measured and sent it, weighted by samples."""
        told = [(o.samples, o.metrics[name]) for o in self.orders if o.samples and o.metrics and name in o.metrics]
        total = sum(samples for samples, _ in told)
        return sum(samples * value for samples, value in told) / total if total else None


@dataclass(frozen=True, slots=True)
class ArmRecord:
    """An arm with its rounds in order. `start` is the digest of the weights that it began with."""

    arm: str
    learning_rate: float
    start: str
    finished: bool
    best_round: int | None
    rounds: tuple[RoundRecord, ...]

    @property
    def final(self) -> str:
        """The digest of the newest weights."""
        return next((r.weights for r in reversed(self.rounds) if r.weights is not None), self.start)

    @property
    def completed(self) -> bool:
        """Whether it came to its end, the evaluation of its final weights."""
        return self.finished and bool(self.rounds) and self.rounds[-1].kind == "evaluate"

    @property
    def finished_rounds(self) -> int:
        return sum(r.weights is not None for r in self.rounds)

    @property
    def pending(self) -> list[tuple[RoundRecord, OrderRecord]]:
        """The training orders that are open, or whose committed update has not counted yet; each with its round."""
        return [
            (r, order)
            for r in self.rounds
            if r.kind == "train"
            for order in r.orders
            if order.failure is None and order.counted is None
        ]

    def last_committed(self, silo: str, before: int) -> str:
        """The nonce of a silo's newest committed update of the rounds before one; "" where there is none."""
        nonces = [
            order.nonce
            for r in self.rounds
            if r.kind == "train" and r.round < before
            for order in r.orders
            if order.silo == silo and order.digest is not None
        ]
        return nonces[-1] if nonces else ""

    def weights_of(self, round_: int) -> str:
        """The digest of the weights after a round; round 0 is the start."""
        if round_ == 0:
            return self.start
        return next(r.weights for r in self.rounds if r.round == round_ and r.weights is not None)


FILE_NAME = "ledger.sqlite"
_LOCK = "ledger.lock"
_LOOK = 0.5  # seconds: longer than anybody holds the lock who only looks whether a coordinator is at work


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Keeps other coordinators out of a run folder. Raises StorageError where one is at work there.

    Gives a name to who holds it, which stands in the lock file: process ids come again, in containers above all.
    """
    with (folder / _LOCK).open("ab") as held:
        end = time.monotonic() + _LOOK
        while not _take(held, fcntl.LOCK_EX):  # a killed process lets go by itself
            if time.monotonic() > end:
                raise StorageError(
                    f"{folder}: another coordinator is at work on this run", hint="wait until it ends, or stop it"
                )
            time.sleep(0.01)
        life = secrets.token_hex(8)
        held.truncate(0)
        held.write(life.encode())
        held.flush()
        yield life


def at_work(folder: Path) -> str | None:
    """The name of the coordinator at work on a run folder, None where none is.

    It is not disturbed, nor is one that starts just now.
    """
    try:
        with (folder / _LOCK).open("rb") as looked_at:
            return None if _take(looked_at, fcntl.LOCK_SH) else looked_at.read().decode(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error(error, folder / _LOCK) from None


def _take(file: IO[bytes], how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Record:
    """What can be read of a run's record, whoever opened it. Every call is safe from any thread."""

    folder: Path
    _path: Path
    _database: sqlite3.Connection
    _lock: threading.RLock

    def _require_our_schema(self) -> None:
        tables = self._database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if tables and version != _VERSION:
            raise StorageError(
                f"{self._path}: the record was made by another release (its version is {version}, ours {_VERSION})",
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
            "SELECT arm, learning_rate, start, finished, best_round FROM arms WHERE arm = ?", (arm,)
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
                test_accuracy,
                tuple(orders.get(round_, [])),
                tuple(updates.get(round_, [])),
            )
            for round_, kind, base, cohort, weights, seconds, down, up, test_accuracy in self._execute(
                "SELECT round, kind, base, cohort, weights, seconds, bytes_down, bytes_up, test_accuracy "
                "FROM rounds WHERE arm = ? ORDER BY round",
                (arm,),
            ).fetchall()
        )
        return ArmRecord(row[0], row[1], row[2], bool(row[3]), row[4], rounds)

    def arms(self) -> list[str]:
        """The names of all arms and trials, in the order of their beginning."""
        return [str(row[0]) for row in self._execute("SELECT arm FROM arms ORDER BY rowid").fetchall()]

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
                hint=_ANEW,
            ) from None


class Ledger(Record):
    """The record in a run folder. Every method is one transaction and safe to call from any thread."""

    def __init__(self, folder: Path, request: str, *, durable: bool = False) -> None:
        """Opens or makes the record. `request` is a text that stands for what the run computes; `durable`: what was
        noted survives a power cut, not only a killed process.

        Raises ConfigError if the folder holds a run of another request, StorageError if it cannot be written, if the
        database is damaged, or if another process holds it.
        """
        self.folder = folder
        self.durable = durable
        self.holder = ""  # the name of this coordinator in the lock file
        self._path = folder / FILE_NAME
        self._lock = threading.RLock()
        with contextlib.ExitStack() as undo:
            with self._storing():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "weights").mkdir(exist_ok=True, mode=0o700)
                self.holder = undo.enter_context(locked(folder))
                for where in (folder, *(folder / name for name in ("weights", "strategy", "models", "handed-out"))):
                    for part in where.glob(".*.part"):
                        part.unlink()  # of a process that was killed while it wrote
                self._database = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
                undo.callback(self._database.close)
                self._path.chmod(0o600)
                self._database.execute("PRAGMA journal_mode=WAL")
                self._require_our_schema()
                # NORMAL: a power cut takes the last transactions, but never damages the database.
                self._database.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                self._database.executescript(_SCHEMA)
                if durable:
                    sync_folder(folder)
                    sync_folder(folder.parent)
            known = self.fact("request")
            if known is not None and known != request:
                difference = _first_difference(known, request)
                raise ConfigError(
                    f"{folder} holds a run of other settings than the federation file's ({difference})",
                    hint="set another run_folder, or start anew with --fresh",
                )
            self.set_fact("request", request)
            self._close = undo.pop_all().close

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._spare.unlink(missing_ok=True)
        self._close()

    def set_fact(self, name: str, value: str) -> None:
        self._execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Adds to the time that a stage has taken, over interruptions."""
        with self._lock:
            self.set_fact(f"seconds/{stage}", str(self.seconds().get(stage, 0.0) + seconds))

    def begin_arm(self, arm: str, learning_rate: float, start: str) -> None:
        """Notes an arm, once."""
        self._execute(
            "INSERT OR IGNORE INTO arms (arm, learning_rate, start) VALUES (?, ?, ?)", (arm, learning_rate, start)
        )

    def open_round(
        self, arm: str, round_: int, kind: str, base: str, cohort: Iterable[str], nonces: Mapping[str, str]
    ) -> None:
        """Notes a round and the orders that will be given in it."""
        with self._lock, self._storing(), self._database:
            self._database.execute("BEGIN")
            self._database.execute(
                "INSERT OR REPLACE INTO rounds (arm, round, kind, base, cohort) VALUES (?, ?, ?, ?, ?)",
                (arm, round_, kind, base, json.dumps(list(cohort))),
            )
            self._database.execute("DELETE FROM orders WHERE arm = ? AND round = ?", (arm, round_))
            self._insert_orders(arm, round_, nonces)

    def enlist(self, arm: str, round_: int, cohort: Iterable[str], nonces: Mapping[str, str]) -> None:
        """Notes the cohort of the round in progress as it is now, and the orders that came with it."""
        with self._lock, self._storing(), self._database:
            self._database.execute("BEGIN")
            self._database.execute(
                "UPDATE rounds SET cohort = ? WHERE arm = ? AND round = ?", (json.dumps(list(cohort)), arm, round_)
            )
            self._insert_orders(arm, round_, nonces)

    def _insert_orders(self, arm: str, round_: int, nonces: Mapping[str, str]) -> None:
        self._database.executemany(
            "INSERT INTO orders (arm, round, silo, nonce) VALUES (?, ?, ?, ?)",
            [(arm, round_, silo, nonce) for silo, nonce in nonces.items()],
        )

    def commit(self, arm: str, round_: int, silo: str, samples: int, metrics: Mapping[str, float], digest: str) -> None:
        """Notes a silo's answer: from now on it counts."""
        self._execute(
            "UPDATE orders SET samples = ?, metrics = ?, digest = ?, failure = NULL "
            "WHERE arm = ? AND round = ? AND silo = ?",
            (samples, json.dumps(dict(metrics)), digest, arm, round_, silo),
        )

    def forgive(self, arm: str, round_: int) -> None:
        """Forgets the failures of a round that did not come about, so that the silos are called again in it."""
        self._execute("UPDATE orders SET failure = NULL WHERE arm = ? AND round = ?", (arm, round_))

    def note_spent(self, arm: str, round_: int, seconds: float, bytes_down: int, bytes_up: int) -> None:
        """Notes what a round in progress has taken so far."""
        self._execute(
            "UPDATE rounds SET seconds = ?, bytes_down = ?, bytes_up = ? WHERE arm = ? AND round = ?",
            (seconds, bytes_down, bytes_up, arm, round_),
        )

    def fail(self, arm: str, round_: int, silo: str, reason: str) -> None:
        """Notes why a silo's answer does not count."""
        self._execute(
            "UPDATE orders SET failure = ? WHERE arm = ? AND round = ? AND silo = ?", (reason, arm, round_, silo)
        )

    def close_round(self, arm: str, round_: int, weights: str, counted: Mapping[str, int]) -> None:
        """Notes the weights that a round led to, and the updates that they were made of.

        `counted` holds for each silo the round of the order that its update answered.
        """
        with self._lock, self._storing(), self._database:
            self._database.execute("BEGIN")
            self._database.execute("UPDATE rounds SET weights = ? WHERE arm = ? AND round = ?", (weights, arm, round_))
            self._database.executemany(
                "UPDATE orders SET counted = ? WHERE arm = ? AND round = ? AND silo = ?",
                [(round_, arm, ordered, silo) for silo, ordered in counted.items()],
            )

    def note_test_accuracy(self, arm: str, round_: int, accuracy: float) -> None:
        """Notes the accuracy on central test data of the weights after a round. Nothing is ever chosen by it."""
        self._execute("UPDATE rounds SET test_accuracy = ? WHERE arm = ? AND round = ?", (accuracy, arm, round_))

    def finish_arm(self, arm: str, best_round: int) -> None:
        self._execute("UPDATE arms SET finished = 1, best_round = ? WHERE arm = ?", (best_round, arm))

    def add_weights(self, layout: Layout, blocks: Iterable[bytes | memoryview]) -> str:
        """Writes weights under their digest; returns it."""
        incoming = self.folder / "weights" / "incoming.safetensors"
        digest = write_weights(incoming, layout, blocks, durable=self.durable, over=self._spare)
        with self._storing():
            incoming.replace(self.weights_path(digest))
            if self.durable:
                sync_folder(incoming.parent)  # before the row that names it
        return digest

    def require_weights(self, digest: str) -> None:
        """Raises StorageError where the weights of this digest are missing or damaged. Reads all of them."""
        _require(self.weights_path(digest), digest)

    def require_state(self, digest: str) -> None:
        """Raises StorageError where the strategy's state that belongs to these weights is missing or damaged."""
        state = self.fact(f"state/{digest}")
        if state is not None:
            _require(self.state_path(digest), state)

    @property
    def incoming_state(self) -> Path:
        """Where the strategy's state of a round is written, before `keep_state`."""
        return self.folder / "strategy" / "incoming.safetensors"

    def state_path(self, digest: str) -> Path:
        """Where the strategy's state lies that belongs to the weights of this digest."""
        return self.folder / "strategy" / f"{digest}.safetensors"

    def keep_state(self, digest: str) -> None:
        """Puts the state that was written, if there is one, beside the weights of this digest."""
        if not self.incoming_state.exists():
            return
        with WeightsFile(self.incoming_state) as state:
            self.set_fact(f"state/{digest}", state.digest())
        with self._storing():
            self.incoming_state.replace(self.state_path(digest))
            if self.durable:
                sync_folder(self.incoming_state.parent)

    @property
    def _spare(self) -> Path:
        """Weights that were dropped, whose pages the next are written over. Gone at the end, or at the next start."""
        return self.folder / "weights" / ".spare.part"

    def drop_weights_except(self, digests: Iterable[str]) -> None:
        """Deletes the weights that nothing needs any more.

        Who still reads some of them finishes before the next are added, or checks what was read.
        """
        for path in _others(self.folder / "weights", digests):
            with self._storing():
                path.replace(self._spare)

    def drop_states_except(self, digests: Iterable[str]) -> None:
        """Deletes the strategy's states of weights that no round starts from any more."""
        for path in _others(self.folder / "strategy", digests):
            path.unlink(missing_ok=True)


def _others(folder: Path, digests: Iterable[str]) -> list[Path]:
    """The weights files of a folder that are named by other digests than these."""
    kept = {f"{digest}.safetensors" for digest in digests}
    return [path for path in folder.glob("*.safetensors") if path.name not in kept]


def _require(path: Path, digest: str) -> None:
    try:
        with WeightsFile(path) as weights:
            whole = weights.digest() == digest
    except ModelError as error:
        raise StorageError(f"weights of this run are lost: {error}", hint=_ANEW) from None
    if not whole:
        raise StorageError(f"{path} is damaged: its content is not what was written", hint=_ANEW)


def _first_difference(old: str, new: str) -> str:
    """Names the first setting in which two JSON texts differ."""

    def walk(path: str, a: object, b: object) -> str:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in a | b:
                if a.get(key) != b.get(key):
                    return walk(f"{path}.{key}" if path else str(key), a.get(key), b.get(key))
        return f"{path} was {json.dumps(a)[:80]}, now {json.dumps(b)[:80]}"

    return walk("", json.loads(old), json.loads(new))

"""The coordinator's durable record: SQLite beside weights files that are named by their content.

Every step of a round is one transaction, so a coordinator that was killed finds the round it was in, the orders it
gave and the updates it had committed. A durable ledger is there after a power cut too: each transaction, and every file
that it names, is on the disk before it counts. The whole of a run folder belongs to one federation file: another is
refused.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from gptfl_dist.aggregation.diversity import Diversity
from gptfl_dist.errors import ConfigError, ModelError, StorageError
from gptfl_dist.files import sync_folder
from gptfl_dist.learning.measures import Measures
from gptfl_dist.ledger import outbox
from gptfl_dist.ledger.lock import locked
from gptfl_dist.ledger.record import ANEW, AUDITED, FILE_NAME, VERSION, Record, judged_name
from gptfl_dist.ledger.records import Signed, Waiting
from gptfl_dist.weights import Layout, WeightsFile, write_weights

_SCHEMA = f"""
PRAGMA user_version = {VERSION};
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS arms (
    arm TEXT PRIMARY KEY, learning_rate REAL NOT NULL, start TEXT NOT NULL, finished INTEGER NOT NULL DEFAULT 0,
    best_round INTEGER, tested TEXT
);
CREATE TABLE IF NOT EXISTS rounds (
    arm TEXT NOT NULL, round INTEGER NOT NULL, kind TEXT NOT NULL, base TEXT NOT NULL, cohort TEXT NOT NULL,
    weights TEXT, seconds REAL, bytes_down INTEGER, bytes_up INTEGER, tested TEXT,
    diversity TEXT,
    PRIMARY KEY (arm, round)
);
CREATE TABLE IF NOT EXISTS orders (
    arm TEXT NOT NULL, round INTEGER NOT NULL, silo TEXT NOT NULL, nonce TEXT NOT NULL,
    samples INTEGER, metrics TEXT, digest TEXT, failure TEXT, counted INTEGER,
    statement TEXT, signature TEXT, signer TEXT,
    PRIMARY KEY (arm, round, silo)
);
CREATE TABLE IF NOT EXISTS signers (fingerprint TEXT PRIMARY KEY, certificate TEXT NOT NULL);
{outbox.SCHEMA}
"""


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
                difference = first_difference(known, request)
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
        """Notes the cohort of the round in progress as it is now, and the orders that came with it.

        A silo whose order came to nothing may get another one in its place.
        """
        with self._lock, self._storing(), self._database:
            self._database.execute("BEGIN")
            self._database.execute(
                "UPDATE rounds SET cohort = ? WHERE arm = ? AND round = ?", (json.dumps(list(cohort)), arm, round_)
            )
            self._insert_orders(arm, round_, nonces)

    def _insert_orders(self, arm: str, round_: int, nonces: Mapping[str, str]) -> None:
        self._database.executemany(
            "INSERT OR REPLACE INTO orders (arm, round, silo, nonce) VALUES (?, ?, ?, ?)",
            [(arm, round_, silo, nonce) for silo, nonce in nonces.items()],
        )

    def commit(
        self, arm: str, round_: int, silo: str, samples: int, metrics: Mapping[str, float], digest: str,
        signed: Signed | None = None,
    ) -> None:  # fmt: skip
        """Notes a silo's answer: from now on it counts. `signed` shows that it is the silo's."""
        with self._lock, self._storing(), self._database:
            self._database.execute("BEGIN")
            if signed is not None:
                known = (signed.signer, signed.certificate)
                self._database.execute("INSERT OR IGNORE INTO signers VALUES (?, ?)", known)
            proof = (None, None, None) if signed is None else (signed.statement, signed.signature, signed.signer)
            self._database.execute(
                "UPDATE orders SET statement = ?, signature = ?, signer = ?, samples = ?, metrics = ?, digest = ?, "
                "failure = NULL WHERE arm = ? AND round = ? AND silo = ?",
                (*proof, samples, json.dumps(dict(metrics)), digest, arm, round_, silo),
            )

    def forgive(self, arm: str, round_: int, reason: str) -> None:
        """Forgets the failures of a round that did not come about, so that the silos are called again in it."""
        with self._lock, self._storing(), self._database:
            self._database.execute("BEGIN")
            self._database.execute("UPDATE orders SET failure = NULL WHERE arm = ? AND round = ?", (arm, round_))
            told = {"arm": arm, "round": round_, "reason": reason}
            self._database.execute(outbox.NOTE, ("round abandoned", json.dumps(told)))

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

    def close_round(
        self, arm: str, round_: int, weights: str, counted: Mapping[str, int], diversity: Diversity | None = None
    ) -> None:
        """Notes the weights that a round led to, and the updates that they were made of.

        `counted` holds for each silo the round of the order that its update answered; `diversity` is that of these
        updates, where it is measured.
        """
        told = None if diversity is None else json.dumps(asdict(diversity))
        with self._lock, self._storing(), self._database:
            self._database.execute("BEGIN")
            self._database.executemany(
                "UPDATE orders SET counted = ? WHERE arm = ? AND round = ? AND silo = ?",
                [(round_, arm, ordered, silo) for silo, ordered in counted.items()],
            )
            # Last, for the outbox then tells the updates with the weights.
            self._database.execute(
                "UPDATE rounds SET diversity = ?, weights = ? WHERE arm = ? AND round = ?", (told, weights, arm, round_)
            )

    def note_tested(self, arm: str, round_: int, measures: Measures) -> None:
        """Notes how good the weights after a round, of 0 those at the start, are on central test data.

        Nothing is ever chosen by it.
        """
        told = json.dumps(asdict(measures))
        if round_ == 0:
            self._execute("UPDATE arms SET tested = ? WHERE arm = ?", (told, arm))
        else:
            self._execute("UPDATE rounds SET tested = ? WHERE arm = ? AND round = ?", (told, arm, round_))

    def note_judged(self, arm: str, accuracy: float, loss: float) -> None:
        """Notes how the next of an arm's weights, beginning with its start, do on held-out synthetic data."""
        with self._lock:
            self.set_fact(judged_name(arm), json.dumps([*self._judged(arm), (accuracy, loss)]))

    def finish_arm(self, arm: str, best_round: int) -> None:
        self._execute("UPDATE arms SET finished = 1, best_round = ? WHERE arm = ?", (best_round, arm))

    def note(self, event: str, fields: Mapping[str, object]) -> None:
        """Notes an event for the audit log that changes nothing else here; see `outbox`."""
        self._execute(outbox.NOTE, (event, json.dumps(fields)))

    def audit(self, events: Sequence[Waiting], number: int, digest: str) -> None:
        """These events stand in the audit log, the newest entry of which has this number and hash."""
        with self._lock, self._storing(), self._database:
            self._database.execute("BEGIN")
            self._database.executemany("DELETE FROM outbox WHERE number = ?", [(event.number,) for event in events])
            self._database.execute(
                "INSERT OR REPLACE INTO facts VALUES (?, ?)",
                (AUDITED, json.dumps({"number": number, "hash": digest})),
            )

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
                if path.stat().st_nlink > 1:  # a backup holds it, which must not be written over
                    path.unlink()
                else:
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
        raise StorageError(f"weights of this run are lost: {error}", hint=ANEW) from None
    if not whole:
        raise StorageError(f"{path} is damaged: its content is not what was written", hint=ANEW)


def first_difference(old: str, new: str) -> str:
    """Names the first setting in which two JSON texts differ."""

    def walk(path: str, a: object, b: object) -> str:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in a | b:
                if a.get(key) != b.get(key):
                    return walk(f"{path}.{key}" if path else str(key), a.get(key), b.get(key))
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            place = next(number for number, (old, new) in enumerate(zip(a, b, strict=True)) if old != new)
            return walk(f"{path}[{place}]", a[place], b[place])
        return f"{path} was {json.dumps(a)[:80]}, now {json.dumps(b)[:80]}"

    return walk("", json.loads(old), json.loads(new))

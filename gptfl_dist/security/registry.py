"""What an authority knows: whom it invited, which certificates it made, which of them are revoked.

One SQLite file beside the authority's keys, so that it outlives any run. Several processes use it: the coordinator at
work, and the commands of its operator. Tokens stand in it as SHA-256 alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from gptfl_dist.errors import IdentityError, StorageError
from gptfl_dist.security.identity import Identity, Invited, called

FILE_NAME = "registry.sqlite"
_PATIENCE = 10.0  # seconds that a writer waits for another

_COLUMNS = "serial, role, name, issued, expires, key, issuer, revoked, reason"
_ASKED_AGAIN = timedelta(seconds=5)  # after a token was used, for as long as `gptfl join` tries again for its answer

_SCHEMA = """
CREATE TABLE IF NOT EXISTS invitations(
    token TEXT PRIMARY KEY, name TEXT NOT NULL, expires TEXT NOT NULL,
    key TEXT, asked TEXT, approved TEXT, used TEXT, role TEXT NOT NULL DEFAULT 'silo');
CREATE TABLE IF NOT EXISTS certificates(
    serial TEXT PRIMARY KEY, name TEXT NOT NULL, issued TEXT NOT NULL, expires TEXT NOT NULL, key TEXT NOT NULL,
    issuer TEXT NOT NULL, revoked TEXT, reason TEXT, role TEXT NOT NULL DEFAULT 'silo');
"""

_OF_SILOS_ALONE = "SELECT 1 FROM pragma_table_info('certificates') WHERE name = 'silo'"
_WITH_ROLES = """
ALTER TABLE invitations RENAME COLUMN silo TO name;
ALTER TABLE certificates RENAME COLUMN silo TO name;
ALTER TABLE invitations ADD COLUMN role TEXT NOT NULL DEFAULT 'silo';
ALTER TABLE certificates ADD COLUMN role TEXT NOT NULL DEFAULT 'silo';
"""
"""Of a registry that was made when silos alone had certificates."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate; times are ISO 8601 in UTC, `key` is its public key's fingerprint, `issuer` the serial number of
    the issuing certificate."""

    serial: str
    role: Invited
    name: str
    issued: str
    expires: str
    key: str
    issuer: str
    revoked: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Invitation:
    """`key` is the fingerprint of who used the token, `asked` when, `approved` when the operator agreed to it."""

    role: Invited
    name: str
    expires: str
    key: str | None
    asked: str | None
    approved: str | None
    used: str | None


class Registry:
    """Opens the file for each call, so one object serves any thread. Raises StorageError where it cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME

    def create(self) -> None:
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        with self._open() as database:
            database.executescript(_SCHEMA)

    def invite(self, who: Identity, valid: timedelta) -> str:
        """A new token for somebody, good once within `valid`. Older ones are void from now on, used or not."""
        token = secrets.token_urlsafe(24)
        with self._open() as database:
            database.execute("DELETE FROM invitations WHERE role = ? AND name = ?", (who.role, who.name))
            database.execute(
                "INSERT INTO invitations(token, role, name, expires) VALUES (?, ?, ?, ?)",
                (_hashed(token), who.role, who.name, _text(_now() + valid)),
            )
        return token

    def redeem(self, token: str, who: Identity, key: str, *, approval: bool) -> bool:
        """Binds a token to the key with this fingerprint; False where the operator has yet to approve of it.

        The same key may ask again, for its answer may have been lost. Raises IdentityError where the token is none, for
        another name or role, another key's or too old: one sentence for the first three, which tells a guesser nothing.
        """
        with self._open() as database:
            row = database.execute(
                "SELECT role, name, expires, key, approved FROM invitations WHERE token = ?", (_hashed(token),)
            ).fetchone()
            if row is None or row[:2] != (who.role, who.name) or row[3] not in (None, key):
                raise IdentityError(
                    "the invitation is not known, or was used", hint="ask the coordinator's operator for a new one"
                )
            if row[2] < _text(_now()):
                raise IdentityError(
                    f"the invitation expired at {row[2]}", hint="ask the coordinator's operator for a new one"
                )
            if row[3] is None:
                database.execute(
                    "UPDATE invitations SET key = ?, asked = ? WHERE token = ?", (key, _text(_now()), _hashed(token))
                )
            if approval and row[4] is None:
                return False
            database.execute("UPDATE invitations SET used = ? WHERE token = ?", (_text(_now()), _hashed(token)))
            return True

    def approve(self, who: Identity, key: str) -> None:
        """Agrees to what asks under somebody's name with the key of this fingerprint. Raises IdentityError."""
        with self._open() as database:
            done = database.execute(
                "UPDATE invitations SET approved = ? "
                "WHERE role = ? AND name = ? AND replace(key, ' ', '') = ? AND used IS NULL",
                (_text(_now()), who.role, who.name, "".join(key.split()).lower()),
            )
            if not done.rowcount:
                raise IdentityError(
                    f"nobody asks to be {called(who.role, who.name)} with the key {key}",
                    hint="gptfl requests shows who waits, with its key",
                )

    def invitations(self) -> list[Invitation]:
        """Those that hold still, or were used, by name."""
        with self._open() as database:
            rows = database.execute(
                "SELECT role, name, expires, key, asked, approved, used FROM invitations ORDER BY name, role, expires"
            )
            return [Invitation(*row) for row in rows]

    def is_open(self) -> bool:
        """Whether anybody may still enrol, or did a moment ago and may ask again for an answer that was lost."""
        with self._open() as database:
            found = database.execute(
                "SELECT 1 FROM invitations WHERE (used IS NULL OR used >= ?) AND expires >= ? LIMIT 1",
                (_text(_now() - _ASKED_AGAIN), _text(_now())),
            )
            return found.fetchone() is not None

    def add(self, *, serial: int, who: Identity, expires: datetime, key: str, issuer: int) -> None:
        """Notes a certificate, before it is handed out."""
        with self._open() as database:
            database.execute(
                "INSERT INTO certificates(serial, role, name, issued, expires, key, issuer) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (serial_text(serial), who.role, who.name, _text(_now()), _text(expires), key, serial_text(issuer)),
            )

    def certificates(self) -> list[Issued]:
        """All that were made, by name, the newest of each first."""
        with self._open() as database:
            order = "name, role, issued DESC, rowid DESC"
            rows = database.execute(f"SELECT {_COLUMNS} FROM certificates ORDER BY {order}")
            return [Issued(*row) for row in rows]

    def revoke(self, which: Identity | str, reason: str) -> list[Issued]:
        """Revokes all certificates of somebody, or the one with this serial number; returns those that it met.

        Their invitation is void then, used or not: by a used one their key could come back. Raises IdentityError where
        there is nothing to revoke.
        """
        if isinstance(which, Identity):
            told, named = called(which.role, which.name), {(str(which.role), which.name)}
        else:
            told, named = which, set()
        with self._open() as database:
            rows = database.execute(f"SELECT {_COLUMNS} FROM certificates WHERE revoked IS NULL").fetchall()
            met = [each for each in map(_issued, rows) if (each.role, each.name) in named or each.serial == which]
            invited = 0
            for someone in named | {(each.role, each.name) for each in met}:
                invited += database.execute("DELETE FROM invitations WHERE role = ? AND name = ?", someone).rowcount
            if not met and not invited:
                raise IdentityError(
                    f"there is no certificate to revoke of {told}",
                    hint="gptfl silos and gptfl operators show what there is",
                )
            for issued in met:
                database.execute(
                    "UPDATE certificates SET revoked = ?, reason = ? WHERE serial = ?",
                    (_text(_now()), reason, issued.serial),
                )
            return met

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One transaction, which no other process writes beside."""
        try:
            database = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode=rw", uri=True, timeout=_PATIENCE, isolation_level=None
            )
            with contextlib.closing(database):
                database.execute("PRAGMA synchronous=FULL")
                database.execute("BEGIN IMMEDIATE")
                try:
                    if database.execute(_OF_SILOS_ALONE).fetchone():
                        for statement in filter(None, map(str.strip, _WITH_ROLES.split(";"))):
                            database.execute(statement)
                    yield database
                except BaseException:
                    database.rollback()
                    raise
                database.commit()
        except sqlite3.Error as error:
            if not self.path.exists():
                hint = "make it with gptfl authority init, or bring it back from a backup"
                raise IdentityError(f"{self.path.parent}: there is no authority", hint=hint) from None
            raise StorageError(f"{self.path}: {error}", hint="ask as the user who made the authority") from None


def _issued(row: tuple[Any, ...]) -> Issued:
    return Issued(*row)


def serial_text(serial: int) -> str:
    """A certificate's serial number as people and the registry write it."""
    return f"{serial:x}"


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _now() -> datetime:
    return datetime.now(UTC)


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")

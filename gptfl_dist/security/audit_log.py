"""The audit log of a run folder as a file: `audit.jsonl`, and beside it the key `audit.key` that signs it.

Any process of the owner may add to it, at any time: each takes the lock on the file, reads its last line and writes
behind it. An `AuditLog` is cheap to make:

    AuditLog(run_folder).append("certificate revoked", silo="silo-2", serial="1f", by="the coordinator's operator")

A process that is killed while it writes leaves half a line. The next one that writes finds it, since nobody writes
without the lock: it ends a line that lacks nothing but its end, and cuts off any other, which it notes. Nothing else is
ever cut off: where the end of the log is damaged it writes on behind that, chained to the last entry that is whole. A
certificate can be revoked whatever the state of the log, and the damage is found whenever the log is verified.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gptfl_dist.errors import StorageError
from gptfl_dist.files import storage_error, sync_folder, write_at, write_file
from gptfl_dist.security.audit import (
    BEGUN,
    BROKEN,
    CHECKPOINT,
    Head,
    beginning,
    chained,
    checkpoint,
    fingerprint,
    half_written,
    hash_of,
    parsed,
)
from gptfl_dist.security.credentials import require_private

LOG, KEY = "audit.jsonl", "audit.key"

_EVERY = 64  # entries from one signature to the next, at most
_BLOCK = 4096  # bytes that are read of the end, at first
_AWAY = f"gptfl audit verify says what is wrong; to begin a new log, move {LOG} and {KEY} to another folder"


def now() -> str:
    """The time as entries have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True)
class Event:
    """What an entry is to tell. `signed`: at once, and not only with the next signature."""

    event: str
    fields: Mapping[str, Any]
    time: str = field(default_factory=now)
    signed: bool = True


class AuditLog:
    """Writes the log of a run folder. Safe beside other processes and threads, which write it too."""

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        """`durable`: what was written survives a power cut, not only a killed process."""
        self.path = folder / LOG
        self._durable = durable
        self._key: ec.EllipticCurvePrivateKey | None = None

    def append(self, event: str, **fields: Any) -> None:
        """Notes one event. Fields are what JSON knows. Raises StorageError, IdentityError for a key that is open."""
        self.write([Event(event, fields)])

    def write(self, events: Sequence[Event]) -> Head:
        """Notes events in this order; also where there are none, it mends what a killed process left.

        Returns the newest entry. Raises as `append`.
        """
        with self._locked() as fd:
            end = _End.of(fd)
            head, key, lines = end.head, self._signing_key(fd, begun=end.head.number > 0), [end.missing]

            def add(event: str, fields: Mapping[str, Any], time: str) -> None:
                nonlocal head
                line, head = chained(head, time, event, fields)
                lines.append(line)

            if head.number == 0:
                add(BEGUN, beginning(key.public_key()), now())
            if end.cut:
                add("half line cut off", {"bytes": end.cut}, now())
            if end.damaged:
                told = {"found": f"{end.damaged} lines that are no entries", "expected": f"entry {end.head.number + 1}"}
                add(BROKEN, told, now())
            for event in events:
                add(event.event, event.fields, event.time)
                if event.signed or (head.number + 1) % _EVERY == 0:
                    add(CHECKPOINT, checkpoint(head, key), now())
            os.ftruncate(fd, end.size)
            write_at(fd, end.size, memoryview(b"".join(lines)))
            if self._durable:
                os.fsync(fd)
                if end.size == 0:
                    sync_folder(self.path.parent)
        return head

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                yield fd
            finally:
                os.close(fd)
        except OSError as error:
            raise storage_error(error, self.path) from None

    def _signing_key(self, fd: int, *, begun: bool) -> ec.EllipticCurvePrivateKey:
        """The log's key, made for its first entry."""
        if self._key is None:
            path = self.path.with_name(KEY)
            if not path.exists():
                if begun:
                    raise StorageError(f"{path} is missing, which signs {self.path}", hint=_AWAY)
                write_file(path, _pem(ec.generate_private_key(ec.SECP256R1())))
            require_private(path)
            try:
                key = serialization.load_pem_private_key(path.read_bytes(), password=None)
            except (ValueError, TypeError):
                key = None
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise StorageError(f"{path} is no key of an audit log", hint=_AWAY)
            with contextlib.suppress(ValueError):  # of a first line that is damaged, which `verify` tells
                first = parsed(os.pread(fd, _BLOCK, 0).partition(b"\n")[0])
                if begun and first.get("fingerprint") != fingerprint(key.public_key()):
                    raise StorageError(f"{path} is not the key that signs {self.path}", hint=_AWAY)
            self._key = key
        return self._key


@dataclass(frozen=True, slots=True)
class _End:
    """The end of a log: its newest entry, and where to write on. `missing` is what the last line lacks, `cut` are the
    bytes of half a line that is not kept, `damaged` the lines behind the newest entry that are none."""

    head: Head
    size: int
    missing: bytes = b""
    cut: int = 0
    damaged: int = 0

    @classmethod
    def of(cls, fd: int) -> _End:
        size, length = os.fstat(fd).st_size, _BLOCK
        while True:
            start = max(0, size - length)
            *lines, rest = os.pread(fd, size - start, start).split(b"\n")
            heads = (_head_of(line) for line in reversed(lines[1:] if start else lines))
            damaged, head = next(((n, head) for n, head in enumerate(heads) if head is not None), (len(lines), Head()))
            if head.number or not start:
                break
            length *= 2
        if half_written(rest, head.number + 1):
            return cls(head, size - len(rest), cut=len(rest), damaged=damaged)
        if not rest:
            return cls(head, size, damaged=damaged)
        last = _head_of(rest)
        return cls(last or head, size, missing=b"\n", damaged=0 if last else damaged + 1)


def _head_of(line: bytes) -> Head | None:
    """The head that a line makes; None where it holds no entry as it was written."""
    with contextlib.suppress(ValueError):
        entry = parsed(line)
        if entry["hash"] == hash_of(entry):
            return Head(entry["number"], entry["hash"])
    return None


def read_log(folder: Path) -> bytes:
    """The log as of one instant at which nobody writes it; empty where there is none. Raises StorageError."""
    path = folder / LOG
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return file.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise storage_error(error, path) from None


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

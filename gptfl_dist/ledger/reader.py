"""The record of a run as another process reads it, beside a coordinator at work or after its end.

Opened read-only and in one transaction: what is read belongs to one instant, the coordinator writes on meanwhile, and
neither waits for the other. SQLite needs files beside the database to read a write-ahead log. Where there is no log
the database alone is the whole record, and is read as it is, also from a folder that cannot be written.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from gptfl_dist.errors import StorageError
from gptfl_dist.files import storage_error
from gptfl_dist.ledger.record import FILE_NAME, Record

_T = TypeVar("_T")
_TRIES = 3


class LedgerReader(Record):
    """An open record; see `read`."""

    def __init__(self, folder: Path, *, whole: bool) -> None:
        """`whole`: there is no write-ahead log. Raises StorageError."""
        self.folder = folder
        self._path = folder / FILE_NAME
        self._lock = threading.RLock()
        how = "immutable=1" if whole else "mode=ro"
        with self._storing():
            self._database = sqlite3.connect(
                f"file:{quote(str(self._path.absolute()))}?{how}", uri=True, timeout=5, isolation_level=None
            )
            try:
                self._database.execute("BEGIN")
                self._require_our_schema()  # from this look on it is one instant
            except BaseException:
                self._database.close()
                raise

    @property
    def begun(self) -> bool:
        """False in the moment before a coordinator has made its tables, when there is nothing to read."""
        tables = self._execute("SELECT count(*) FROM sqlite_schema WHERE type = 'table'").fetchone()
        return bool(tables[0] >= 4) and self.fact("request") is not None

    def close(self) -> None:
        self._database.close()


def read(folder: Path, ask: Callable[[LedgerReader], _T]) -> _T | None:
    """What `ask` finds in the record of a run folder; None where no run was started there. Raises StorageError."""
    for tries_left in range(_TRIES, 0, -1):
        before = _files(folder)
        if before.database is None:
            return None
        try:
            with contextlib.closing(LedgerReader(folder, whole=not before.log)) as reader:
                answer = ask(reader) if reader.begun else None
        except StorageError:
            if tries_left == 1 or _files(folder) == before:
                raise
            continue
        if before.log or _files(folder) == before:  # else a coordinator started or ended while it was read as it is
            break
    return answer


@dataclass(frozen=True, slots=True)
class _Files:
    """What there is to read: when the database was changed last and its size, and whether there is a log."""

    database: tuple[int, int] | None
    log: bool


def _files(folder: Path) -> _Files:
    try:
        found = (folder / FILE_NAME).stat()
        return _Files((found.st_mtime_ns, found.st_size), (folder / f"{FILE_NAME}-wal").exists())
    except FileNotFoundError:
        return _Files(None, False)
    except OSError as error:
        raise storage_error(error, folder / FILE_NAME) from None

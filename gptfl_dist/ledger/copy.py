"""A copy of an SQLite database that others are writing to: as of one instant, and whole."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from gptfl_dist.errors import StorageError

_PATIENCE = 10.0  # seconds that it waits for a writer


def copy_database(source: Path, target: Path) -> None:
    """Copies a database into a new file of 0600, with what its write-ahead log holds. Raises StorageError."""
    try:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        address = f"file:{quote(str(source.absolute()))}?mode=ro"
        with (
            contextlib.closing(sqlite3.connect(address, uri=True, timeout=_PATIENCE)) as original,
            contextlib.closing(sqlite3.connect(target)) as copy,
        ):
            original.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # all of it in the one file
    except (OSError, sqlite3.Error) as error:
        raise StorageError(
            f"{source} cannot be copied: {error}", hint="ask as the user who runs the coordinator, on its machine"
        ) from None

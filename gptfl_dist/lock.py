"""One process at a time works in a folder: who holds the lock on a file in it, which the kernel lets go."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gptfl_dist.errors import StorageError
from gptfl_dist.files import storage_error

_LOOK = 0.5  # seconds: longer than anybody holds the lock who only looks whether it is held


@contextlib.contextmanager
def held(path: Path, refusal: StorageError) -> Iterator[IO[bytes]]:
    """Holds the lock on the file at `path`, and makes the file where there is none.

    Raises `refusal` where another process holds the lock, StorageError where the file cannot be had.
    """
    with _opened(path, "ab") as file:
        end = time.monotonic() + _LOOK
        while not _take(file, fcntl.LOCK_EX, path):
            if time.monotonic() > end:
                raise refusal
            time.sleep(0.01)
        yield file


def holder(path: Path) -> str | None:
    """What stands in the file at `path` while its lock is held, None where nobody holds it. Raises StorageError.

    Who holds it is not disturbed, nor is one that starts just now.
    """
    if not path.exists():
        return None
    with _opened(path, "rb") as file:
        return None if _take(file, fcntl.LOCK_SH, path) else file.read().decode(errors="replace")


def _opened(path: Path, mode: str) -> IO[bytes]:
    try:
        return path.open(mode)
    except OSError as error:
        raise storage_error(error, path) from None


def _take(file: IO[bytes], how: int, path: Path) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # as of a file system that knows no locks
        raise storage_error(error, path) from None
    return True

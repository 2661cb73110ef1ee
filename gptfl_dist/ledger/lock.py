"""One coordinator at a time works on a run folder: who holds the lock on a file in it, which the kernel lets go."""

from __future__ import annotations

import contextlib
import fcntl
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gptfl_dist.errors import StorageError
from gptfl_dist.files import storage_error

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

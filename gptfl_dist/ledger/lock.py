"""One coordinator at a time works on a run folder."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from gptfl_dist.errors import StorageError
from gptfl_dist.lock import held, holder

_LOCK = "ledger.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Keeps other coordinators out of a run folder. Raises StorageError where one is at work there.

    Gives a name to who holds it, which stands in the lock file: process ids come again, in containers above all.
    """
    refusal = StorageError(
        f"{folder}: another coordinator is at work on this run", hint="wait until it ends, or stop it"
    )
    with held(folder / _LOCK, refusal) as file:
        life = secrets.token_hex(8)
        file.truncate(0)
        file.write(life.encode())
        file.flush()
        yield life


def at_work(folder: Path) -> str | None:
    """The name of the coordinator at work on a run folder, which is not disturbed; None where none is."""
    return holder(folder / _LOCK)

"""Carries what the ledger's outbox holds into the audit log, beside the coordinator's work.

The ledger is written first, the log about half a second later, by a thread: nobody waits for it. Whatever the
coordinator was doing when it was killed, its next start writes what is missing, and nothing twice. A log that cannot
be written ends the run: nothing is accepted for long that does not stand in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from gptfl_dist.errors import GptflError, StorageError
from gptfl_dist.ledger.reader import read
from gptfl_dist.ledger.record import FILE_NAME, Record
from gptfl_dist.ledger.records import Waiting
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.run.threads import to_its_end
from gptfl_dist.security.audit import BROKEN, Head
from gptfl_dist.security.audit_log import AuditLog, Event, read_log

STARTED, RESUMED, ENDED = "run started", "run resumed", "run ended"
_SIGNED = {STARTED, RESUMED, ENDED, "round committed", "round abandoned"}
_EVERY = 0.5  # seconds

_T = TypeVar("_T")


class Auditor:
    """Keeps the audit log of the run whose ledger this is."""

    def __init__(self, ledger: Ledger) -> None:
        """Writes what an earlier coordinator had not come to. Raises StorageError, IdentityError."""
        self._ledger = ledger
        self._log = AuditLog(ledger.folder, durable=ledger.durable)
        self._lock = threading.Lock()
        self._sure = False  # that nothing which waits stands in the log
        if broken := missing(read_log(ledger.folder), ledger_head(ledger)):
            self._log.append(BROKEN, **broken)
        self.write()

    def write(self) -> None:
        """Writes what waits. Blocking. Raises as the constructor."""
        with self._lock:
            while waiting := self._ledger.waiting():
                new = waiting if self._sure else unwritten(waiting, self._log)
                self._sure = False
                head = self._log.write([event_of(one) for one in new])
                self._ledger.audit(waiting, head.number, head.hash)
                self._sure = True

    @contextlib.contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Writes the last events, however the block ends."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(GptflError):  # what ended the block is told, not what follows from it
                self.write()
            raise
        self.write()

    async def beside(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs `work`, and writes what happens meanwhile. Raises what either raises."""
        working, writing = asyncio.ensure_future(work), asyncio.ensure_future(self._keep_on())
        try:
            await asyncio.wait({working, writing}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                writing.result()
            return await working
        finally:
            for task in (working, writing):
                task.cancel()
            await asyncio.gather(working, writing, return_exceptions=True)

    async def _keep_on(self) -> None:
        while True:
            await to_its_end(self.write)
            await asyncio.sleep(_EVERY)


def event_of(waiting: Waiting) -> Event:
    """The event as the log tells it."""
    fields = {**waiting.fields, "outbox": waiting.token}
    return Event(waiting.event, fields, waiting.time, signed=waiting.event in _SIGNED)


def unwritten(waiting: Iterable[Waiting], log: AuditLog) -> list[Waiting]:
    """Those of the events that do not stand in the log."""
    log.write([])  # half a line is no entry: it must be gone, or whole
    # Quotes inside of a text are escaped, so nothing that a silo says looks like this.
    written = set(re.findall(rb'"outbox":"([0-9a-f]{16})"', read_log(log.path.parent)))
    return [one for one in waiting if one.token.encode() not in written]


def ledger_head(ledger: Record) -> Head:
    """The newest entry of the log that the ledger knows."""
    return Head() if ledger.audited is None else Head(*ledger.audited)


def missing(log: bytes, known: Head) -> dict[str, str]:
    """Says that an entry which the ledger knows is missing from a log, as fields of an event; empty where it is not."""
    if not known.number or f'"hash":"{known.hash}"}}'.encode() in log:
        return {}
    return {
        "found": f"no entry {known.number} with the hash {known.hash}",
        "expected": "one, for the ledger knows that it was written",
    }


def close_log(folder: Path) -> None:
    """Notes that what a run left is deleted, after what it had not come to tell. Raises StorageError, IdentityError."""
    if not (folder / FILE_NAME).exists():
        return
    waiting: list[Waiting] = []
    with contextlib.suppress(StorageError):  # of a ledger that is damaged, which is why it is deleted
        waiting = read(folder, lambda ledger: ledger.waiting()) or []
    log = AuditLog(folder)
    log.write([event_of(one) for one in unwritten(waiting, log)])
    log.append("run deleted")

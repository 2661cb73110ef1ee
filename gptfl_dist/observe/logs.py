"""Logs: everything into a file, one JSON object a line, and what a person must see on stderr.

The package logs through `logging.getLogger(__name__)`; what a call gives as `extra={...}` becomes fields of its line.
`extra=PRINTED` marks what the command prints by itself: it goes to the file alone. Libraries are heard from warning
upwards only.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from datetime import UTC, datetime
from json import dumps
from pathlib import Path
from typing import TextIO

from gptfl_dist.files import storage_error

PRINTED = {"printed": True}
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", *PRINTED}


class JsonLines(logging.Formatter):
    """A line of JSON a record: time (ISO, UTC), level, logger, message, extra fields, the exception if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD and name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return dumps(line, default=str, ensure_ascii=False)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the moment, so that a line goes above a progress bar and not through it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # there it is set once
        return sys.stderr


class _File(logging.FileHandler):
    """A log that cannot be written is said once on stderr, without logging's traceback, and stops nothing."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            print(f"{storage_error(error, Path(self.baseFilename)).message}: the log has gaps", file=sys.stderr)


def to_stderr() -> None:
    """For a process whose stderr is a log file of its own: what the package logs there, as lines of text."""
    lines = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    lines.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(lines)
    package = logging.getLogger("gptfl_dist")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False  # the loggers above it are those of the user's code in this process


_installed: list[logging.Handler] = []


def configure(path: Path, *, shown: int = logging.WARNING) -> None:
    """Send what is worth a line to the file `path`, as JSON, and to stderr what is of level `shown` or above.

    The file is added to, never begun anew. A second call replaces the first. Raises StorageError where the file
    cannot be opened.
    """
    stderr = _Stderr()
    stderr.setLevel(shown)
    stderr.addFilter(lambda record: not getattr(record, "printed", False))
    stderr.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = _File(path, encoding="utf-8")
    except OSError as error:
        raise storage_error(error, path) from None
    file.setFormatter(JsonLines())
    root = logging.getLogger()
    while _installed:
        old = _installed.pop()
        root.removeHandler(old)
        with contextlib.suppress(OSError):  # of lines that could not be written
            old.close()
    for handler in (stderr, file):
        root.addHandler(handler)
        _installed.append(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("gptfl_dist").setLevel(logging.INFO)
    # gRPC logs a traceback for every connection that breaks; what that means for a round our own lines say.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
    logging.captureWarnings(True)

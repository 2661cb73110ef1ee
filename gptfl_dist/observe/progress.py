"""Progress of long stages and of a federation's rounds, always on stderr so that stdout stays a result.

On a terminal a bar (rich, imported only then); elsewhere, in a log file or under a job scheduler, plain lines: one
when a stage starts, one at most every ten seconds, one at the end. `progress(...)` and `RoundTable` are context
managers.
"""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from gptfl_dist.observe.summary import RoundRecord
from gptfl_dist.observe.wording import duration, percent, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

INTERVAL = 10.0
"""Seconds between two plain lines of one stage, at least."""

_RECENT_ROUNDS = 5
_SHOWN_AT_WORK = 3  # silos, those furthest behind


class Progress(ABC):
    """How far one stage has come. Use it as a context manager and call `update`, or hand `callback` on."""

    def __init__(self, stage: str, total: int, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done, self.note = 0, ""
        self._clock = clock
        self._first: tuple[float, int] | None = None

    def update(self, done: int, note: str = "") -> None:
        """`done` of `total` units are done; `note` is a short word on the last one, such as its loss."""
        self.done, self.note = done, note
        # The estimate starts at the first report: a stage that is taken up again reports at once what it finds done.
        if self._first is None:
            self._first = (self._clock(), done)
        self._show()

    @property
    def seconds_left(self) -> float | None:
        """At the mean pace since the first report; None before there is one."""
        if self._first is None or self.done <= self._first[1]:
            return None
        since, before = self._first
        return (self._clock() - since) / (self.done - before) * max(0, self.total - self.done)

    @property
    def callback(self) -> Callable[[int, int], None]:
        """The same as a function of (done, total), for rooms that know nothing of this one."""

        def report(done: int, total: int) -> None:
            self.total = total
            self.update(done)

        return report

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @abstractmethod
    def _show(self) -> None: ...


class PlainProgress(Progress):
    """Lines for a log."""

    def __init__(
        self, stage: str, total: int, unit: str, stream: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(stage, total, unit, clock)
        self._stream = stream

    def __enter__(self) -> Self:
        self._started = self._printed = self._clock()
        self._line(f"{self.total} {self.unit}" if self.total else self.unit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        took = duration(self._clock() - self._started)
        self._line(f"{'stopped at' if kind else 'done,'} {self.done}/{self.total} {self.unit} in {took}{self._noted()}")

    def _show(self) -> None:
        now = self._clock()
        if now - self._printed < INTERVAL:
            return
        self._printed = now
        share = f" ({100 * self.done // self.total} %)" if self.total else ""
        left = _left(self.seconds_left)
        self._line(f"{self.done}/{self.total} {self.unit}{share}{left and ', '}{left}{self._noted()}")

    def _noted(self) -> str:
        return f"; {self.note}" if self.note else ""

    def _line(self, text: str) -> None:
        print(f"{self.stage}: {text}", file=self._stream, flush=True)


class BarProgress(Progress):
    """A bar on a terminal."""

    def __init__(self, stage: str, total: int, unit: str, console: Console) -> None:
        super().__init__(stage, total, unit)
        self._bar = _bar(console)

    def __enter__(self) -> Self:
        self._task: TaskID = self._bar.add_task(self.stage, total=self.total, unit=self.unit, left="", note="")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def _show(self) -> None:
        left = _left(self.seconds_left)
        self._bar.update(self._task, completed=self.done, total=self.total, left=left, note=self.note)


def progress(stage: str, total: int, unit: str) -> Progress:
    """The progress of a stage of `total` units (images, epochs ...), a bar on a terminal and else plain lines."""
    if _on_terminal(sys.stderr):
        return BarProgress(stage, total, unit, _console())
    return PlainProgress(stage, total, unit, sys.stderr)


class RoundTable:
    """One line a round, with the time left for all rounds that are planned, tuning trials and later arms included.

    On a terminal a bar below the lines says how far all of it has come.
    """

    def __init__(self, planned: int, stream: TextIO | None = None, *, stale: bool = False) -> None:
        """`planned` counts the rounds still to run, over all arms and trials; `stream` is stderr if not given.

        `stale`: updates may be some rounds old, and a column says how many were.
        """
        self._planned, self._done = planned, 0
        self._recent: deque[float] = deque(maxlen=_RECENT_ROUNDS)
        self._stream = stream or sys.stderr
        self._bar = _bar(_console()) if _on_terminal(self._stream) else None
        self._header_due = True
        self._stale = stale
        self._at_work: dict[str, int] = {}  # how far each silo's training is, per cent
        self._missing = ""

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._task = self._bar.add_task("all rounds", total=self._planned, unit="rounds", left="", note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds_left(self) -> float | None:
        """Rounds left times the median of the last rounds' seconds; None before the first round."""
        return median(self._recent) * max(0, self._planned - self._done) if self._recent else None

    def add(self, arm: str, rounds: int, record: RoundRecord, *, wanted: int) -> None:
        """A round of `arm` (a trial's name may say its rate) is over; it is made of so many of the `wanted` updates.

        Its validation accuracy is that of the weights which the silos received, its test accuracy that of the new ones.
        """
        self._done += 1
        self._recent.append(record.seconds)
        if self._header_due:
            titles = ["round", "received:val.", "new:test", "silos", "down", "up", "time", "left"]
            self._print(_row("arm", *titles, *(["stale"] if self._stale else [])))
            self._header_due = False
        old = sum(age > 0 for age in record.staleness.values())
        self._print(
            _row(
                arm,
                f"{record.round}/{rounds}",
                percent(record.validation_accuracy),
                percent(record.accuracy),
                f"{len(record.staleness)}/{wanted}",
                size(record.bytes_down),
                size(record.bytes_up),
                duration(record.seconds),
                duration(self.seconds_left or 0.0),
                *([str(old)] if self._stale else []),
            )
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        self._show()

    def skip(self, rounds: int) -> None:
        """So many of the rounds that were planned will not be run."""
        self._planned -= rounds
        if self._bar is not None:
            self._bar.update(self._task, total=self._planned)
        self._show()

    def working(self, silo: str, done: int, total: int) -> None:
        """How far a silo's training is; seen on a terminal alone, as are the next two."""
        self._at_work[silo] = 100 * done // max(1, total)
        self._show()

    def silo_done(self, silo: str) -> None:
        """A silo is at work no more."""
        self._at_work.pop(silo, None)
        self._show()

    def waiting_for(self, silos: Sequence[str]) -> None:
        """The silos that are missing stand in place of the time left, which nobody knows until they are here."""
        self._missing = ", ".join(silos)
        self._show()

    def _show(self) -> None:
        if self._bar is None:
            return
        left = f"waiting for {self._missing}" if self._missing else _left(self.seconds_left)
        last = sorted(self._at_work.items(), key=lambda silo: silo[1])
        note = ", ".join(f"{silo} {share} %" for silo, share in last[:_SHOWN_AT_WORK])
        more = len(last) - _SHOWN_AT_WORK
        self._bar.update(self._task, left=left, note=f"{note}, and {more} more" if more > 0 else note)

    def _print(self, line: str) -> None:
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _left(seconds: float | None) -> str:
    return f"about {duration(seconds)} left" if seconds else ""


def _row(arm: str, *cells: str) -> str:
    widths = (7, 14, 9, 7, 8, 8, 11, 12, 6)
    return " ".join([f"{arm:<27}", *(cell.rjust(width) for cell, width in zip(cells, widths, strict=False))])


def _on_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _console() -> Console:
    """The one console on stderr: displays that are on at the same time nest only within one console."""
    global _shared
    if _shared is None:
        from rich.console import Console

        _shared = Console(stderr=True)
    return _shared


_shared: Console | None = None


def _bar(console: Console) -> RichProgress:
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        TextColumn("{task.fields[note]}", markup=False, style="dim"),
        console=console,
    )

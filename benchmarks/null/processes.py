"""CPU time and memory of a command and all that comes of it, sampled from /proc (Linux alone)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_EVERY = 0.05  # seconds: looking more often takes more of the cores away from what is measured


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    return 0


def peak_memory(pid: int) -> int:
    """The most bytes of memory that a process ever had resident (VmHWM)."""
    return _status(pid, "VmHWM:")


def resident_memory(pid: int) -> int:
    """The bytes of memory that a process has resident (VmRSS)."""
    return _status(pid, "VmRSS:")


def loopback_bytes() -> int:
    """Bytes that went over the loopback interface of this network namespace."""
    rows = Path("/proc/net/dev").read_text().splitlines()
    return next(int(row.split(":")[1].split()[0]) for row in rows if row.strip().startswith("lo:"))


@dataclass
class Process:
    parent: int
    command: str
    cpu: float = 0.0
    memory: int = 0
    peak: int = 0


@dataclass
class Sample:
    """Of one moment: CPU seconds of all processes so far, loopback bytes so far, resident bytes by process id."""

    time: float
    cpu: float
    wire: int
    memory: dict[int, int]


@dataclass
class Monitor:
    """Follows process `root` and its descendants until `stop`; a process that is gone keeps its last count."""

    root: int
    processes: dict[int, Process] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        assert self._thread is not None
        self._thread.join()

    def cpu_at(self, moment: float) -> float:
        """CPU seconds of all processes up to a moment (time.time), between two samples by interpolation."""
        return self._at(moment, lambda sample: sample.cpu)

    def wire_at(self, moment: float) -> float:
        """Loopback bytes up to a moment."""
        return self._at(moment, lambda sample: sample.wire)

    def memory_at(self, pid: int, moment: float) -> int:
        """Resident bytes of a process at the last sample before a moment."""
        return next((s.memory[pid] for s in reversed(self.samples) if s.time <= moment and pid in s.memory), 0)

    def _at(self, moment: float, value: Callable[[Sample], float]) -> float:
        pairs = zip(self.samples, self.samples[1:], strict=False)
        for before, after in pairs:
            if before.time <= moment <= after.time:
                share = (moment - before.time) / max(after.time - before.time, 1e-9)
                return float(value(before) + share * (value(after) - value(before)))
        return float(value(self.samples[-1]))

    def _loop(self) -> None:
        while not self._stopping.wait(_EVERY):
            self._sample()

    def _sample(self) -> None:
        known = {self.root, *self.processes}
        stats = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                text = (folder / "stat").read_text()
            except OSError:
                continue
            rest = text[text.rindex(")") + 2 :].split()
            stats[int(folder.name)] = int(rest[1]), (int(rest[11]) + int(rest[12])) / _TICK
        grown = True
        while grown:
            new = {pid for pid, (parent, _) in stats.items() if parent in known} - known
            grown = bool(new)
            known |= new
        for pid in known & stats.keys():
            try:
                process = self.processes.get(pid)
                if process is None or "gptfl_dist" not in process.command:
                    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                    process = self.processes.setdefault(pid, Process(stats[pid][0], command))
                    process.command = command
                process.cpu = stats[pid][1]
                process.memory, process.peak = resident_memory(pid), peak_memory(pid) or process.peak
            except OSError:
                continue
        total = sum(process.cpu for process in self.processes.values())
        memory = {pid: self.processes[pid].memory for pid in known & self.processes.keys()}
        self.samples.append(Sample(time.time(), total, loopback_bytes(), memory))

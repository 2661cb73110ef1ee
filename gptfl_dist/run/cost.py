"""What a stage took: seconds of all its devices together, over interruptions, in a file of its own.

What a stage makes is the same bytes whenever it is made, so how long that took stands beside it and not in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptfl_dist.files import write_file

if TYPE_CHECKING:
    import torch

COST = "cost.json"
"""What making a synthetic set took, in its folder."""

_EVERY = 1.0  # seconds from one note to the next at least: a killed stage forgets so much and a batch at most

_AND = "; "  # between the names of devices


@dataclass(frozen=True, slots=True)
class Cost:
    """`seconds` of all devices together, and what such devices are called: several where it went on on others."""

    seconds: float
    hardware: str

    @property
    def names(self) -> set[str]:
        return set(self.hardware.split(_AND))


def read_cost(path: Path) -> Cost | None:
    """None where nothing was noted, as by an earlier release."""
    return Cost(**json.loads(path.read_text())) if path.exists() else None


def together(costs: Sequence[Cost]) -> Cost:
    """The sum, on all hardware."""
    names = sorted(set[str]().union(*(cost.names for cost in costs)))
    return Cost(sum(cost.seconds for cost in costs), _AND.join(names))


class Meter:
    """Counts the time from its making on, for so many devices, and notes it in a file."""

    def __init__(self, path: Path, *, devices: int, hardware: Callable[[], str], goes_on: bool) -> None:
        """`hardware` names such a device, once there is work for it; `goes_on`: with what was begun before, whose cost
        stands there."""
        known = read_cost(path) if goes_on else None
        self._before = [] if known is None else [known]
        self._path, self._devices, self._hardware = path, devices, hardware
        self._started = self._noted = time.monotonic()
        self.begun = False
        """Whether there was anything left to do."""

    def beside(self, report: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """A report of progress that is noted too."""

        def both(done: int, total: int) -> None:
            self.begun |= done < total
            if self.begun and time.monotonic() - self._noted >= _EVERY:
                self.note()
            report(done, total)

        return both

    def note(self) -> None:
        """Notes what it took so far. Raises StorageError."""
        self._noted = time.monotonic()
        cost = together([Cost((self._noted - self._started) * self._devices, self._hardware()), *self._before])
        write_file(self._path, json.dumps(asdict(cost)))


def hardware_of(device: torch.device, threads: int) -> str:
    """Such as "NVIDIA H100 80GB HBM3" or "CPU, 8 threads"."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}" if device.type == "cpu" else device.type

"""What strikes a federation, drawn from the number of its run: where, in which round and in which state of it."""

from __future__ import annotations

import functools
import random
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SILOS = ("silo-1", "silo-2", "silo-3")
ROUNDS = 10
PHASES = ("start", "download", "training", "upload", "check", "committed", "aggregate", "evaluate")
FULL_DISK = "full disk"
KILLS = ("kill coordinator", "kill agent", "kill trainer", "cut", "cut all")
TROUBLES = ("stall", "delay", "freeze", "corrupt spool", "corrupt work folder", FULL_DISK)
STATES = ("start", "gather", "download", "training", "upload", "check", "aggregate", "close", "evaluate", "report")


@dataclass(frozen=True)
class Blow:
    """What strikes, where and when: `fraction` of the phase that is reached, `seconds` until it is over."""

    round: int
    phase: str
    silo: str
    what: str
    fraction: float
    seconds: float


def plan(number: int) -> list[Blow]:
    """The blows of a run, in order: four to six kills or cuts, of which one may come too late, and other troubles."""
    draw = random.Random(f"chaos/{number}")
    whats = draw.choices(KILLS, weights=(4, 3, 2, 2, 1), k=draw.randint(4, 6))
    whats += draw.choices(TROUBLES[:-1], weights=(3, 3, 0.5, 2, 1), k=draw.randint(0, 2))
    if number % 10 == 9 and can_mount():
        whats += [FULL_DISK] * 2
    blows = []
    for count, what in enumerate(draw.sample(whats, len(whats))):
        round_ = draw.randint(1, ROUNDS if count else 3)
        phase = draw.choices(PHASES, weights=(2, 3, 3, 3, 4, 2, 4, 1))[0]
        if what == "corrupt spool":
            phase = "committed"
        if phase == "start":
            round_ = 0
        elif phase == "evaluate":
            round_ = ROUNDS + 1
        blows.append(Blow(round_, phase, draw.choice(SILOS), what, draw.random(), draw.uniform(0.1, 1.5)))
    return sorted(blows, key=lambda blow: (blow.round, PHASES.index(blow.phase)))


@functools.cache
def can_mount() -> bool:
    """Whether a small disk can be had here, to be filled: a tmpfs, which takes root."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode == 0
        if done:
            unmount(Path(folder))
    return done


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)

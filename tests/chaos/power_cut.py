"""Chaos runs whose coordinator's machine loses power: what was not synced is lost, or half of it is.

    python tests/chaos/power_cut.py --runs 20          in each run three or four cuts at random instants

The coordinator runs with `power_cut.c` before its fsync, so it is known of each file and folder below the run folder
what they held when they were synced last, SQLite's included. At a cut the coordinator is killed, and the run folder is
made anew: of each name, file and block either what was synced or, at random, what was written since. It then goes on
from there. Beside what every chaos run must fulfil, no update is lost that its silo was told was committed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from chaos_federation import Run
from chaos_plan import PHASES, ROUNDS, SILOS, Blow
from chaos_runs import made_world, runs, table
from chaos_world import GPTFL, Ledger, World

_BLOCK = 4096


def compiled(folder: Path) -> Path:
    """The library of `power_cut.c`."""
    library = folder / "power_cut.so"
    source = Path(__file__).with_name("power_cut.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


class Disk:
    """A folder of which is known what was synced."""

    def __init__(self, folder: Path, shadow: Path, library: Path) -> None:
        self.folder = folder
        self.environment = {"POWER_CUT_ROOT": str(folder), "POWER_CUT_SHADOW": str(shadow), "LD_PRELOAD": str(library)}
        self._shadow = shadow

    def sync(self) -> None:
        """All of the folder is on the disk."""
        shutil.rmtree(self._shadow, ignore_errors=True)
        for kind in ("files", "folders", "held"):
            (self._shadow / kind).mkdir(parents=True)
        for path in (self.folder, *self.folder.rglob("*")):
            inode = str(path.stat().st_ino)
            if path.is_dir():
                entries = "".join(f"{one.inode()} {one.name}\n" for one in os.scandir(path))
                (self._shadow / "folders" / inode).write_text(entries)
            else:
                shutil.copyfile(path, self._shadow / "files" / inode)
                os.link(path, self._shadow / "held" / inode)

    def cut(self, draw: random.Random) -> None:
        """Leaves in the folder what a power cut may leave there. Nobody writes in it meanwhile."""
        after = self.folder.with_name(f"{self.folder.name}-after")
        self._rebuild(self.folder, after, draw, lost=draw.random() < 0.5)
        shutil.rmtree(self.folder)
        after.rename(self.folder)
        self.sync()

    def _rebuild(self, folder: Path, target: Path, draw: random.Random, *, lost: bool) -> None:
        """`lost`: nothing that was not synced is left; else of each name and block either may be."""
        target.mkdir()
        target.chmod(folder.stat().st_mode & 0o777)
        listing = self._shadow / "folders" / str(folder.stat().st_ino)
        lines = listing.read_text().splitlines() if listing.exists() else []
        synced = {name: inode for inode, _, name in (line.partition(" ") for line in lines)}
        there = {one.name: str(one.inode()) for one in os.scandir(folder)}
        for name in sorted(synced | there):
            inode = (synced if lost or draw.random() < 0.5 else there).get(name)
            path = folder / name
            if inode is None:
                continue
            if path.is_dir():
                self._rebuild(path, target / name, draw, lost=lost)
                continue
            old = _read(self._shadow / "files" / inode)
            new = _read(path) if there.get(name) == inode else _read(self._shadow / "held" / inode)
            (target / name).write_bytes(old if lost else _torn(old, new, draw))
            (target / name).chmod(0o600)


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _torn(old: bytes, new: bytes, draw: random.Random) -> bytes:
    """A file of which each block is the one or the other, as its length is."""
    if old == new:
        return old
    size = draw.choice((len(old), len(new)))
    old, new = (text.ljust(size, b"\0")[:size] for text in (old, new))
    blocks = (draw.choice((old, new))[start : start + _BLOCK] for start in range(0, size, _BLOCK))
    return b"".join(blocks)


def plan(number: int) -> list[Blow]:
    """Three or four power cuts, and what befalls the silos meanwhile."""
    draw = random.Random(f"power/{number}")
    whats = ["kill coordinator"] * draw.randint(3, 4) + draw.choices(("kill agent", "cut", "stall"), k=1)
    draw.shuffle(whats)
    phases = (*PHASES[1:-1], "committed", "committed")
    blows = [
        Blow(draw.randint(1, ROUNDS), draw.choice(phases), draw.choice(SILOS), what, draw.random(), 0.2)
        for what in whats
    ]
    return sorted(blows, key=lambda blow: (blow.round, PHASES.index(blow.phase)))


class PowerCutRun(Run):
    """A run in which the death of the coordinator is a power cut."""

    def __init__(self, world: World, folder: Path, number: int, durability: str) -> None:
        super().__init__(world, folder, plan(number), durability=durability)
        self.lost: set[tuple[str, int]] = set()  # what was acknowledged and is not in the ledger after a cut
        library = world.folder / "power_cut.so"
        self._disk = Disk(self.run_folder, folder / "shadow", library if library.exists() else compiled(world.folder))
        self._draw = random.Random(f"power/{number}")
        self._durability = durability

    def environment_of(self, side: str) -> dict[str, str]:
        if side != "coordinator":
            return {}
        if not (self.folder / "shadow").exists():
            self._disk.sync()
        return self._disk.environment

    def while_down(self, blow: Blow) -> None:
        if blow.what != "kill coordinator":
            return
        self._disk.cut(self._draw)
        ledger = Ledger.read(self.run_folder)
        self.lost |= {(silo, round_) for silo, round_ in self._acknowledged() if not ledger.holds(silo, round_)}
        if self._durability == "process":  # the silos may know of rounds that the ledger has lost
            command = [*GPTFL, "epoch", str(self.folder / "federation.yaml"), "--reason", "power cut"]
            subprocess.run(command, env={**os.environ, **self._disk.environment}, capture_output=True)

    def holds(self, silo: str, round_: int) -> bool:
        return (silo, round_) in self._acknowledged()

    def check(self) -> str:
        if self.lost:
            self.wrong.append(f"acknowledged, and lost: {sorted(self.lost)}")
        return super().check()

    def _acknowledged(self) -> set[tuple[str, int]]:
        """Silo and round of every update that the silo was told was committed."""
        return {(silo, round_) for silo, rounds in self.delivered().items() for round_ in rounds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--jobs", type=int, default=3 * (os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--durability", choices=("power", "process"), default="power")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="power-"))
    with made_world(folder) as world:
        compiled(folder)

        def make(number: int) -> PowerCutRun:
            return PowerCutRun(world, folder / str(number), number, given.durability)

        numbers = range(given.first, given.first + given.runs)
        done = asyncio.run(runs(make, numbers, given.jobs, lambda text: print(text, flush=True)))
    failed = sum(bool(run.wrong) for run in done)
    cuts = sum(what == "kill coordinator" for run in done for what, _ in run.struck)
    print(f"\n{table(done)}\n\n{len(done)} runs, {failed} failed, {cuts} power cuts (kill coordinator)")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

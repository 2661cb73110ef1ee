"""Federations of real processes that are killed, cut off and corrupted at random, and must come to the same weights.

    make chaos N=200            200 runs, seeded by their numbers; prints kills by state; exits with 1 on any failure
    python tests/chaos/chaos_runs.py --runs 1 --first 17        run 17 alone

A run is a synchronous federation of ten rounds with full quorum (`chaos_federation.py`). What strikes it, where, in
which round and in which state of it, is drawn from the run's number: `kill -9` of coordinator, agent or trainer,
connections reset, stalled, delayed or dead without a word, spools and work folders corrupted (`chaos_plan.py`). Whoever
was killed is started again, as an operator would. Of a run is expected that it ends, that its weights are bit by bit
those of the undisturbed run, that no committed update is trained again, and that it leaves nothing half-written behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from chaos_federation import Run
from chaos_plan import KILLS, STATES, TROUBLES, can_mount, plan
from chaos_world import World

R = TypeVar("R", bound=Run)


@contextlib.contextmanager
def made_world(folder: Path) -> Iterator[World]:
    """A world in a folder, with its undisturbed run."""
    world = World(folder)
    world.prepare()
    started = time.monotonic()
    run = Run(world, folder / "undisturbed", [])
    world.final = asyncio.run(run.play())
    if run.wrong:
        raise RuntimeError(f"the undisturbed run: {'; '.join(run.wrong)}")
    world.seconds = time.monotonic() - started
    yield world


async def runs(make: Callable[[int], R], numbers: range, jobs: int, say: Callable[[str], None]) -> list[R]:
    """Plays the runs of these numbers, `jobs` at a time."""
    turns = asyncio.Semaphore(jobs)

    async def one(number: int) -> R:
        async with turns:
            started = time.monotonic()
            run = make(number)
            await run.play()
            seconds = time.monotonic() - started
            struck = ", ".join(f"{what} ({state})" for what, state in run.struck)
            say(f"run {number}: {'FAILED' if run.wrong else 'ok'} in {seconds:.1f} s: {struck}")
            for wrong in run.wrong:
                say(f"    {wrong}")
            if not run.wrong:
                shutil.rmtree(run.folder)
            return run

    return list(await asyncio.gather(*(one(number) for number in numbers)))


def table(done: Sequence[Run]) -> str:
    """What struck by the state that it met."""
    counts = Counter(blow for run in done for blow in run.struck)
    lines = ["".join([f"{'':20}", *(f"{state:>10}" for state in STATES), f"{'all':>8}"])]
    for what in (*KILLS, *TROUBLES):
        row = [counts[what, state] for state in STATES]
        lines.append("".join([f"{what:20}", *(f"{count or '.':>10}" for count in row), f"{sum(row):>8}"]))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--jobs", type=int, default=3 * (os.cpu_count() or 1), help="runs at a time")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    started = time.monotonic()
    with made_world(folder) as world:
        print(f"undisturbed: {world.seconds:.1f} s, final weights {world.final[:12]}", flush=True)

        def make(number: int) -> Run:
            return Run(world, folder / str(number), plan(number))

        numbers = range(arguments.first, arguments.first + arguments.runs)
        done = asyncio.run(runs(make, numbers, arguments.jobs, lambda text: print(text, flush=True)))
    failed = sum(bool(run.wrong) for run in done)
    kills = sum(what in KILLS for run in done for what, _ in run.struck)
    print(f"\n{table(done)}\n")
    print(f"{len(done)} runs, {failed} failed, {kills} kills and cuts, in {(time.monotonic() - started) / 60:.1f} min")
    print(f"asked again because the committed update was corrupted on disk: {sum(run.asked_again for run in done)}")
    print(f"ended with a full disk and went on once there was room: {sum(run.full for run in done)}")
    if not can_mount():
        print("no disk was filled: that needs root, to mount a small one")
    print(f"gave up for lack of a quorum and were started again: {sum(run.given_up for run in done)}")
    if failed:
        print(f"what the failed runs left: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

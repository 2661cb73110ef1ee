"""Runs commands of this package side by side, so many at a time. Each is a process, whose end is no end of the others.

They are forked from a server process that has loaded torch once: loading it takes longer than a short cell. Those that
run at a time take the machine's GPUs in turn. A command goes on where it was stopped, so nothing needs to be remembered
here.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from gptfl_dist.errors import GptflError
from gptfl_dist.learning.group import PLACE, outside
from gptfl_dist.run.stages import answer_of

_K = TypeVar("_K")
_LOADED = [
    *("gptfl_dist.cli.main", "gptfl_dist.run.in_memory", "gptfl_dist.run.trainer", "gptfl_dist.run.evaluator"),
    "matplotlib.figure",  # of the report
]
_GRACE = 5.0  # seconds that a command has to end when it is asked to


async def run_all(
    commands: Mapping[_K, Sequence[str | Path]], workers: int, report: Callable[[int, int], None]
) -> dict[_K, GptflError | None]:
    """Runs `gptfl` with each list of arguments; returns what stopped each, None where it went well.

    `report(done, total)` is called as they end.
    """
    places: asyncio.LifoQueue[int] = asyncio.LifoQueue()
    for place in reversed(range(workers)):
        places.put_nowait(place)
    ended = 0

    async def one(arguments: Sequence[str | Path]) -> GptflError | None:
        nonlocal ended
        place = await places.get()
        try:
            await run_command(arguments, place)
        except GptflError as error:
            return error
        finally:
            places.put_nowait(place)
            ended += 1
            report(ended, len(commands))
        return None

    async with asyncio.TaskGroup() as group:
        tasks = {key: group.create_task(one(arguments)) for key, arguments in commands.items()}
    return {key: task.result() for key, task in tasks.items()}


async def run_command(arguments: Sequence[str | Path], place: int) -> None:
    """Runs `gptfl` with these arguments to its end. Raises its error, or StageFailed."""
    words = [*map(str, arguments), "--format", "json"]
    with tempfile.NamedTemporaryFile() as answer:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(_LOADED)
        process = server.Process(target=_command, args=(words, answer.name, place))
        process.start()
        try:
            await _end_of(process)
        finally:
            _stop(process)
        code = process.exitcode
        assert code is not None
        answer_of(" ".join(words[:-2]), code, answer)


async def _end_of(process: BaseProcess) -> None:
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_reader(process.sentinel, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process.sentinel)


def _stop(process: BaseProcess) -> None:
    """Asks the process to stop, where it has not ended, and kills it when its time is over."""
    if process.is_alive():
        process.terminate()
        process.join(_GRACE)
        if process.is_alive():
            process.kill()
    process.join()


def _command(words: list[str], answer: str, place: int) -> None:
    """In the new process: `gptfl` with these words, what it prints in the file `answer`."""
    threading.Thread(target=_end_with_the_parent, name="lifeline", daemon=True).start()
    os.setsid()  # so that Ctrl-C reaches the parent alone
    for name in set(os.environ) - set(outside(os.environ)):
        del os.environ[name]
    os.environ[PLACE] = str(place)
    for stream, file in ((sys.stdout, answer), (sys.stderr, os.devnull)):
        with Path(file).open("wb") as opened:
            os.dup2(opened.fileno(), stream.fileno())
    sys.argv = ["gptfl", *words]
    runpy.run_module("gptfl_dist", run_name="__main__")


def _end_with_the_parent() -> None:
    """No command outlives the experiment, even if that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

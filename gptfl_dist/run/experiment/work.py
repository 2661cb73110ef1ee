"""Runs commands of this package side by side, so many at a time. Each is a process, whose end is no end of the others.

A command goes on where it was stopped, so nothing needs to be remembered here.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from gptfl_dist.errors import GptflError
from gptfl_dist.launch.lifeline import Child
from gptfl_dist.run.stages import answer_of

_K = TypeVar("_K")


async def run_all(
    commands: Mapping[_K, Sequence[str | Path]], workers: int, report: Callable[[int, int], None]
) -> dict[_K, GptflError | None]:
    """Runs `gptfl` with each list of arguments; returns what stopped each, None where it went well.

    `report(done, total)` is called as they end.
    """
    turns = asyncio.Semaphore(workers)
    ended = 0

    async def one(arguments: Sequence[str | Path]) -> GptflError | None:
        nonlocal ended
        async with turns:
            try:
                await run_command(arguments)
            except GptflError as error:
                return error
            finally:
                ended += 1
                report(ended, len(commands))
        return None

    async with asyncio.TaskGroup() as group:
        tasks = {key: group.create_task(one(arguments)) for key, arguments in commands.items()}
    return {key: task.result() for key, task in tasks.items()}


async def run_command(arguments: Sequence[str | Path]) -> None:
    """Runs `gptfl` with these arguments to its end. Raises its error, or StageFailed."""
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as told:
        child = Child(
            [sys.executable, "-m", "gptfl_dist", *map(str, arguments), "--format", "json"],
            output=told,
            answer=answer,
        )
        try:
            code = await asyncio.to_thread(child.process.wait)
        finally:
            child.stop()
        answer_of(" ".join(map(str, arguments)), code, answer)

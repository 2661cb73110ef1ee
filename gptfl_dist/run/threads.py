"""Work in threads, which nothing can stop: whoever is cancelled while he waits for it waits on until it is done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

_R = TypeVar("_R")


async def to_its_end(function: Callable[..., _R], *arguments: Any) -> _R:
    """Calls a function in a thread. A cancellation is raised once the thread is done."""
    task = asyncio.create_task(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(task)
    finally:
        await ended(task)


async def ended(task: asyncio.Task[Any]) -> None:
    """Waits for a task's end, whatever it is. A signal that arrives meanwhile is not taken for it."""
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()

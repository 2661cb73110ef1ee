"""How a coordinator at work follows what an operator asked of its run: `ledger.requests` holds the wishes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from gptfl_dist.errors import RunAborted
from gptfl_dist.ledger.requests import LOOK_EVERY, abort_asked
from gptfl_dist.ledger.store import Ledger

_T = TypeVar("_T")


def aborted(ledger: Ledger) -> RunAborted | None:
    """The error that ends a run which somebody aborted, else None."""
    wish = abort_asked(ledger)
    if wish is None:
        return None
    return RunAborted(f"the run was aborted{wish.reason and ': '}{wish.reason}", hint=_what_is_left(ledger.folder))


def _what_is_left(folder: Path) -> str:
    return f"its results so far stay in {folder}: gptfl export takes models from there; --fresh makes the run anew"


async def unless_aborted(ledger: Ledger, work: Coroutine[Any, Any, _T]) -> _T:
    """Runs `work`, and cancels it once the run is aborted. Raises RunAborted."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            if (error := aborted(ledger)) is not None:
                raise error
            await asyncio.wait({task}, timeout=LOOK_EVERY)
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

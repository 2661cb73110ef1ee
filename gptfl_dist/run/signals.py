"""Ctrl-C and SIGTERM end a run cleanly: the work in progress is cancelled, put away, and the same command goes on."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

from gptfl_dist.errors import Interrupted

_T = TypeVar("_T")


def run_until_done(main: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine to its end. Raises Interrupted once a signal has cancelled it and it has cleaned up."""

    async def supervised() -> _T:
        task = asyncio.ensure_future(main)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            raise Interrupted("stopped; the same command goes on from here") from None
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(ValueError):
                    loop.remove_signal_handler(number)

    return asyncio.run(supervised())

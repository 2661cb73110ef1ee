"""Ctrl-C and SIGTERM end a command cleanly: the work in progress is put away, and the same command goes on."""

from __future__ import annotations

import signal
from collections.abc import Coroutine
from types import FrameType
from typing import Any, TypeVar

from gptfl_dist.errors import Interrupted

_T = TypeVar("_T")
_STOPPING = (signal.SIGINT, signal.SIGTERM)


def raise_interrupted() -> None:
    """From now on both signals raise Interrupted in the main thread, where no event loop takes them."""
    for number in _STOPPING:
        signal.signal(number, _interrupt)


def ignore_stops() -> None:
    """From now on both signals change nothing: all is done, and Python on its way out would die of them."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _stopped()


def _stopped() -> Interrupted:
    return Interrupted("stopped; the same command goes on from here")


def run_until_done(main: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine to its end. Raises Interrupted once a signal has cancelled it and it has cleaned up."""
    import asyncio  # 0.1 s that `gptfl --help` does without

    async def supervised() -> _T:
        task = asyncio.ensure_future(main)
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in _STOPPING}
        for number in _STOPPING:
            loop.add_signal_handler(number, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            raise _stopped() from None
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    return asyncio.run(supervised())

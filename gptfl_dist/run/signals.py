"""Ctrl-C, SIGTERM and SIGUSR1 end a command cleanly: the work in progress is put away, and the same command goes on.

SIGUSR1 is how Slurm tells a job of its time limit, where the job asks for it (`--signal`): its exit code is another,
and under mpiexec and torchrun SIGTERM's too, so that a script knows that the job is to be queued again.
"""

from __future__ import annotations

import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from gptfl_dist.errors import Interrupted, Requeue

_T = TypeVar("_T")
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def raise_interrupted(terminated: type[Interrupted] = Interrupted) -> None:
    """From now on these signals raise Interrupted in the main thread, where no event loop takes them.

    `terminated` is what SIGTERM raises.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise _stopped(number, terminated)

    for number in _STOPPING:
        signal.signal(number, interrupt)


@contextmanager
def deadly_stops() -> Iterator[None]:
    """In the block these signals end the process at once, also in library code in which no handler of Python runs."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stops() -> None:
    """From now on these signals change nothing: all is done, and Python on its way out would die of them."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _stopped(number: int, terminated: type[Interrupted]) -> Interrupted:
    kinds: dict[int, type[Interrupted]] = {signal.SIGTERM: terminated, signal.SIGUSR1: Requeue}
    return kinds.get(number, Interrupted)("stopped; the same command goes on from here")


def run_until_done(main: Coroutine[Any, Any, _T], terminated: type[Interrupted] = Interrupted) -> _T:
    """Runs a coroutine to its end. Raises Interrupted once a signal has cancelled it and it has cleaned up.

    `terminated` is what SIGTERM raises.
    """
    import asyncio  # 0.1 s that `gptfl --help` does without

    async def supervised() -> _T:
        task = asyncio.ensure_future(main)
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in _STOPPING}
        arrived: list[int] = []

        def stop(number: int) -> None:
            arrived.append(number)
            task.cancel()

        for number in _STOPPING:
            loop.add_signal_handler(number, stop, number)
        try:
            return await task
        except asyncio.CancelledError:
            raise _stopped(arrived[0], terminated) from None
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    return asyncio.run(supervised())

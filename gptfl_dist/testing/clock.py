"""An event loop whose clock can be put forward, so that a deadline of an hour passes at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["AdvancingLoop", "advance", "run"]

_T = TypeVar("_T")


class AdvancingLoop(asyncio.SelectorEventLoop):
    """Its time is the machine's and what was skipped."""

    skipped = 0.0

    def time(self) -> float:
        return super().time() + self.skipped


def advance(seconds: float) -> None:
    """Everything that was due within so many seconds happens now. To be called in a loop of `run`."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, AdvancingLoop)
    loop.skipped += seconds


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """`asyncio.run` in a loop whose clock can be put forward."""
    with asyncio.Runner(loop_factory=AdvancingLoop) as runner:
        return runner.run(main)

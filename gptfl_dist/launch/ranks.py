"""A trainer of several ranks whose processes were started before: rank 0 here, each other by a helper on its machine.

The helpers are processes of ours, in the world that this one is in. How they are told is the caller's affair: `start`
with the session's folder, and `stop`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from gptfl_dist.launch.base import JobState
from gptfl_dist.launch.folder import Message
from gptfl_dist.launch.local import LocalLauncher

START, STOP = "start", "stop"


class RanksLauncher:
    """See `Launcher`. `own` starts rank 0; `tell` passes a message to every helper."""

    def __init__(self, own: LocalLauncher, tell: Callable[[Message], Awaitable[None]]) -> None:
        self.log = own.log
        self._own = own
        self._tell = tell

    async def start(self, session: Path, run: str) -> None:
        await self._tell({"type": START, "session": str(session)})
        await self._own.start(session, run)

    async def state(self) -> JobState:
        """That of rank 0. How another rank ended, its guard tells."""
        return await self._own.state()

    async def stop(self) -> None:
        await self._tell({"type": STOP})
        await self._own.stop()

    async def sweep(self) -> None:
        """Nothing is left: ranks end with the process that started them."""


async def follow(message: Message, own: LocalLauncher) -> None:
    """In a helper: does what a RanksLauncher told."""
    if message["type"] == START:
        await own.start(Path(message["session"]), "")
    else:
        await own.stop()

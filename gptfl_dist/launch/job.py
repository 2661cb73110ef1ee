"""An agent's hold on a trainer that a launcher started: one process or several ranks, here or on other machines.

All passes through the folder of a session (`folder`). The agent renews its lease, looks for messages and for files
that say how a rank ended, and now and then asks the launcher how the job stands. Whatever ends the job before it
answered is a TrainerLost with the reason in words.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from pathlib import Path

from gptfl_dist.errors import GptflError, TrainerError, TrainerLost
from gptfl_dist.launch.base import JobState, Launcher, Progress, unheard
from gptfl_dist.launch.channel import error_from_message
from gptfl_dist.launch.folder import LEASE, Message, Session, pauses
from gptfl_dist.launch.trainer import TIME_TO_END, last_words

_log = logging.getLogger(__name__)

_RENEWALS = 5  # of the lease, while it holds
_FIRST_QUERY, _LONGEST_QUERY = 1.0, 20.0  # seconds between two questions how the job stands
_TIME_TO_SHOW = 20.0  # seconds until a launcher must know of a rank that ended


class TrainerJob:
    """A TrainerLine to the job of a launcher. Sessions lie in `folder`; nobody else may use it."""

    def __init__(self, launcher: Launcher, folder: Path, lease: float) -> None:
        """`lease` is how many seconds the ranks go on without a sign of this agent."""
        self._launcher = launcher
        self._folder = folder
        self._lease = lease
        self._session: Session | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._state = JobState("ended", "")
        self._query_pause = self._query_at = 0.0

    async def sweep(self) -> None:
        """Ends what an agent that was killed left behind: its job, and its sessions, so that no trainer goes on."""
        await self._launcher.sweep()
        for lease in self._folder.glob(f"*/{LEASE}"):
            await asyncio.to_thread(shutil.rmtree, lease.parent, ignore_errors=True)

    @property
    def running(self) -> bool:
        return self._session is not None and self._state.life != "ended"

    async def start(self, run: str = "") -> None:
        await self.stop()
        self._session = await asyncio.to_thread(Session, self._folder)
        self._renewing = asyncio.create_task(self._renew(self._session))
        self._state = JobState("waiting", "")
        await self._launcher.start(self._session.folder, run)
        self._query_pause, self._query_at = _FIRST_QUERY, _now() + _FIRST_QUERY

    async def ask(self, message: Message, answer: str, progress: Progress = unheard) -> Message:
        assert self._session is not None
        session = self._session
        try:
            sent = await asyncio.to_thread(session.send, message)
            while True:
                received = await self._next(session, progress)
                if received["type"] == "progress":
                    progress(received["done"], received["total"])
                elif received["type"] == "failed":
                    raise error_from_message(received)
                elif received["type"] == answer:
                    break
                else:
                    raise TrainerError(f"the trainer answered {received['type']!r}, expected {answer!r}")
            await asyncio.to_thread(session.bring, message, sent, received)
            await asyncio.to_thread(session.clear, sent)
            return received
        except ValueError:
            await self.stop()
            raise TrainerError("the trainer sent what is no message", hint=f"see {self._launcher.log}") from None
        except asyncio.CancelledError:
            await self.stop()
            raise

    async def _next(self, session: Session, progress: Progress) -> Message:
        """Waits for the trainer's next message. Raises TrainerLost."""
        for pause in pauses():
            # In this order: what a rank said before it ended is seen before its end is.
            exits = await asyncio.to_thread(session.exits)
            received = await asyncio.to_thread(session.take)
            if received is not None:
                return received
            if 0 in exits or any(exits.values()):
                raise await self._lost(session, exits)
            ended = self._state.life == "ended"
            if not ended and _now() >= self._query_at:
                await self._ask_launcher(progress)
                continue  # it may have said its last word before it ended
            if ended:
                raise await self._lost(session, exits)
            await asyncio.sleep(pause)
        raise AssertionError

    async def _ask_launcher(self, progress: Progress) -> None:
        state = await self._launcher.state()
        if state != self._state:
            self._query_pause = _FIRST_QUERY
            if state.life != "running":
                _log.info(state.words)
            if state.life == "waiting":
                progress(0, 0, state.words)
        self._state = state
        self._query_pause = min(1.5 * self._query_pause, _LONGEST_QUERY)
        self._query_at = _now() + self._query_pause

    async def _lost(self, session: Session, exits: dict[int, int]) -> TrainerLost:
        """The end of the job as an error. The launcher knows the reason, if not at once."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TIME_TO_SHOW):
                while self._state.life != "ended":
                    self._state = await self._launcher.state()
                    await asyncio.sleep(0.2)
        words = self._state.words if self._state.life == "ended" else "the trainer ended before it answered"
        exits |= await asyncio.to_thread(session.exits)
        if exits:
            # A rank that was killed is the reason why the others ended with errors.
            rank, code = max(exits.items(), key=lambda exit_: (exit_[1] < 0, exit_[1] != 0, -exit_[0]))
            words += f"; rank {rank} " + (f"was killed by signal {-code}" if code < 0 else f"ended with code {code}")
        log = self._launcher.log
        return TrainerLost(f"{words}\n{await asyncio.to_thread(last_words, log)}", hint=f"see {log}")

    async def finish(self, message: Message) -> None:
        if not self.running:
            return
        assert self._session is not None
        with contextlib.suppress(TimeoutError, GptflError):
            await asyncio.to_thread(self._session.send, message)
            async with asyncio.timeout(TIME_TO_END):
                for pause in pauses():
                    if 0 in await asyncio.to_thread(self._session.exits):
                        return
                    await asyncio.sleep(pause)

    async def stop(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        assert self._renewing is not None
        self._renewing.cancel()
        try:
            await self._launcher.stop()
        finally:
            self._state = JobState("ended", "")
            await asyncio.to_thread(session.remove)

    async def _renew(self, session: Session) -> None:
        while True:
            await asyncio.sleep(self._lease / _RENEWALS)
            try:
                await asyncio.to_thread(session.renew)
            except GptflError as error:
                _log.warning("the lease of the trainer cannot be renewed: %s", error)


def _now() -> float:
    return asyncio.get_running_loop().time()

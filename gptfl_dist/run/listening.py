"""What a coordinator at work listens to beside its rounds: its exchange, and what an operator asks of its run.

Who came and who went is noted for the audit log before anything follows from it. That a run is aborted, or that nothing
can be noted any more, is told as an error.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import asdict

from gptfl_dist.errors import StorageError
from gptfl_dist.exchange.base import CoordinatorExchange, ExchangeEvent, Origin, SiloConnected, SiloLeft
from gptfl_dist.federation import steps
from gptfl_dist.ledger.requests import LOOK_EVERY, paused_since
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.run.requests import aborted
from gptfl_dist.run.watcher import Watcher


class Listening:
    """Of one run, from one arm to the next. All calls come from the event loop."""

    def __init__(
        self, exchange: CoordinatorExchange, ledger: Ledger, watcher: Watcher,
        tell: Callable[[ExchangeEvent | steps.Event | BaseException], None],
    ) -> None:  # fmt: skip
        """`tell` is called with all that happens, in its order."""
        self.paused = False  # as the ledger says
        self._exchange = exchange
        self._ledger = ledger
        self._watcher = watcher
        self._tell = tell
        self._origins: dict[str, Origin] = {}  # as they connected last
        self._pump: asyncio.Task[None] | None = None
        self._requests: asyncio.Task[None] | None = None

    def start(self) -> None:
        """The exchange is open."""
        self._pump = asyncio.create_task(self._pump_events())
        self.paused = paused_since(self._ledger) is not None
        self._requests = asyncio.create_task(self._look_for_requests())

    def stop(self) -> None:
        """Nothing is told any more."""
        for listener in (self._pump, self._requests):
            if listener is not None:
                listener.cancel()

    def note_the_rest(self) -> None:
        """Notes what came while the exchange was closed."""
        with contextlib.suppress(StorageError):  # whatever ended the run has been told
            while not self._exchange.events.empty():
                self._note_line(self._exchange.events.get_nowait())

    async def _pump_events(self) -> None:
        try:
            while True:
                event = await self._exchange.events.get()
                self._note_line(event)
                self._tell(event)
        except StorageError as broken:
            self._tell(broken)

    def _note_line(self, event: ExchangeEvent) -> None:
        """Notes for the audit log who came and who went."""
        if isinstance(event, SiloConnected):
            self._origins[event.silo] = event.origin
        if isinstance(event, SiloConnected | SiloLeft) and event.silo in self._origins:
            told = {name: value for name, value in asdict(self._origins[event.silo]).items() if value}
            what = "connected" if isinstance(event, SiloConnected) else "disconnected"
            self._ledger.note(f"silo {what}", {"silo": event.silo, **told})

    async def _look_for_requests(self) -> None:
        """Passes on what an operator asked for."""
        try:
            while (error := aborted(self._ledger)) is None:
                paused = paused_since(self._ledger) is not None
                if paused != self.paused:
                    self.paused = paused
                    self._tell(steps.Paused() if paused else steps.Resumed())
                    asked = "a pause was asked for: no other round is begun" if paused else "the pause is over"
                    self._watcher.note(asked)
                await asyncio.sleep(LOOK_EVERY)
            self._tell(error)
        except StorageError as broken:
            self._tell(broken)

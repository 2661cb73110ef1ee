"""Who is here: the silos that are connected, those that may not come back, and what the operator is told of it."""

from __future__ import annotations

from collections.abc import Iterable

from gptfl_dist.exchange.base import SiloBarred, SiloJoined, SiloLeft
from gptfl_dist.federation import steps
from gptfl_dist.run.watcher import Watcher


class Presence:
    """Of one federation, from one arm to the next."""

    def __init__(self, silos: tuple[str, ...], watcher: Watcher) -> None:
        self.connected: set[str] = set()
        self.barred: set[str] = set()
        self._silos = silos
        self._watcher = watcher
        self._news: list[str] = []  # since the operator was told last
        self._missing: tuple[str, ...] = ()  # as the operator was told
        self._revoked: set[str] = set()  # of those, likewise

    def take(self, event: SiloJoined | SiloLeft | SiloBarred) -> steps.Event:
        """Notes who came and who went, and says what that means to a round."""
        silo = event.silo
        if isinstance(event, SiloJoined):
            if silo not in self.connected:  # else it moved to another connection
                self._news.append(f"{silo} joined")
            self.connected.add(silo)
            self.barred.discard(silo)
            return steps.Joined(silo)
        if isinstance(event, SiloLeft):
            self.connected.discard(silo)
            self._news.append(f"{silo} left")
            self._watcher.silo_done(silo)
            return steps.Left(silo)
        self.barred.add(silo)
        self._watcher.note(f"{silo} is out: {event.reason}")
        return steps.Barred(silo)

    def tell(self, missing: Iterable[str]) -> None:
        """One line where a silo came or went, or where others are waited for than before."""
        waited_for = tuple(sorted(missing))
        if waited_for != self._missing:
            self._missing = waited_for
            self._watcher.waiting_for(waited_for)
            if waited_for:
                self._news.append(f"waiting for {', '.join(waited_for)}")
        if self._revoked != (revoked := self.barred.intersection(waited_for)):
            self._revoked = revoked
            if revoked:
                self._news.append(
                    f"there is no quorum without {', '.join(sorted(revoked))}, which gptfl invite lets in again"
                )
        if self._news:
            here = f"({len(self.connected)} of {len(self._silos)} are here)"
            self._watcher.note(f"{', '.join(self._news)} {here}")
            self._news.clear()

"""Tells things that happen again and again only now and then, so that nobody can fill a log by repeating them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

_REMEMBERED = 1024


class Seldom:
    """Remembers what was told in the last `seconds`, of the newest things at least."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._told: dict[Hashable, float] = {}

    def due(self, thing: Hashable) -> bool:
        """Whether it is to be told now. Then it is not due again for a while."""
        now = self._clock()
        if now - self._told.get(thing, -self._seconds) < self._seconds:
            return False
        self._told.pop(thing, None)
        if len(self._told) >= _REMEMBERED:
            del self._told[next(iter(self._told))]
        self._told[thing] = now
        return True

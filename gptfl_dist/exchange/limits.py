"""What one peer may take of a coordinator, counted by the identity in its certificate.

Two kinds of limits. A rate slows down: whoever comes too early is told how long to wait, and what they send meanwhile
waits on their own side of the wire. A number of things at once refuses, with a reason. An account is a few numbers, and
is forgotten once it says nothing, so memory grows with who is here and with nothing that they do.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gptfl_dist.config.wire import Limits

_BURST = 1.0  # seconds of a rate that may be used up at once


class TooMuch(Exception):
    """A limit is reached; the text says which, for the other side's operator."""


@dataclass(slots=True)
class _Account:
    """Of one identity: its connections with the calls under way on each, its transfers, and until when its rates are
    used up."""

    calls_on: Counter[str] = field(default_factory=Counter)
    transfers: int = 0
    used_until: dict[str, float] = field(default_factory=dict)


class Limiter:
    """Keeps the accounts. To be used from one thread."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    @property
    def accounts(self) -> int:
        """How many are kept now."""
        return len(self._accounts)

    @contextlib.contextmanager
    def under_way(self, who: str, connection: str, *, transfer: bool) -> Iterator[None]:
        """Counts a call of `who` on a connection for as long as the block takes. Raises TooMuch."""
        account = self._account(who)
        known = len(account.calls_on)
        if connection not in account.calls_on and known >= self._limits.connections:
            raise TooMuch(
                f"it has {known} connections already, and exchange.limits.connections is {self._limits.connections}"
            )
        if transfer and account.transfers >= self._limits.transfers:
            raise TooMuch(
                f"{account.transfers} of its uploads and downloads are not finished, and exchange.limits.transfers is "
                f"{self._limits.transfers}"
            )
        account.calls_on[connection] += 1
        account.transfers += transfer
        try:
            yield
        finally:
            account.transfers -= transfer
            account.calls_on[connection] -= 1
            if not account.calls_on[connection]:
                del account.calls_on[connection]

    def calls(self, who: str, count: int = 1) -> float:
        """Counts calls or messages; the seconds to wait before the next is looked at."""
        return self._use(who, "calls", count, self._limits.calls)

    def received(self, who: str, size: int) -> float:
        """Counts bytes that came; the seconds to wait before more are taken."""
        return self._use(who, "up", size, self._limits.rate)

    def sent(self, who: str, size: int) -> float:
        """Counts bytes that are sent; the seconds to wait before they are."""
        return self._use(who, "down", size, self._limits.rate)

    def _use(self, who: str, what: str, amount: int, rate: int) -> float:
        used_until, now = self._account(who).used_until, self._clock()
        begin = max(used_until.get(what, 0.0), now - _BURST)
        used_until[what] = begin + amount / rate
        return max(0.0, used_until[what] - now)

    def _account(self, who: str) -> _Account:
        if who not in self._accounts:
            now = self._clock()
            for idle in [name for name, each in self._accounts.items() if _says_nothing(each, now)]:
                del self._accounts[idle]
            self._accounts[who] = _Account()
        return self._accounts[who]


def _says_nothing(account: _Account, now: float) -> bool:
    return not account.calls_on and all(until < now - _BURST for until in account.used_until.values())

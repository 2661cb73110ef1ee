"""Buffered asynchronous aggregation (FedBuff, arXiv:2106.06639, algorithm 1) as a state machine.

A round is one aggregation. Silos train all the time, at most a cohort of them at once. A round takes the first K
updates that arrive, whatever weights they started from; K is the buffer. A silo whose update is in the buffer waits
until it was counted and is then called on with the new weights; those in training go on from their older ones. So a
silo is in a buffer at most once, and one spool a silo is enough; FedBuff itself lets a client in twice.

A round that nobody works for any more (all that are there have delivered or failed) makes do with a quorum, and so
does one at its deadline. A silo whose order failed is called on again in the next round. A silo that is gone keeps its
order, but not its place in the cohort.
"""

from __future__ import annotations

from gptfl_dist.federation.coordinator import Coordinator
from gptfl_dist.federation.steps import Call, Command, Enlist


class AsynchronousCoordinator(Coordinator):
    """See `Coordinator`; `rules.buffer` is given."""

    @property
    def recalls_at_deadline(self) -> bool:
        return self.state == "evaluate"

    @property
    def _enlists_in_mid_round(self) -> bool:
        return True

    @property
    def missing(self) -> set[str]:
        """The silos that are not connected, where those that are cannot fill the buffer."""
        absent = self._expected - self._connected
        if self.state != "train":
            return super().missing
        able = (self._connected - self._failed.keys()) | self._delivered.keys()
        return absent - self._delivered.keys() if len(able) < self._buffer else set()

    @property
    def _buffer(self) -> int:
        assert self._rules.buffer is not None
        return self._rules.buffer

    @property
    def _complete(self) -> bool:
        return len(self._delivered) >= self._buffer or not self._open

    @property
    def _missing_at_deadline(self) -> set[str]:
        return self._expected - self._connected - self._delivered.keys()

    def _enough(self, *, late: bool) -> bool:
        return True  # whoever comes later is called on in mid-round

    def _draw(self) -> tuple[str, ...]:
        """Silos for the places in the cohort that are empty; none where the buffer is full already."""
        if len(self._delivered) >= self._buffer:
            return ()
        room = self._rules.cohort - len(self._open.keys() & self._connected)
        return self._sample(self._free, max(0, room), f"{self.round}/{len(self._cohort)}")

    def _end_if_complete(self) -> list[Command]:
        more = self._draw()
        if more:
            self._cohort += more
            self._open |= dict.fromkeys(more, self.round)
            return [Enlist(self.round, more), *(Call(silo, self.round) for silo in more)]
        absent = self._expected - self._connected - self._delivered.keys()
        if not self._open and len(self._delivered) < self._rules.quorum and absent:
            return []  # one of them may join before the deadline
        return super()._end_if_complete()

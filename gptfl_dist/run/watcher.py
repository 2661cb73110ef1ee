"""What listens to a federation and shows it to people."""

from __future__ import annotations

from typing import Protocol

from gptfl_dist.ledger.records import RoundRecord
from gptfl_dist.observe.live import Standing


class Watcher(Protocol):
    """What listens to a federation. It decides nothing."""

    def round_closed(self, arm: str, rounds: int, record: RoundRecord, test_accuracy: float | None) -> None:
        """A round was aggregated, and its weights tested where there is test data."""

    def arm_stopped(self, arm: str, rounds_left: int) -> None:
        """An arm ends so many rounds before its last."""

    def stands(self, standing: Standing) -> None:
        """Where the arm in progress stands, told after everything that happens in it."""

    def heard(self, silo: str) -> None:
        """A silo gave a sign of life."""

    def silo_progress(self, silo: str, done: int, total: int, note: str) -> None:
        """How many batches of its local training a silo has behind it; `note` says what it waits for."""

    def silo_done(self, silo: str) -> None:
        """Of this silo no more progress is to be expected: it delivered, failed, was recalled or left."""

    def waiting_for(self, silos: tuple[str, ...]) -> None:
        """The silos that are missing, without which it does not go on; none where it does."""

    def note(self, text: str) -> None:
        """Something that the operator should read."""

"""The steps of an arm: events, which the state machine of `federation.coordinator` is told, and commands, its answers.

Both are plain values. What is about a round names it: an event may come when its round is over, and then changes
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Events


@dataclass(frozen=True, slots=True)
class Joined:
    """A silo is connected and ready for orders."""

    silo: str


@dataclass(frozen=True, slots=True)
class Left:
    """A silo's connection is gone."""

    silo: str


@dataclass(frozen=True, slots=True)
class Barred:
    """A silo may not take part any more; that it joins again says that it may."""

    silo: str


@dataclass(frozen=True, slots=True)
class Delivered:
    """A silo's update (or evaluation) was accepted; `round` is that of the order."""

    silo: str
    round: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A silo could not do what it was called on for, or what it returned was refused; `round` is the order's."""

    silo: str
    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The time for a state of a round is over."""

    round: int
    state: str


@dataclass(frozen=True, slots=True)
class Aggregated:
    """The weights that this round leads to are there. `last`: no other round shall follow, whatever was planned."""

    round: int
    last: bool = False


@dataclass(frozen=True, slots=True)
class Paused:
    """The operator wants no other round to be opened."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The operator lets it go on."""


Event = Joined | Left | Barred | Delivered | Failed | DeadlinePassed | Aggregated | Paused | Resumed

# Commands


@dataclass(frozen=True, slots=True)
class StartRound:
    """Make the weights of `round - 1` available, and an order of this round for each silo of the cohort.

    Where the round was begun already it goes on, and no order is made.
    """

    round: int
    cohort: tuple[str, ...]
    kind: Literal["train", "evaluate"]


@dataclass(frozen=True, slots=True)
class Enlist:
    """Make orders of the round in progress for more silos, or new ones for those whose order came to nothing."""

    round: int
    silos: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Halt:
    """The round in progress stands still until there are silos enough; it goes on with StartRound."""

    round: int


@dataclass(frozen=True, slots=True)
class Call:
    """Give a silo its order, which is of this round."""

    silo: str
    round: int


@dataclass(frozen=True, slots=True)
class Recall:
    """Tell a silo that its order, which is of this round, is no longer wanted, nor its update."""

    silo: str
    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class SetDeadline:
    """Send DeadlinePassed(round, state) after so many seconds."""

    round: int
    state: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Make the next weights from these silos' updates, whatever the round of their orders."""

    round: int
    silos: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The arm is done; these silos evaluated the final weights."""

    evaluated: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The arm cannot go on. `untrainable`: all silos that did not deliver said themselves that they failed.

    `revoked` are the silos that may not take part any more, and were needed.
    """

    reason: str
    untrainable: bool = False
    revoked: tuple[str, ...] = ()


Command = StartRound | Enlist | Halt | Call | Recall | SetDeadline | Aggregate | Finish | GiveUp

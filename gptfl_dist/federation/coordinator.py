"""The coordinator of one arm as a state machine without input or output: events in, commands out.

    gather --enough silos--> train --enough updates--> aggregate --> gather ... --last round--> evaluate --> done

A round calls on a cohort drawn without replacement from the silos that are connected. The first round waits for all
silos of the federation, up to the join deadline, so that the draw does not depend on who was quick; later rounds wait
for a cohort. A round ends when every silo of the cohort has delivered or failed, or at its deadline; it counts if a
quorum delivered. A silo that leaves in mid-round gets its order again when it comes back before the deadline. After
the last round every connected silo evaluates the final weights on its validation part.

While it is paused no round is opened: a round in progress ends as ever, then the state is `paused` until it goes on.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
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
class Delivered:
    """A silo's update (or evaluation) of this round was accepted."""

    silo: str
    round: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A silo could not do what it was called on for, or what it returned was refused."""

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


Event = Joined | Left | Delivered | Failed | DeadlinePassed | Aggregated | Paused | Resumed

State = Literal["paused", "gather", "train", "aggregate", "evaluate", "done"]

# Commands


@dataclass(frozen=True, slots=True)
class StartRound:
    """Make the weights of `round - 1` available to this cohort."""

    round: int
    cohort: tuple[str, ...]
    kind: Literal["train", "evaluate"]


@dataclass(frozen=True, slots=True)
class Call:
    """Give a silo its order of this round."""

    silo: str
    round: int


@dataclass(frozen=True, slots=True)
class Recall:
    """Tell a silo that its order is no longer wanted."""

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
    """Make the next weights from these silos' updates."""

    round: int
    silos: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The arm is done; these silos evaluated the final weights."""

    evaluated: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The arm cannot go on. `untrainable`: all silos that did not deliver said themselves that they failed."""

    reason: str
    untrainable: bool = False


Command = StartRound | Call | Recall | SetDeadline | Aggregate | Finish | GiveUp


@dataclass(frozen=True, slots=True)
class Rules:
    """What governs an arm's rounds; seconds are those of the federation file."""

    arm: str
    seed: int
    silos: tuple[str, ...]
    rounds: int
    cohort: int
    quorum: int
    deadline: float
    join_deadline: float


class Coordinator:
    """Call `begin` (or `resume`) once, then `handle` for each event; do the commands in the order given."""

    def __init__(self, rules: Rules, *, assembled: bool = False) -> None:
        """`assembled`: all silos were waited for already, by an arm before."""
        self._rules = rules
        self._assembled = assembled
        self._connected: set[str] = set()
        self._cohort: tuple[str, ...] = ()
        self._delivered: set[str] = set()
        self._failed: dict[str, str] = {}
        self._late: set[str] = set()  # who missed the deadline
        self._paused = False
        self._last = rules.rounds
        self.round = 0
        self.state: State = "gather"

    def begin(self, connected: Iterable[str], finished_rounds: int = 0, *, last: bool = False) -> list[Command]:
        """Starts after so many finished rounds (the `last` of them, perhaps), with the silos that are connected."""
        self._connected = set(connected)
        self.round = finished_rounds
        if last:
            self._last = finished_rounds
        return self._next_round()

    def resume(
        self,
        connected: Iterable[str],
        round_: int,
        cohort: Iterable[str],
        delivered: Iterable[str],
        failed: Mapping[str, str],
    ) -> list[Command]:
        """Goes on in a training round that was broken off: who delivered or failed (and why) is not called again."""
        self._connected = set(connected)
        self.round = round_
        return self._open("train", tuple(cohort), set(delivered), dict(failed))

    def handle(self, event: Event) -> list[Command]:
        """The commands that follow from an event. Events of other rounds and states change nothing."""
        if isinstance(event, Joined):
            self._connected.add(event.silo)
            if self.state == "gather":
                return self._start_if_enough(late=False)
            return [Call(event.silo, self.round)] if event.silo in self.awaited else []
        if isinstance(event, Left):
            self._connected.discard(event.silo)
            if self.state == "evaluate" and event.silo in self.awaited:
                # Nobody waits for an evaluation of a silo that went away: the weights are final.
                self._failed[event.silo] = "left"
                return self._end_if_complete()
            return []
        if isinstance(event, Paused):
            self._paused = True
            if self.state == "gather":
                self.state = "paused"
            return []
        if isinstance(event, Resumed):
            self._paused = False
            return self._gather() if self.state == "paused" else []
        if self.state == "done" or event.round != self.round:
            return []
        if isinstance(event, Delivered) and event.silo in self.awaited:
            self._delivered.add(event.silo)
            return self._end_if_complete()
        if isinstance(event, Failed) and event.silo in self.awaited:
            self._failed[event.silo] = event.reason
            return self._end_if_complete()
        if isinstance(event, DeadlinePassed) and event.state == self.state != "paused":
            return self._deadline_passed()
        if isinstance(event, Aggregated) and self.state == "aggregate":
            if event.last:
                self._last = event.round
            return self._next_round()
        return []

    @property
    def awaited(self) -> set[str]:
        """The silos whose answer is awaited."""
        if self.state not in ("train", "evaluate"):
            return set()
        return set(self._cohort) - self._delivered - self._failed.keys()

    @property
    def missing(self) -> set[str]:
        """The silos that are not connected and are waited for."""
        wanted = set(self._rules.silos) if self.state == "gather" else self.awaited
        return wanted - self._connected

    def _next_round(self) -> list[Command]:
        self.round += 1
        if self._paused:
            self.state = "paused"
            return []
        return self._gather()

    def _gather(self) -> list[Command]:
        self.state = "gather"
        commands: list[Command] = [SetDeadline(self.round, "gather", self._rules.join_deadline)]
        return commands + self._start_if_enough(late=False)

    def _start_if_enough(self, *, late: bool) -> list[Command]:
        """Starts once a whole cohort is connected; after the join deadline a quorum will do."""
        final = self.round > self._last
        present = sorted(self._connected)
        wanted = self._rules.cohort if self._assembled and not final else len(self._rules.silos)
        if len(present) < (self._rules.quorum if late else wanted):
            return []
        self._assembled = True
        if final:
            return self._open("evaluate", tuple(present), set(), {})
        # A string seed is hashed by `random` itself (SHA-512), alike on every machine.
        draw = random.Random(f"{self._rules.seed}/{self._rules.arm}/{self.round}")
        cohort = tuple(sorted(draw.sample(present, min(self._rules.cohort, len(present)))))
        return self._open("train", cohort, set(), {})

    def _open(
        self,
        state: Literal["train", "evaluate"],
        cohort: tuple[str, ...],
        delivered: set[str],
        failed: dict[str, str],
    ) -> list[Command]:
        self.state, self._cohort, self._delivered, self._failed = state, cohort, delivered, failed
        self._late = set()
        commands: list[Command] = [
            StartRound(self.round, cohort, state),
            SetDeadline(self.round, state, self._rules.deadline),
        ]
        commands += [Call(silo, self.round) for silo in cohort if silo in self.awaited & self._connected]
        return commands + self._end_if_complete()

    def _deadline_passed(self) -> list[Command]:
        if self.state == "gather":
            commands = self._start_if_enough(late=True)
            missing = ", ".join(sorted(set(self._rules.silos) - self._connected))
            return commands or self._give_up(
                f"round {self.round}: {len(self._connected)} silos are connected and {self._rules.quorum} are needed; "
                f"missing: {missing}"
            )
        late = sorted(self.awaited)
        self._late = set(late)
        commands = [Recall(silo, self.round, "the deadline of the round has passed") for silo in late]
        self._failed |= dict.fromkeys(late, "missed the deadline")
        return commands + self._end_if_complete()

    def _end_if_complete(self) -> list[Command]:
        """Ends the round once nobody is waited for."""
        if self.awaited:
            return []
        delivered = tuple(sorted(self._delivered))
        if self.state == "evaluate":
            self.state = "done"
            return [Finish(delivered)]
        if len(delivered) < self._rules.quorum:
            reasons = "; ".join(f"{silo}: {reason}" for silo, reason in sorted(self._failed.items()))
            return self._give_up(
                f"round {self.round}: {len(delivered)} of the {len(self._cohort)} silos called on delivered and "
                f"{self._rules.quorum} are needed ({reasons})",
                untrainable=not self._late,
            )
        self.state = "aggregate"
        return [Aggregate(self.round, delivered)]

    def _give_up(self, reason: str, *, untrainable: bool = False) -> list[Command]:
        self.state = "done"
        return [GiveUp(reason, untrainable)]

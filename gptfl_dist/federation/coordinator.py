"""The coordinator of one arm as a state machine without input or output: events in, commands out.

    gather --enough silos--> train --enough updates--> aggregate --> gather ... --last round--> evaluate --> done

A round calls on a cohort drawn without replacement from the silos that are connected. The first round waits for all
silos of the federation, up to the join deadline, so that the draw does not depend on who was quick; later rounds wait
for a cohort. A round ends when every silo of the cohort has delivered or failed, or at its deadline; it counts if a
quorum delivered. A silo that leaves in mid-round gets its order again when it comes back before the deadline. After
the last round every connected silo evaluates the final weights.

An order may outlive its round: where late updates are carried over, a silo that misses the deadline keeps its order
and its update counts in the round in which it arrives. A silo has one order at a time, and gets the next one only
after its update was counted. `federation.asynchronous` builds on that.

A round is begun only with a quorum. A silo that was revoked is not waited for where the others make one; where they do
not, it is, up to the join deadline, for it may be invited anew. So does a round that has begun and lost its quorum by a
revocation, or was broken off without one: it keeps what was delivered, gathers again, and enlists who is there then.

While it is paused no round is opened: a round in progress ends as ever, then the state is `paused` until it goes on.

`federation.steps` has the events and the commands.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from gptfl_dist.federation.steps import (
    Aggregate,
    Aggregated,
    Barred,
    Call,
    Command,
    DeadlinePassed,
    Delivered,
    Enlist,
    Event,
    Failed,
    Finish,
    GiveUp,
    Halt,
    Joined,
    Left,
    Paused,
    Recall,
    Resumed,
    SetDeadline,
    StartRound,
)

State = Literal["paused", "gather", "train", "aggregate", "evaluate", "done"]


@dataclass(frozen=True, slots=True)
class Rules:
    """What governs an arm's rounds; seconds are those of the federation file.

    `carry`: an update that misses the deadline counts later. `max_staleness`: it does so for so many rounds at most.
    `buffer`: how many updates an asynchronous round takes; None where rounds are synchronous.
    """

    seed: int
    silos: tuple[str, ...]
    rounds: int
    cohort: int
    quorum: int
    deadline: float
    join_deadline: float
    carry: bool = False
    max_staleness: int | None = None
    buffer: int | None = None


class Coordinator:
    """Call `begin` (or `resume`) once, then `handle` for each event; do the commands in the order given."""

    def __init__(self, rules: Rules, *, assembled: bool = False) -> None:
        """`assembled`: all silos were waited for already, by an arm before."""
        self._rules = rules
        self._assembled = assembled
        self._connected: set[str] = set()
        self._barred: set[str] = set()
        self._cohort: tuple[str, ...] = ()  # who was called on in this round
        self._open: dict[str, int] = {}  # the round of the order to which a silo owes the answer
        self._delivered: dict[str, int] = {}  # the round of the order whose answer counts when this round ends
        self._failed: dict[str, str] = {}
        self._late: set[str] = set()  # who missed the deadline
        self._paused = False
        self._last = rules.rounds
        self.round = 0
        self.state: State = "gather"

    def bar(self, silos: Iterable[str]) -> None:
        """Notes before it begins who may not take part."""
        self._barred.update(silos)

    def begin(
        self,
        connected: Iterable[str],
        finished_rounds: int = 0,
        owed: Mapping[str, int] | None = None,
        delivered: Mapping[str, int] | None = None,
        *,
        last: bool = False,
    ) -> list[Command]:
        """Starts after so many finished rounds (the `last` of them, perhaps), with the silos that are connected.

        `owed` and `delivered` are orders of earlier rounds, by silo: open ones, and those whose updates wait to count.
        """
        self._connected = set(connected) - self._barred
        self._open, self._delivered = dict(owed or {}), dict(delivered or {})
        self.round = finished_rounds + 1
        if last:
            self._last = finished_rounds
        return self._recall_old() + self._call(self._open) + self._gather()

    def resume(
        self,
        connected: Iterable[str],
        round_: int,
        cohort: Iterable[str],
        owed: Mapping[str, int],
        delivered: Mapping[str, int],
        failed: Mapping[str, str],
    ) -> list[Command]:
        """Goes on in a training round that was broken off: who delivered or failed (and why) is not called again.

        Where no quorum can come of it that way, who failed may be called on again, and others are.
        """
        self._connected = set(connected) - self._barred
        self.round, self.state = round_, "train"
        self._cohort, self._open, self._delivered = tuple(cohort), dict(owed), dict(delivered)
        short = len(self._engaged) < self._rules.quorum
        self._failed = {} if short else dict(failed)
        if short and not self._enlists_in_mid_round:
            return self._call(self._open) + self._wait_for_silos()
        return [
            StartRound(round_, self._cohort, "train"),
            SetDeadline(round_, "train", self._rules.deadline),
            *self._call(self._open),
            *self._go_on(),
        ]

    def handle(self, event: Event) -> list[Command]:
        """The commands that follow from an event. Events of orders that are not open change nothing."""
        if isinstance(event, Joined):
            self._connected.add(event.silo)
            if event.silo in self._barred:
                self._barred.remove(event.silo)
                self._failed.pop(event.silo, None)  # it failed as another, so to speak
            return self._call([event.silo]) + self._go_on()
        if isinstance(event, Left):
            self._connected.discard(event.silo)
            if self.state == "evaluate" and self._open.pop(event.silo, None) is not None:
                self._failed[event.silo] = "left"  # nobody waits for it: the weights are final
            return self._go_on()
        if isinstance(event, Barred):
            self._barred.add(event.silo)
            self._connected.discard(event.silo)
            return self._go_on()
        if isinstance(event, Paused):
            self._paused = True
            if self.state == "gather":
                self.state = "paused"
            return []
        if isinstance(event, Resumed):
            self._paused = False
            return self._wait_for_silos() if self.state == "paused" else []
        if isinstance(event, Delivered) and self._open.get(event.silo) == event.round:
            self._delivered[event.silo] = self._open.pop(event.silo)
            return self._go_on()
        if isinstance(event, Failed) and self._open.get(event.silo) == event.round:
            del self._open[event.silo]
            if self._cohort or self.state not in ("gather", "paused"):  # else it was an order of an earlier round
                self._failed[event.silo] = event.reason
            return self._go_on()
        if isinstance(event, DeadlinePassed) and (event.round, event.state) == (self.round, self.state):
            return self._deadline_passed()
        if isinstance(event, Aggregated) and (event.round, self.state) == (self.round, "aggregate"):
            if event.last:
                self._last = event.round
            self.round += 1
            return self._recall_old() + self._gather()
        return []

    @property
    def owed(self) -> dict[str, int]:
        """The round of the order to which each silo owes the answer."""
        return dict(self._open)

    @property
    def recalls_at_deadline(self) -> bool:
        """Whether an answer that misses the deadline of the state is not taken."""
        return self.state == "evaluate" or not self._rules.carry

    @property
    def missing(self) -> set[str]:
        """The silos that are not connected and are waited for."""
        if self.state != "gather":
            return self._awaited - self._connected
        done = self._delivered.keys() if self._cohort else set()
        return self._expected - self._connected - done

    @property
    def _expected(self) -> set[str]:
        """The silos that are waited for: who may take part, and who was revoked where a round needs them too."""
        able = set(self._rules.silos) - self._barred - self._failed.keys()
        enough = self.round > self._last or len(able | self._engaged) >= self._rules.quorum
        return able if enough else self._possible

    @property
    def _possible(self) -> set[str]:
        """The silos of which an update may come in this round, or is there; a revoked one may be invited anew."""
        return (set(self._rules.silos) - (self._failed.keys() - self._barred)) | self._engaged

    @property
    def _engaged(self) -> set[str]:
        """The silos of which this round has an update, or an open order."""
        return self._open.keys() | self._delivered.keys()

    @property
    def _awaited(self) -> set[str]:
        """The silos for whose answer this round waits."""
        return {silo for silo, round_ in self._open.items() if round_ == self.round}

    @property
    def _free(self) -> set[str]:
        """The connected silos that can be called on.

        They owe nothing, their spool holds nothing uncounted, and they did not fail in this round.
        """
        return self._connected - self._engaged - self._failed.keys()

    @property
    def _room(self) -> int:
        """How many more silos the cohort of this round takes."""
        return self._rules.cohort - len(self._engaged.intersection(self._cohort))

    @property
    def _enlists_in_mid_round(self) -> bool:
        """Whether silos are called on while the round goes on."""
        return False

    @property
    def _complete(self) -> bool:
        """Whether the round has all that it waits for."""
        return not self._awaited

    def _enough(self, *, late: bool) -> bool:
        """Whether a round can start; after the join deadline a quorum will do."""
        if not self._makes_quorum:
            return False
        return late or len(self._free) >= min(self._room, len(self._expected - self._engaged))

    @property
    def _makes_quorum(self) -> bool:
        """Whether a quorum can come of the silos that are there."""
        return len(self._free | self._engaged) >= self._rules.quorum

    def _draw(self) -> tuple[str, ...]:
        """The silos to call on next."""
        return self._sample(self._free, self._room, str(self.round))

    def _sample(self, silos: Iterable[str], count: int, what_for: str) -> tuple[str, ...]:
        # A string seed is hashed by `random` itself (SHA-512), alike on every machine. All arms of a run and the trials
        # of its rates draw alike, so that they do not differ by who took part.
        draw, present = random.Random(f"{self._rules.seed}/{what_for}"), sorted(silos)
        return tuple(sorted(draw.sample(present, min(count, len(present)))))

    def _call(self, silos: Iterable[str]) -> list[Command]:
        """Calls on those of the silos that are connected and owe an answer."""
        return [Call(silo, self._open[silo]) for silo in sorted(silos) if silo in self._connected & self._open.keys()]

    def _recall_old(self) -> list[Command]:
        """Recalls the orders of earlier rounds that came too late for the round that begins."""
        commands: list[Command] = []
        limit = self._rules.max_staleness
        for silo, round_ in sorted({**self._open, **self._delivered}.items()):
            reason = ""
            if self.round > self._last:
                reason = "the last round is over"
            elif limit is not None and self.round - round_ > limit:
                reason = f"it would be {self.round - round_} rounds old, federation.max_staleness allows {limit}"
            if reason:
                self._open.pop(silo, None)
                self._delivered.pop(silo, None)
                commands.append(Recall(silo, round_, reason))
        return commands

    def _gather(self) -> list[Command]:
        self._cohort, self._failed, self._late = (), {}, set()
        return self._wait_for_silos()

    def _wait_for_silos(self) -> list[Command]:
        """Waits for the silos of a round, which has a cohort already where it was begun."""
        if self._paused:
            self.state = "paused"
            return []
        self.state = "gather"
        commands: list[Command] = [SetDeadline(self.round, "gather", self._rules.join_deadline)]
        return commands + self._start_if_enough(late=False)

    def _start_if_enough(self, *, late: bool) -> list[Command]:
        """Starts the round once its silos are there; the first one of all, and the evaluation, wait for every silo."""
        final = self.round > self._last
        if final:
            enough = len(self._connected) >= (self._rules.quorum if late else max(1, len(self._expected)))
        elif not self._assembled and not self._cohort:
            enough = self._makes_quorum and (late or self._expected <= self._connected)
        else:
            enough = self._enough(late=late)
        if not enough:
            return []
        self._assembled = True
        self.state = "evaluate" if final else "train"
        begun, drawn = self._cohort, tuple(sorted(self._free)) if final else self._draw()
        self._cohort = tuple(sorted({*begun, *drawn}))
        self._open |= dict.fromkeys(drawn, self.round)
        return [
            StartRound(self.round, begun or drawn, self.state),
            *([Enlist(self.round, drawn)] if begun and drawn else []),
            SetDeadline(self.round, self.state, self._rules.deadline),
            *self._call(drawn),
            *self._go_on(),
        ]

    def _go_on(self) -> list[Command]:
        """What follows from who is there, who delivered and who failed."""
        if self.state == "gather":
            return self._start_if_enough(late=False)
        if self.state == "train":
            return self._end_if_complete()
        if self.state == "evaluate" and not self._open:
            self.state = "done"
            return [Finish(tuple(sorted(self._delivered)))]
        return []

    def _deadline_passed(self) -> list[Command]:
        if self.state == "gather":
            return self._start_if_enough(late=True) or self._give_up(self._too_few_silos)
        if not self.recalls_at_deadline:
            return self._aggregate() if len(self._delivered) >= self._rules.quorum else self._give_up(self._too_few)
        late = self._open
        self._open, self._late = {}, set(late)
        commands = [
            Recall(silo, round_, "the deadline of the round has passed") for silo, round_ in sorted(late.items())
        ]
        self._failed |= dict.fromkeys(late, "missed the deadline")
        return commands + self._go_on()

    def _end_if_complete(self) -> list[Command]:
        """Ends a training round once nobody is waited for."""
        if not self._complete:
            return []
        if len(self._delivered) >= self._rules.quorum:
            return self._aggregate()
        if self._open:
            return []  # orders of earlier rounds: their updates may still make a quorum before the deadline
        lost = set(self._cohort) - self._delivered.keys() - (self._failed.keys() - self._barred)
        if lost and len(self._possible) >= self._rules.quorum and not self._enlists_in_mid_round:
            return [Halt(self.round), *self._wait_for_silos()]
        called = {*self._cohort, *self._failed}
        without = called - self._delivered.keys()
        told = [f"{silo}: {self._failed.get(silo, 'not called on again')}" for silo in sorted(without)]
        return self._give_up(
            f"round {self.round}: {len(self._delivered)} of the {len(called)} silos called on delivered and "
            f"{self._rules.quorum} are needed ({'; '.join(told) or 'no others are there'})",
            untrainable=not self._late and self._barred.isdisjoint(without),
        )

    @property
    def _too_few_silos(self) -> str:
        """Why a round cannot be begun, or go on, at the join deadline."""
        here = self._connected if self.round > self._last else self._free | self._engaged
        absent = sorted(set(self._rules.silos) - self._connected - self._engaged)
        missing = ", ".join(map(self._named, absent))
        failed = "; ".join(f"{silo}: {reason}" for silo, reason in sorted(self._failed.items()) if silo not in absent)
        return (
            f"round {self.round}: {len(here)} silos are connected{' or called on' if self._engaged else ''} and "
            f"{self._rules.quorum} are needed; missing: {missing}" + (f"; failed: {failed}" if failed else "")
        )

    def _named(self, silo: str) -> str:
        return f"{silo} (revoked)" if silo in self._barred else silo

    @property
    def _too_few(self) -> str:
        """Why a round cannot be counted at its deadline, where nobody is recalled."""
        here, gone = sorted(self._open.keys() & self._connected), sorted(self._missing_at_deadline)
        failed = [f"{silo}: {reason}" for silo, reason in sorted(self._failed.items())]
        told = {"still at work": here, "not connected": list(map(self._named, gone)), "failed": failed}
        return (
            f"round {self.round}: {len(self._delivered)} updates came before the deadline and {self._rules.quorum} are "
            "needed" + "".join(f"; {what}: {', '.join(silos)}" for what, silos in told.items() if silos)
        )

    @property
    def _missing_at_deadline(self) -> set[str]:
        return self._open.keys() - self._connected

    def _aggregate(self) -> list[Command]:
        counted, self._delivered = tuple(sorted(self._delivered)), {}
        self.state = "aggregate"
        return [Aggregate(self.round, counted)]

    def _give_up(self, reason: str, *, untrainable: bool = False) -> list[Command]:
        self.state = "done"
        called = set(self._cohort or self._rules.silos)
        return [GiveUp(reason, untrainable, tuple(sorted(self._barred & called - self._delivered.keys())))]

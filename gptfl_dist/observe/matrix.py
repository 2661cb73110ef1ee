"""From the summaries of cells to what a table says: mean and spread over seeds, rounds and bytes to a target, pairs.

Every accuracy is of the weights after the last round unless it is called `kept`, which is the round that the silos'
validation data chose, or held-out synthetic data where a cell chooses by these. The target of a split is what its best
federated arm from random weights reaches after its last round, the mean over seeds; that arm is also the baseline,
against which all others are compared seed by seed. For the arms from other weights stands the one that is best on
validation data.

A cell that failed is missing: figures are over the seeds that are there, pairs over those that both arms have.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType
from typing import Literal

from gptfl_dist.config.experiment import Group
from gptfl_dist.observe.matrix_cost import Cost, cost_of
from gptfl_dist.observe.matrix_measures import Known, measures_of, silo_accuracies_of
from gptfl_dist.observe.summary import FederatedArm, ServerStage, StageCost, rounds_to_target


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure by seed; `sd` is the sample standard deviation, None for a single seed, and `mean` None for none."""

    by_seed: Mapping[int, float]

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(self.by_seed.values())

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.by_seed else None

    @property
    def sd(self) -> float | None:
        return statistics.stdev(self.values) if len(self.by_seed) > 1 else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one cell came to. A cell of silos that train alone has the means over them, and the worst of them.

    `measures` and `silo_accuracy` are from round 0, the start, on.
    `validation` is as `validation_of` has it; where `personal` is true it is of the silos' personal models, not of the
    model that is tested. `kept_by` says whose data chose the kept model.
    """

    start: float
    curve: tuple[float, ...]
    kept: float
    worst: float
    bytes_a_round: float
    cost: Cost
    measures: tuple[Known, ...]
    silo_accuracy: tuple[Mapping[str, float], ...]
    validation: float | None = None
    kept_by: Literal["silos", "synthetic"] = "silos"
    personal: bool = False

    @property
    def final(self) -> float:
        """After the last round; an arm that was good enough before its first one ends at its start."""
        return (self.start, *self.curve)[-1]

    def rounds_to(self, target: float) -> int | None:
        """How many rounds it took; 0 where it needed none and so trained in none."""
        if not self.curve and self.start >= target:
            return 0
        return rounds_to_target(self.curve, target)

    def bytes_of(self, rounds: int) -> float:
        """What travelled in so many first rounds, of which one may take more than another."""
        return sum(one[way] or 0 for one in self.measures[1 : rounds + 1] for way in ("bytes_down", "bytes_up"))


@dataclass(frozen=True, slots=True)
class Row:
    """A group with its cells by seed; one without any failed in all.

    `baseline` and `target` are those of the split, None where it has no federated arm from random weights; so is
    `chosen`, the arm from other weights that is best on validation data. `validation` is over the seeds of which it is
    known, `worst` is of silos that train alone, None elsewhere. `rounds_to_target` and `bytes_to_target` hold None for
    a seed that did not reach it, the latter also where nothing travels. `pairs` are the differences to the baseline,
    None for the baseline itself and where no seed is there for both.
    """

    group: Group
    outcomes: Mapping[int, Outcome]
    accuracy: Spread
    kept: Spread
    validation: Spread
    worst: Spread | None
    start: Spread
    baseline: Group | None
    chosen: Group | None
    target: float | None
    rounds_to_target: Mapping[int, int | None]
    bytes_to_target: Mapping[int, float | None]
    pairs: Spread | None

    @property
    def federated(self) -> bool:
        """Whether silos train together, rather than each alone or one with the data of all."""
        return _federated(self.group)

    @property
    def above(self) -> int | None:
        """In how many seeds it is above the baseline."""
        return None if self.pairs is None else sum(value > 0 for value in self.pairs.values)


def outcome_of(
    arms: Sequence[FederatedArm],
    server: Mapping[ServerStage, StageCost] = MappingProxyType({}),
    needed: Collection[ServerStage] = (),
    kept_by: Literal["silos", "synthetic"] = "silos",
    personal: bool = False,
) -> Outcome:
    """The outcome of a cell from the arms of its runs: one, or of each silo its own.

    `server` is what the stages before the federation took, of those `needed` that noted it; `kept_by` and
    `personal` are as in an outcome.
    """
    starts, curves = _known([arm.start_accuracy for arm in arms]), [_known(arm.curve) for arm in arms]
    rounds = min(map(len, curves))
    last = [(start, *curve)[rounds] for start, curve in zip(starts, curves, strict=True)]
    measures = measures_of(arms)
    return Outcome(
        start=statistics.fmean(starts),
        curve=tuple(statistics.fmean(curve[round_] for curve in curves) for round_ in range(rounds)),
        kept=statistics.fmean(_known([arm.accuracy for arm in arms])),
        worst=min(last),
        bytes_a_round=sum((arm.bytes_down + arm.bytes_up) / max(1, arm.rounds) for arm in arms),
        cost=cost_of(arms, measures, server, needed),
        measures=measures,
        silo_accuracy=silo_accuracies_of(arms),
        validation=validation_of(arms),
        kept_by=kept_by,
        personal=personal,
    )


def validation_of(arms: Sequence[FederatedArm]) -> float | None:
    """Accuracy on the silos' validation data after the last round, the mean over a cell's runs, if all have it."""
    return next(iter(validations_of(arms)), None)


def validations_of(arms: Sequence[FederatedArm]) -> tuple[float, ...]:
    """The same after the last round, the one before and so on, as far back as all have it."""
    # Without a round the start was kept, of which validation_accuracy tells.
    curves = [reversed(arm.validation_curve or [arm.validation_accuracy]) for arm in arms]
    known = takewhile(lambda values: None not in values, zip(*curves, strict=False))
    return tuple(statistics.fmean(_known(values)) for values in known)


def _known(values: Sequence[float | None]) -> list[float]:
    assert all(value is not None for value in values)
    return [value for value in values if value is not None]


def rows_of(found: Mapping[Group, Mapping[int, Outcome]], random_starts: frozenset[str]) -> list[Row]:
    """The table, in the order of `found`. `random_starts` are the starts whose arms are to be beaten."""
    finals = {group: Spread({seed: one.final for seed, one in outcomes.items()}) for group, outcomes in found.items()}
    validations = {
        group: Spread({seed: one.validation for seed, one in outcomes.items() if one.validation is not None})
        for group, outcomes in found.items()
    }
    comparable = {
        group: validation
        for group, validation in validations.items()
        if not any(one.personal for one in found[group].values())
    }
    rows = []
    for group, outcomes in found.items():
        baseline = _baseline(group.split, finals, random_starts)
        chosen = _chosen(group.split, comparable, random_starts)
        rows.append(_row(group, outcomes, finals, validations[group], baseline, chosen))
    return rows


def _baseline(split: str, finals: Mapping[Group, Spread], random_starts: frozenset[str]) -> Group | None:
    """The best of the federated arms from random weights, of those that most seeds came through with.

    Arms of all silos go before those of a cohort, which learn less in a round by their nature.
    """
    places = {
        group: (group.silos == "all", len(final.by_seed), final.mean)
        for group, final in finals.items()
        if group.split == split and group.start in random_starts and _federated(group) and final.mean is not None
    }
    return max(places, key=lambda group: places[group], default=None)


def _chosen(split: str, validations: Mapping[Group, Spread], random_starts: frozenset[str]) -> Group | None:
    """Of the federated arms of all silos from other than random weights, the best on validation data.

    Test data have no part in it, nor have arms whose validation accuracy is of other models than the one that is
    tested. Those that most seeds came through with go first.
    """
    places = {
        group: (len(validation.by_seed), validation.mean)
        for group, validation in validations.items()
        if group.split == split and group.start not in random_starts and group.silos == "all"
        if validation.mean is not None
    }
    return max(places, key=lambda group: places[group], default=None)


def _federated(group: Group) -> bool:
    return group.silos not in ("alone", "pooled")


def _row(
    group: Group,
    outcomes: Mapping[int, Outcome],
    finals: Mapping[Group, Spread],
    validation: Spread,
    baseline: Group | None,
    chosen: Group | None,
) -> Row:
    target = None if baseline is None else finals[baseline].mean
    reached = {seed: None if target is None else one.rounds_to(target) for seed, one in outcomes.items()}
    differences = {}
    if baseline is not None and baseline != group:
        against = finals[baseline].by_seed
        differences = {seed: one - against[seed] for seed, one in finals[group].by_seed.items() if seed in against}
    return Row(
        group=group,
        outcomes=outcomes,
        accuracy=finals[group],
        kept=Spread({seed: one.kept for seed, one in outcomes.items()}),
        validation=validation,
        worst=Spread({seed: one.worst for seed, one in outcomes.items()}) if group.silos == "alone" else None,
        start=Spread({seed: one.start for seed, one in outcomes.items()}),
        baseline=baseline,
        chosen=chosen,
        target=target,
        rounds_to_target=reached,
        bytes_to_target={
            seed: outcomes[seed].bytes_of(rounds) if rounds is not None and _federated(group) else None
            for seed, rounds in reached.items()
        },
        pairs=Spread(differences) if differences else None,
    )

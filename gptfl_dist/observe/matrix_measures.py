"""The measures of a cell by round, beside accuracy, as one mapping a round; docs/experiments.md defines them.

A cell of silos that train alone has several runs: the mean over them, of what is counted the sum, and the worst silo.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from gptfl_dist.observe.summary import FederatedArm, RoundMeasures

Known = dict[str, float | None]

MEASURES = (
    *("macro_f1", "calibration_error", "loss", "worst_silo_accuracy"),
    *("diversity", "log_n_diversity", "mean_cosine", "mean_norm", "max_norm"),
    *("silo_seconds", "max_silo_seconds", "bytes_down", "bytes_up"),
)
"""In the order of columns."""

_OVER_RUNS: dict[str, Callable[[Sequence[RoundMeasures]], float | None]] = {
    "worst_silo_accuracy": lambda runs: min((a for one in runs for a in one.silo_accuracy.values()), default=None),
    "silo_seconds": lambda runs: sum(_seconds(runs)) if _seconds(runs) else None,
    "max_silo_seconds": lambda runs: max(_seconds(runs), default=None),
    "bytes_down": lambda runs: sum(one.bytes_down for one in runs),
    "bytes_up": lambda runs: sum(one.bytes_up for one in runs),
}
"""The others are means."""


def measures_of(arms: Sequence[FederatedArm]) -> tuple[Known, ...]:
    """From round 0, the start, as far as all arms of a cell went."""
    return tuple(_of(runs) for runs in zip(*(arm.measures for arm in arms), strict=False))


def silo_accuracies_of(arms: Sequence[FederatedArm]) -> tuple[Mapping[str, float], ...]:
    """By round the accuracy of each silo on its own validation data."""
    rounds = zip(*(arm.measures for arm in arms), strict=False)
    return tuple({silo: a for one in runs for silo, a in one.silo_accuracy.items()} for runs in rounds)


def _of(runs: Sequence[RoundMeasures]) -> Known:
    return {name: _OVER_RUNS[name](runs) if name in _OVER_RUNS else _mean(runs, name) for name in MEASURES}


def _mean(runs: Sequence[RoundMeasures], name: str) -> float | None:
    values = [value for one in runs if (value := getattr(one, name)) is not None]
    return statistics.fmean(values) if len(values) == len(runs) else None


def _seconds(runs: Sequence[RoundMeasures]) -> list[float]:
    return [seconds for one in runs for seconds in one.silo_seconds.values()]

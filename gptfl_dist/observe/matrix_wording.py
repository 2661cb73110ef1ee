"""The arms of a matrix and their figures as people read them, the same in tables, figures and captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median

from gptfl_dist.config.experiment import Group, Silos
from gptfl_dist.observe.matrix import Row, Spread
from gptfl_dist.observe.wording import UNKNOWN, duration, size

_SILOS = {"all": "all silos", "alone": "each silo alone", "pooled": "all data pooled"}


def silos_text(silos: Silos) -> str:
    """Who takes part, such as "10 silos a round"."""
    return f"{counted(silos, 'silo')} a round" if isinstance(silos, int) else _SILOS[silos]


def counted(number: int, what: str) -> str:
    """So many of something, such as "1 silo" and "2 silos"."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def arm_text(group: Group) -> str:
    """A group within its split, such as "fedprox from synthetic, 10 silos a round"."""
    silos = "" if group.silos == "all" else f", {silos_text(group.silos)}"
    return f"{group.strategy} from {group.start}{silos}"


def percent_text(spread: Spread) -> str:
    """Shares as "93.4 ± 0.5 %", for a single seed "93.4 %"."""
    return UNKNOWN if spread.mean is None else f"{_hundredths(spread, '.1f')} %"


def points_text(spread: Spread) -> str:
    """Differences of shares in percentage points, as "+1.2 ± 0.3", with a true minus sign."""
    return UNKNOWN if spread.mean is None else _hundredths(spread, "+.1f").replace("-", "\N{MINUS SIGN}")


def _hundredths(spread: Spread, form: str) -> str:
    assert spread.mean is not None
    return f"{spread.mean * 100:{form}}" + ("" if spread.sd is None else f" ± {spread.sd * 100:.1f}")


def median_reached(by_seed: Mapping[int, float | None]) -> float | None:
    """The median over the seeds that reached the target; None where none did."""
    reached = [value for value in by_seed.values() if value is not None]
    return median(reached) if reached else None


def to_target_text(by_seed: Mapping[int, float | None], word: Callable[[float], str]) -> str:
    """What the target cost: `word` says the median over the seeds that reached it, of how many if not of all."""
    typical = median_reached(by_seed)
    if typical is None:
        return "not reached" if by_seed else UNKNOWN
    reached = sum(value is not None for value in by_seed.values())
    return word(typical) + ("" if reached == len(by_seed) else f" ({reached} of {len(by_seed)} seeds)")


def rounds_text(rounds: float) -> str:
    """Rounds, of which a median may lie between two."""
    return f"{rounds:g}"


def table_of(rows: Sequence[Row], seeds: int) -> tuple[list[str], list[list[str]]]:
    """The table of a split, its head and a line for each row; `seeds` is how many each row should have."""
    alone = any(row.worst is not None for row in rows)
    head = ["Arm", "Accuracy", "Kept model", "Validation", *(["Worst silo"] if alone else []), "Start"]
    head += ["Rounds to the target", "Traffic to the target", "Difference (points)", "Seeds above"]
    return head, [_line(row, seeds, alone) for row in rows]


def _line(row: Row, seeds: int, alone: bool) -> list[str]:
    missing = "" if len(row.outcomes) == seeds else f" ({len(row.outcomes)} of {seeds} seeds)"
    cells = [arm_text(row.group) + missing, *map(percent_text, (row.accuracy, row.kept, row.validation))]
    if alone:
        cells.append(UNKNOWN if row.worst is None else percent_text(row.worst))
    cells.append(percent_text(row.start))
    cells.append(UNKNOWN if row.target is None else to_target_text(row.rounds_to_target, rounds_text))
    traffic = row.federated and row.target is not None
    cells.append(to_target_text(row.bytes_to_target, size) if traffic else UNKNOWN)
    if row.pairs is None:
        return [*cells, "baseline" if row.group == row.baseline else UNKNOWN, UNKNOWN]
    return [*cells, points_text(row.pairs), f"{row.above} of {len(row.pairs.values)}"]


def costs_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """What each row with some seeds cost, the mean over them: head and lines."""
    head = ["Arm", "Generation", "Pre-training", "Silos' training", "Traffic"]
    lines = []
    for row in rows:
        costs = [one.cost for one in row.outcomes.values()]
        if costs:
            times = ([getattr(cost, part) for cost in costs] for part in ("generate", "pretrain", "silos"))
            told = (UNKNOWN if None in each else duration(fmean(each)) for each in times)
            traffic = size(fmean(cost.bytes for cost in costs)) if row.federated else UNKNOWN
            lines.append([arm_text(row.group), *told, traffic])
    return head, lines


def hardware_text(rows: Sequence[Row]) -> str:
    """The coordinator's devices in all cells, each once, such as "generate: CPU, 2 threads"."""
    return "; ".join(dict.fromkeys(name for row in rows for one in row.outcomes.values() for name in one.cost.hardware))

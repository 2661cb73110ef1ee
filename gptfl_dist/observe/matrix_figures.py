"""The figures of a matrix's report, as SVG: the colour of a line is its strategy, its dashes are its start.

Starts from random weights are broken lines, all others whole ones, or nearly.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptfl_dist.config.experiment import Group
from gptfl_dist.observe.figures import FIGURE_STYLE, GRID, INK, as_svg, round_axis
from gptfl_dist.observe.matrix import Outcome, Row, Spread
from gptfl_dist.observe.matrix_wording import arm_text, median_reached, rounds_text, silos_text, to_target_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0067a8", "#c2500a", "#007a5a", "#a8477e", "#56b4e9", "#b8860b", "#1f2328", "#8c959f")
"""Told apart with every common form of colour blindness; after them they come again, with other marks."""

_MARKS = ("", "o", "s", "^")
_Dashes = tuple[int, tuple[float, ...]]
_WHOLE: tuple[_Dashes, ...] = ((0, ()), (0, (9, 1.2)), (0, (9, 1.2, 1, 1.2)))
_BROKEN: tuple[_Dashes, ...] = ((0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.5, 1, 1.5)))

PLAIN: dict[Any, object] = {**FIGURE_STYLE, "text.parse_math": False}


@dataclass(frozen=True, slots=True)
class Looks:
    """How arms look, the same in all figures of a report: colour and mark by strategy, dashes by start."""

    strategies: Mapping[str, tuple[str, str]]
    starts: Mapping[str, _Dashes]
    random_starts: frozenset[str]

    def colour(self, group: Group) -> str:
        return self.strategies[group.strategy][0]

    def line(self, group: Group) -> dict[str, Any]:
        colour, mark = self.strategies[group.strategy]
        return {"color": colour, "marker": mark, "ms": 4, "ls": self.starts[group.start], "lw": 1.9}


def looks_of(groups: Iterable[Group], random_starts: frozenset[str]) -> Looks:
    """Gives out colours and dashes in the order in which strategies and starts appear."""
    groups = list(groups)
    strategies = dict.fromkeys(group.strategy for group in groups)
    starts = dict.fromkeys(group.start for group in groups)
    colours = {
        name: (_COLOURS[index % len(_COLOURS)], _MARKS[index // len(_COLOURS) % len(_MARKS)])
        for index, name in enumerate(strategies)
    }
    dashes: dict[str, _Dashes] = {}
    for choice, names in (
        (_BROKEN, [name for name in starts if name in random_starts]),
        (_WHOLE, [name for name in starts if name not in random_starts]),
    ):
        dashes |= {name: choice[index % len(choice)] for index, name in enumerate(names)}
    return Looks(colours, dashes, random_starts)


def mean_curves(rows: Sequence[Row], looks: Looks) -> bytes:
    """Accuracy by round, mean and a band of one standard deviation over seeds; a panel for each way to take part."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.outcomes]
    panels = list(dict.fromkeys(row.group.silos for row in rows))
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / 2)
    with matplotlib.rc_context(PLAIN):
        figure = Figure(figsize=(10, 4.8 if lines == 1 else 3.7 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
        for place, (axes, silos) in enumerate(zip(grid, panels, strict=False)):
            for row in rows:
                if row.group.silos == silos:
                    _curve(axes, row, looks)
            if rows[0].target is not None:
                axes.axhline(rows[0].target * 100, color=INK, lw=1, ls=(0, (5, 4)), zorder=1)
            axes.set_title(silos_text(silos), fontsize=10, loc="left", fontweight="bold")
            axes.set_xlim(left=0)
            axes.grid(axis="y", color=GRID, lw=0.8)
            round_axis(axes)
            if place % columns == 0:
                axes.set_ylabel("accuracy on test data (%)")
        for axes in list(figure.axes)[len(panels) :]:
            axes.remove()
        low, high = figure.axes[0].get_ylim()
        figure.axes[0].set_ylim(max(low, 0), min(high, 101))
        legend(figure, [row.group for row in rows], looks)
        return as_svg(figure)


def _curve(axes: Axes, row: Row, looks: Looks) -> None:
    points = _over_seeds(list(row.outcomes.values()))
    means = [statistics.fmean(values) * 100 for values in points]
    axes.plot(range(len(means)), means, **looks.line(row.group), solid_capstyle="round")
    if len(row.outcomes) > 1:
        spreads = [statistics.stdev(values) * 100 for values in points]
        axes.fill_between(
            range(len(means)),
            [mean - sd for mean, sd in zip(means, spreads, strict=True)],
            [mean + sd for mean, sd in zip(means, spreads, strict=True)],
            color=looks.colour(row.group),
            alpha=0.15,
            lw=0,
        )


def _over_seeds(outcomes: Sequence[Outcome]) -> list[tuple[float, ...]]:
    """From round 0, the start, to the last that all seeds have: the accuracy of each seed."""
    return list(zip(*((one.start, *one.curve) for one in outcomes), strict=False))


def target_bars(rows: Sequence[Row], looks: Looks) -> bytes:
    """A bar for each arm, as long as it takes to the target: the median over seeds, which are the dots."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.outcomes]
    with matplotlib.rc_context(PLAIN):
        figure = Figure(figsize=(10, 0.9 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots()
        top = max((rounds for row in rows for rounds in row.rounds_to_target.values() if rounds), default=1)
        for place, row in enumerate(rows):
            colour = looks.colour(row.group)
            length = median_reached(row.rounds_to_target) or 0
            fill = "none" if row.group.start in looks.random_starts else colour
            axes.barh(place, length, height=0.62, facecolor=fill, edgecolor=colour, lw=1.4)
            reached = [rounds for rounds in row.rounds_to_target.values() if rounds is not None]
            axes.plot(reached, [place] * len(reached), "o", color="white", mec=colour, ms=5, zorder=3)
            text = to_target_text(row.rounds_to_target, rounds_text)
            axes.text(max([length, *reached]) + top * 0.02, place, text, va="center")
        axes.set_yticks(range(len(rows)), [arm_text(row.group) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, top * 1.25)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=GRID, lw=0.8)
        round_axis(axes)
        axes.set_xlabel("rounds to the target")
        return as_svg(figure)


def sweeps_of(rows: Sequence[Row], everyone: int | None) -> dict[Group, dict[int, Spread]]:
    """Final accuracy by the number of silos a round, of each start and strategy that was tried with several numbers.

    `everyone` is how many silos there are; where that is not known, arms of all silos are left out.
    """
    found: dict[Group, dict[int, Spread]] = {}
    for row in rows:
        number = row.group.silos if isinstance(row.group.silos, int) else everyone
        if row.federated and row.outcomes and number is not None:
            group = Group(row.group.split, row.group.start, row.group.strategy, "all")
            found.setdefault(group, {})[number] = row.accuracy
    return {group: dict(sorted(by_number.items())) for group, by_number in found.items() if len(by_number) > 1}


def sweep_lines(sweeps: Mapping[Group, Mapping[int, Spread]], looks: Looks) -> bytes:
    """Final accuracy against silos a round, a line for each start and strategy, with one standard deviation."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(PLAIN):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        axes = figure.subplots()
        for group, by_number in sweeps.items():
            axes.errorbar(
                list(by_number),
                [statistics.fmean(spread.values) * 100 for spread in by_number.values()],
                yerr=[(spread.sd or 0) * 100 for spread in by_number.values()],
                **{**looks.line(group), "marker": "o"},
                capsize=3,
                elinewidth=1,
            )
        numbers = sorted({number for by_number in sweeps.values() for number in by_number})
        axes.set_xscale("log")
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.minorticks_off()
        axes.set_xlabel("silos a round")
        axes.set_ylabel("accuracy on test data (%)")
        axes.grid(axis="y", color=GRID, lw=0.8)
        legend(figure, sweeps, looks)
        return as_svg(figure)


def legend(figure: Figure, shown: Iterable[Group], looks: Looks) -> None:
    """Above the panels: the colours of the strategies, then the dashes of the starts that are there."""
    from matplotlib.lines import Line2D

    shown = list(shown)
    strategies = {group.strategy: looks.strategies[group.strategy] for group in shown}
    starts = {group.start: looks.starts[group.start] for group in shown}
    keys = [Line2D([], [], color=c, marker=mark, ms=4, lw=3, label=name) for name, (c, mark) in strategies.items()]
    keys += [Line2D([], [], color=INK, ls=dashes, lw=1.6, label=f"from {name}") for name, dashes in starts.items()]
    figure.legend(handles=keys, loc="outside upper left", ncols=min(6, len(keys)), frameon=False, handlelength=3)

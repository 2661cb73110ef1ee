"""The figures of the report, drawn by matplotlib without a display and returned as SVG.

Only names of our own stand in them: labels and silos, whose names may need any font, are set in HTML by `report`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gptfl_dist.observe.summary import RoundRecord, Summary
from gptfl_dist.observe.wording import ARM_NAMES, kept_accuracy, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARM_COLOURS = {"synthetic_only": "#007a5a", "fedavg_random": "#c2500a", "gptfl": "#0067a8"}
"""Told apart with every common form of colour blindness and when printed in grey beside their labels."""

_DASHES = {"fedavg_random": (0, (4, 1.5)), "gptfl": (0, ())}
INK, GRID = "#1f2328", "#d8dee4"
FIGURE_STYLE: dict[Any, object] = {
    "font.size": 10,
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "path",
    "svg.hashsalt": "gptfl",
}


def learning_curves(summary: Summary) -> bytes:
    """Accuracy by round of every federated arm, with the target and the level of the synthetic data alone."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(10, 4.5))
        axes = figure.add_axes((0.06, 0.115, 0.63, 0.865))
        ends: list[tuple[float, str, str]] = []
        rounds = max((arm.rounds for arm in summary.arms.federated.values()), default=0)
        for name, arm in summary.arms.federated.items():
            start = arm.start_accuracy if summary.curve_of == "test" else None
            values = [_percent(value) for value in ([start] if start is not None else []) + arm.curve]
            first = 0 if start is not None else 1
            colour = ARM_COLOURS[name]
            axes.plot(range(first, first + len(values)), values, color=colour, lw=2.2, solid_capstyle="round")
            if values and first <= arm.best_round:
                kept = values[arm.best_round - first]
                axes.plot(arm.best_round, kept, "o", color=colour, mec="white", ms=8, zorder=4)
            last = next((value for value in reversed(values) if not math.isnan(value)), None)
            if last is not None:
                ends.append((last, f"{ARM_NAMES[name]}, {last:.1f} %", colour))
        synthetic = summary.arms.synthetic_only
        level = kept_accuracy(summary, synthetic) if synthetic is not None else None
        if level is not None:
            colour = ARM_COLOURS["synthetic_only"]
            axes.axhline(_percent(level), color=colour, lw=1.6, zorder=1)
            ends.append((_percent(level), f"{ARM_NAMES['synthetic_only']}, {percent(level)}", colour))
        if summary.target_accuracy is not None:
            target = _percent(summary.target_accuracy)
            axes.axhline(target, color=INK, lw=1.2, ls=(0, (5, 4)), zorder=1)
            ends.append((target, f"Target, {target:.1f} %", INK))
        axes.set_xlim(0, max(1, rounds) * 1.01)
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0), min(high, 101))
        round_axis(axes)
        axes.set_ylabel(f"accuracy on {summary.curve_of} data (%)")
        axes.grid(axis="y", color=GRID, lw=0.8)
        _label_ends(axes, ends)
        return as_svg(figure)


def costs(rounds: Mapping[str, Sequence[RoundRecord]]) -> bytes:
    """Three panels by round: bytes to the silos, bytes from the silos, seconds; a line an arm."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(10, 2.9))
        panels = figure.subplots(1, 3)
        series: tuple[tuple[str, Callable[[RoundRecord], float]], ...] = (
            ("MB to the silos", lambda record: record.bytes_down / 1e6),
            ("MB from the silos", lambda record: record.bytes_up / 1e6),
            ("Seconds", lambda record: record.seconds),
        )
        for axes, (title, value) in zip(panels, series, strict=True):
            top = 0.0
            for name, records in rounds.items():
                values = [value(record) for record in records]
                top = max([top, *values])
                axes.plot(
                    [record.round for record in records],
                    values,
                    color=ARM_COLOURS[name],
                    ls=_DASHES[name],
                    lw=2,
                    # Arms of one model cost the same bytes: the dashed one is drawn above, so that both are seen.
                    zorder=3 if name == "fedavg_random" else 2,
                    label=ARM_NAMES[name],
                )
            axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
            axes.set_ylim(0, top * 1.15 or 1)
            axes.set_xlim(left=0)
            axes.grid(axis="y", color=GRID, lw=0.8)
            round_axis(axes)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="upper left", ncols=2, frameon=False, bbox_to_anchor=(0.035, 1.0))
        figure.subplots_adjust(left=0.055, right=0.99, top=0.77, bottom=0.18, wspace=0.24)
        return as_svg(figure)


def spread(places: Sequence[float], gap: float, top: float) -> list[float]:
    """Places as near as possible to the given ones, in the same order, at least `gap` apart, none above `top`."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    # Groups of touching places, each of which is centred on the mean of what its members wanted.
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _lower(groups[-1], places, gap) - _upper(groups[-2], places, gap) < gap:
            last = groups.pop()
            groups[-1] += last
    result = [0.0] * len(places)
    for group in groups:
        for step, index in enumerate(group):
            result[index] = _lower(group, places, gap) + step * gap
    for index in reversed(order):
        result[index] = min(result[index], top)
        top = result[index] - gap
    return result


def _lower(group: Sequence[int], places: Sequence[float], gap: float) -> float:
    return sum(places[index] for index in group) / len(group) - gap * (len(group) - 1) / 2


def _upper(group: Sequence[int], places: Sequence[float], gap: float) -> float:
    return _lower(group, places, gap) + gap * (len(group) - 1)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name each line right of the axes at its own height, a hair line leading there where labels had to move."""
    low, high = axes.get_ylim()
    heights = spread([(value - low) / (high - low) for value, _, _ in ends], gap=0.062, top=0.97)
    for (value, text, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            text,
            xy=(1, (value - low) / (high - low)),
            xytext=(1.035, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)},
        )


def round_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("round")


def _percent(value: float | None) -> float:
    return math.nan if value is None else value * 100


def as_svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()

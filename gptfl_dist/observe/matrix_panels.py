"""Figures of a matrix's report that show several measures by round, a panel each; lines are those of `Looks`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from gptfl_dist.observe.figures import GRID, as_svg, round_axis
from gptfl_dist.observe.matrix import Row
from gptfl_dist.observe.matrix_figures import PLAIN, Looks, legend

AGREEMENT = {
    "diversity": "gradient diversity",
    "log_n_diversity": "log(n x gradient diversity)",
    "mean_cosine": "mean cosine of two updates",
    "mean_norm": "mean norm of an update",
}
"""How far the silos' updates agree."""

QUALITY = {
    "worst_silo_accuracy": "accuracy at the worst silo (%)",
    "macro_f1": "macro-F1 on test data",
    "calibration_error": "calibration error on test data",
    "loss": "loss on test data",
}
"""How good the weights are, beside accuracy."""

_IN_PERCENT = "worst_silo_accuracy"
"""As accuracy is in all other figures."""


def known_panels(rows: Sequence[Row], panels: Mapping[str, str]) -> dict[str, str]:
    """Those of the measures that some row knows in more than one round."""
    return {name: title for name, title in panels.items() if any(len(_points(row, name)) > 1 for row in rows)}


def measure_panels(rows: Sequence[Row], panels: Mapping[str, str], looks: Looks) -> bytes:
    """The mean over seeds and a band of one standard deviation, as far as all seeds know the measure."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(PLAIN):
        lines = -(-len(panels) // 2)
        figure = Figure(figsize=(10, 0.9 + 2.9 * lines), layout="constrained")
        grid = figure.subplots(lines, 2, squeeze=False).flat
        for axes, (name, title) in zip(grid, panels.items(), strict=False):
            for row in rows:
                points = _points(row, name)
                means = [statistics.fmean(values) for values in points.values()]
                axes.plot(list(points), means, **looks.line(row.group), solid_capstyle="round")
                if len(row.outcomes) > 1:
                    spreads = [statistics.stdev(values) for values in points.values()]
                    low, high = (
                        [mean + sign * sd for mean, sd in zip(means, spreads, strict=True)] for sign in (-1, 1)
                    )
                    axes.fill_between(list(points), low, high, color=looks.colour(row.group), alpha=0.15, lw=0)
            axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
            axes.set_xlim(left=0)
            axes.grid(axis="y", color=GRID, lw=0.8)
            round_axis(axes)
        for axes in list(figure.axes)[len(panels) :]:
            axes.remove()
        legend(figure, [row.group for row in rows], looks)
        return as_svg(figure)


def _points(row: Row, name: str) -> dict[int, list[float]]:
    """By round the values of all seeds as they are drawn, of the rounds in which each knows one."""
    found: dict[int, list[float]] = {}
    scale = 100 if name == _IN_PERCENT else 1
    for round_, seeds in enumerate(zip(*(one.measures for one in row.outcomes.values()), strict=False)):
        values = [value for measures in seeds if (value := measures[name]) is not None]
        if values and len(values) == len(seeds):
            found[round_] = [value * scale for value in values]
    return found

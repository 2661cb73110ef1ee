"""The result of a run as the table that a person sees at the end of it."""

from __future__ import annotations

import sys
from typing import TextIO

from gptfl_dist.observe.summary import FederatedArm, Summary
from gptfl_dist.observe.wording import (
    ARM_NAMES,
    UNKNOWN,
    duration,
    headline,
    kept_accuracy,
    percent,
    rounds_to_target_text,
    size,
    stop_texts,
)

_HEADINGS = ("arm", "accuracy", "rounds to target", "down", "up", "seconds a round")


def print_table(summary: Summary, stream: TextIO | None = None) -> None:
    """Print the arms and the seconds by stage to `stream` (stdout if not given): boxed on a terminal, else plain."""
    stream = stream or sys.stdout
    if stream.isatty():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        console = Console(file=stream)
        table = Table(box=SIMPLE_HEAD)
        rows = _rows(summary)
        for number, heading in enumerate(_HEADINGS):
            if number:  # names may be broken where it is narrow, numbers never
                widest = max((len(row[number]) for row in rows), default=0)
                table.add_column(heading, justify="right", min_width=widest, overflow="fold")
            else:
                table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for line in _below(summary):
            console.print(line, markup=False, highlight=False)
    else:
        rows = [list(_HEADINGS), *_rows(summary)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
        for name, *cells in rows:
            print("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]), file=stream)
        print(*_below(summary), sep="\n", file=stream)


def _rows(summary: Summary) -> list[list[str]]:
    rows = []
    if (synthetic := summary.arms.synthetic_only) is not None:
        rows.append([ARM_NAMES["synthetic_only"], percent(kept_accuracy(summary, synthetic)), *[UNKNOWN] * 4])
    rows += [[ARM_NAMES[name], *_cells(summary, arm)] for name, arm in summary.arms.federated.items()]
    return rows


def _cells(summary: Summary, arm: FederatedArm) -> list[str]:
    return [
        percent(kept_accuracy(summary, arm)),
        rounds_to_target_text(summary, arm),
        size(arm.bytes_down),
        size(arm.bytes_up),
        f"{arm.seconds_per_round:.1f}",
    ]


def _below(summary: Summary) -> list[str]:
    lines = [f"Accuracy on {summary.curve_of} data, of each arm's best model on validation data."]
    if summary.target_accuracy is not None:
        lines.append(f"Target: {percent(summary.target_accuracy)}, the best that FedAvg from random weights reaches.")
    lines += stop_texts(summary)
    if summary.seconds:
        stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in summary.seconds.items())
        lines.append(f"Time: {stages}.")
    return [*lines, headline(summary)]

"""A matrix for programs and for papers: CSV, JSON, LaTeX.

Accuracies are shares between 0 and 1, with all their digits; LaTeX has what the page has. Everything stands in the
order of the experiment file, and nothing tells when or where it ran: the same outcomes give the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptfl_dist.config.experiment import Group
from gptfl_dist.observe.matrix import Outcome, Row, Spread
from gptfl_dist.observe.matrix_measures import MEASURES, Known
from gptfl_dist.observe.matrix_wording import median_reached, table_of

RowsBySplit = Mapping[str, Sequence[Row]]

_GROUP = ("split", "start", "strategy", "silos")
_RESULTS = (
    *("seed", "start_accuracy", "final_accuracy", "kept_accuracy", "validation_accuracy", "worst_alone_accuracy"),
    *("rounds", "bytes_a_round", "rounds_to_target", "bytes_to_target", "difference_to_baseline"),
    *("generate_device_seconds", "pretrain_device_seconds", "silo_seconds", "bytes"),
)

_LATEX = {
    **{ord(character): f"\\{character}" for character in "&%$#_{}"},
    ord("\\"): r"\textbackslash{}",
    ord("~"): r"\textasciitilde{}",
    ord("^"): r"\textasciicircum{}",
    ord("<"): r"\textless{}",
    ord(">"): r"\textgreater{}",
    ord("|"): r"\textbar{}",
    ord("±"): r"$\pm$",
    ord("\N{MINUS SIGN}"): "$-$",
}


def results_csv(rows: RowsBySplit) -> str:
    """A line for each group and seed; what there is not, or was not reached, is empty."""
    lines = []
    for row in _all(rows):
        for seed, one in row.outcomes.items():
            worst = None if row.worst is None else one.worst
            accuracies = (one.start, one.final, one.kept, one.validation, worst)
            reached = (row.rounds_to_target[seed], row.bytes_to_target[seed])
            difference = None if row.pairs is None else row.pairs.by_seed.get(seed)
            rounds = (len(one.curve), one.bytes_a_round if row.federated else None)
            costs = list(_cost(row, one).values())[:4]
            lines.append((*_group(row.group).values(), seed, *accuracies, *rounds, *reached, difference, *costs))
    return _csv((*_GROUP, *_RESULTS), lines)


def rounds_csv(rows: RowsBySplit) -> str:
    """A line for each group, seed and round; round 0 is the start."""
    lines = [
        (*_group(row.group).values(), seed, number, accuracy, *measures.values())
        for row in _all(rows)
        for seed, one in row.outcomes.items()
        for number, (accuracy, measures) in enumerate(_rounds(one))
    ]
    return _csv((*_GROUP, "seed", "round", "accuracy", *MEASURES), lines)


def _rounds(one: Outcome) -> Iterable[tuple[float, Known]]:
    """Accuracy and the other measures, from round 0 on."""
    return zip((one.start, *one.curve), one.measures, strict=True)


def _cost(row: Row, one: Outcome) -> dict[str, Any]:
    """What a cell cost, in the order of columns."""
    return {
        "generate_device_seconds": one.cost.generate,
        "pretrain_device_seconds": one.cost.pretrain,
        "silo_seconds": one.cost.silos,
        "bytes": one.cost.bytes if row.federated else None,
        "hardware": list(one.cost.hardware),
    }


def _all(rows: RowsBySplit) -> Iterable[Row]:
    return (row for each in rows.values() for row in each)


def _csv(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return text.getvalue()


def results_json(name: str, seeds: Sequence[int], rows: RowsBySplit, failures: Mapping[str, str]) -> str:
    """Everything: for each split its target and its baseline, and which arm from other weights is best on validation
    data; for each arm figures over seeds, and its cells by seed."""
    splits = [
        {
            "split": split,
            "target": next((row.target for row in each), None),
            "baseline": next((_group(row.baseline) for row in each if row.baseline is not None), None),
            "chosen": next((_group(row.chosen) for row in each if row.chosen is not None), None),
            "arms": [_arm(row) for row in each],
        }
        for split, each in rows.items()
    ]
    whole = {"experiment": name, "seeds": list(seeds), "splits": splits, "failures": dict(failures)}
    return json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _arm(row: Row) -> dict[str, Any]:
    return {
        **_group(row.group),
        "final_accuracy": _spread(row.accuracy),
        "kept_accuracy": _spread(row.kept),
        "validation_accuracy": _spread(row.validation),
        "worst_alone_accuracy": None if row.worst is None else _spread(row.worst),
        "start_accuracy": _spread(row.start),
        "median_rounds_to_target": median_reached(row.rounds_to_target),
        "median_bytes_to_target": median_reached(row.bytes_to_target),
        "seeds_at_target": sum(rounds is not None for rounds in row.rounds_to_target.values()),
        "difference_to_baseline": None if row.pairs is None else _spread(row.pairs),
        "seeds_above_baseline": row.above,
        "cells": [
            {
                "seed": seed,
                "start_accuracy": one.start,
                "curve": list(one.curve),
                "kept_accuracy": one.kept,
                "validation_accuracy": one.validation,
                "worst_alone_accuracy": None if row.worst is None else one.worst,
                "bytes_a_round": one.bytes_a_round if row.federated else None,
                "rounds_to_target": row.rounds_to_target[seed],
                "bytes_to_target": row.bytes_to_target[seed],
                "difference_to_baseline": None if row.pairs is None else row.pairs.by_seed.get(seed),
                "cost": _cost(row, one),
                "rounds": [
                    {**measures, "silo_accuracy": dict(silos)}
                    for measures, silos in zip(one.measures, one.silo_accuracy, strict=True)
                ],
            }
            for seed, one in row.outcomes.items()
        ],
    }


def _group(group: Group) -> dict[str, Any]:
    return {name: getattr(group, name) for name in _GROUP}


def _spread(spread: Spread) -> dict[str, float | None]:
    return {"mean": spread.mean, "sd": spread.sd}


def table_tex(name: str, seeds: Sequence[int], rows: RowsBySplit) -> str:
    """A table for each split."""
    tables = (_table_tex(name, split, *table_of(each, len(seeds))) for split, each in rows.items())
    return "% Needs \\usepackage{booktabs}.\n" + "\n".join(tables)


def _table_tex(name: str, split: str, head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    caption = (
        f"{name}, {split}: mean and standard deviation over seeds; rounds and traffic to the target are the median "
        "over the seeds that reach it; the difference is to the best federated arm from random weights, in points."
    )
    return "\n".join(
        [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{escape_latex(caption)}}}",
            f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            "\\toprule",
            _line_tex(head),
            "\\midrule",
            *map(_line_tex, body),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
            "",
        ]
    )


def _line_tex(cells: Sequence[str]) -> str:
    return " & ".join(map(escape_latex, cells)) + r" \\"


def escape_latex(text: str) -> str:
    """The text as LaTeX sets it: nothing in it is a command."""
    return text.translate(_LATEX)

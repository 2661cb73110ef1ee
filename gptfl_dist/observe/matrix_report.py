"""The report of an experiment: a page for people, and the same numbers as CSV, JSON and LaTeX.

Every text from outside (names, labels, what a cell failed with, the experiment file) is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from gptfl_dist.config.experiment import Group
from gptfl_dist.files import write_file
from gptfl_dist.observe.matrix import Row
from gptfl_dist.observe.matrix_figures import Looks, looks_of, mean_curves, sweep_lines, sweeps_of, target_bars
from gptfl_dist.observe.matrix_files import results_csv, results_json, rounds_csv, table_tex
from gptfl_dist.observe.matrix_panels import AGREEMENT, QUALITY, known_panels, measure_panels
from gptfl_dist.observe.matrix_wording import (
    arm_text,
    costs_table,
    counted,
    hardware_text,
    median_reached,
    percent_text,
    points_text,
    rounds_text,
    silos_text,
    table_of,
    to_target_text,
)
from gptfl_dist.observe.page import figure, page, section, table
from gptfl_dist.observe.silos_by_label import silos_by_label
from gptfl_dist.observe.wording import UNKNOWN, percent

REPORT = "report.html"
RESULTS_CSV, ROUNDS_CSV, RESULTS_JSON, TABLE_TEX = "results.csv", "rounds.csv", "results.json", "table.tex"

_SVG = "image/svg+xml"
_AGREEMENT_NOTE = (
    "Gradient diversity is 1/n for n equal updates, 1 for orthogonal ones, more for updates that work against each "
    "other; log(n x diversity) is 0 for equal ones whatever n. The mean over seeds; a band is one standard deviation."
)
_QUALITY_NOTE = (
    "The worst silo is that on whose own validation data the weights after the round do worst. The calibration error "
    "is the mean distance between how sure the model is and how often it is right. Round 0 is the start."
)


@dataclass(frozen=True)
class Tuned:
    """How a group's point of the grid was chosen.

    `points` say what each sets, `rounds` how long the trial of each is, `scores` are their accuracies on validation
    data, None where a trial failed or told none, and `chosen` is the place of the one that was taken, None where every
    trial failed.
    """

    points: Sequence[str]
    rounds: Sequence[int]
    scores: Sequence[float | None]
    chosen: int | None


@dataclass(frozen=True)
class Matrix:
    """What an experiment came to.

    `rows` are those of each split, as `rows_of` makes them, and `random_starts` the starts that it was told of; `seeds`
    those that each row should have. `counts[split][silo][i]` are the samples of label i at a silo for the first seed,
    training and validation together. `tuning` has the groups that had a choice. `failures` say by cell and by trial
    what stopped it; `settings_text` is the experiment file.
    """

    name: str
    rows: Mapping[str, Sequence[Row]]
    random_starts: frozenset[str]
    seeds: Sequence[int]
    labels: Sequence[str]
    counts: Mapping[str, Mapping[str, Sequence[int]]]
    tuning: Mapping[Group, Tuned]
    failures: Mapping[str, str]
    settings_text: str


def write_matrix_report(folder: Path, matrix: Matrix) -> Path:
    """Writes the page and the files beside it, each whole or not at all; returns the page's path. Raises StorageError.

    The page is the last: where it is new, all are.
    """
    contents = {
        RESULTS_CSV: results_csv(matrix.rows),
        ROUNDS_CSV: rounds_csv(matrix.rows),
        RESULTS_JSON: results_json(matrix.name, matrix.seeds, matrix.rows, matrix.failures),
        TABLE_TEX: table_tex(matrix.name, matrix.seeds, matrix.rows),
        REPORT: _page(matrix),
    }
    for name, content in contents.items():
        write_file(folder / name, content)
    return folder / REPORT


def _page(matrix: Matrix) -> str:
    looks = looks_of((row.group for rows in matrix.rows.values() for row in rows), matrix.random_starts)
    parts = [
        *(_split(matrix, split, rows, looks) for split, rows in matrix.rows.items()),
        _tuning(matrix) if matrix.tuning else "",
        _failures(matrix.failures) if matrix.failures else "",
        section("settings", "Experiment file", f"<pre>{escape(matrix.settings_text)}</pre>"),
    ]
    arms = sum(map(len, matrix.rows.values()))
    seeds = ", ".join(map(str, matrix.seeds))
    facts = f"{counted(len(matrix.rows), 'split')} · {counted(arms, 'arm')} · seeds {seeds} · accuracy on test data"
    kicker = f"Experiment <b>{escape(matrix.name)}</b>"
    return page(f"{matrix.name}: experiment report", kicker, _headline(matrix), facts, parts)


def _headline(matrix: Matrix) -> str:
    """The result in a few sentences, as it came out, good or bad; of several splits, what the first came to."""
    compared = [
        row.pairs.mean
        for rows in matrix.rows.values()
        for row in rows
        if row.federated and row.group.start not in matrix.random_starts and row.pairs is not None
    ]
    if not compared:
        return f"The experiment {matrix.name} has no arm to compare with one from random weights."
    above = sum(mean is not None and mean > 0 for mean in compared)
    arms = counted(len(compared), "federated arm")
    end = "ends" if above == 1 else "end"
    return (
        f"Of {arms} from other than random weights, {above} {end} above the best from random weights, "
        "in the mean over seeds. "
    ) + _chosen(next(iter(matrix.rows.values())))


def _chosen(rows: Sequence[Row]) -> str:
    """What the arm that validation data chose comes to, against the best from random weights; nothing without them."""
    for row in rows:
        if row.group == row.chosen and row.pairs is not None and row.baseline is not None:
            return (
                f"On split {row.group.split}, validation data choose {arm_text(row.group)}: "
                f"{percent_text(row.accuracy)}, {points_text(row.pairs)} points to {arm_text(row.baseline)}, whose end "
                f"it {_reaches(row)}."
            )
    return ""


def _reaches(row: Row) -> str:
    """Whether and when an arm is as good as the best from random weights ends."""
    rounds = counted(max(len(one.curve) for one in row.outcomes.values()), "round")
    if median_reached(row.rounds_to_target) is None:
        return f"does not reach in {rounds}"
    return f"reaches in {to_target_text(row.rounds_to_target, lambda typical: f'{rounds_text(typical)} of {rounds}')}"


def _split(matrix: Matrix, split: str, rows: Sequence[Row], looks: Looks) -> str:
    head, body = table_of(rows, len(matrix.seeds))
    chips = (f'<span class="chip" style="background:{looks.colour(row.group)}"></span>' for row in rows)
    cells = [
        [chip + escape(arm), f"<b>{accuracy}</b>", *map(escape, rest)]
        for chip, (arm, accuracy, *rest) in zip(chips, body, strict=True)
    ]
    said = [f"<p>{escape(chosen)}</p>"] if (chosen := _chosen(rows)) else []
    content = [*said, table(head, cells, "numbers"), f'<p class="note">{_notes(rows)}</p>']
    if any(row.outcomes for row in rows):
        content += ["<h3>Learning curves</h3>", _curves(rows, looks)]
        if rows[0].target is not None:
            content += ["<h3>Rounds to the target</h3>", _bars(rows, looks)]
        content += [*_panels(rows, looks), "<h3>What it costs</h3>", _costs(rows)]
    counts = matrix.counts.get(split, {})
    if sweeps := sweeps_of(rows, len(counts) or None):
        ends = "; ".join(
            f"{arm_text(group)}: "
            + ", ".join(f"{counted(number, 'silo')} {percent_text(one)}" for number, one in each.items())
            for group, each in sweeps.items()
        )
        caption = "Accuracy after the last round by the number of silos a round; a bar is one standard deviation."
        drawn = figure(_SVG, sweep_lines(sweeps, looks), f"Line chart. {caption} {ends}.", caption)
        content += ["<h3>How many silos a round</h3>", drawn]
    if counts:
        content += [f"<h3>Private data by silo, seed {matrix.seeds[0]}</h3>", silos_by_label(matrix.labels, counts)]
    return section(f"split-{escape(split)}", f"Split {escape(split)}", *content)


def _notes(rows: Sequence[Row]) -> str:
    notes = [
        "Mean and standard deviation over seeds. Accuracy is that after the last round, and so is that on the silos' "
        f"validation data; the kept model is {_kept(rows)}; the start is the model before any silo trained it, "
        "which for synthetic starts is the model of the synthetic data alone."
    ]
    personal = [row.group for row in rows if any(one.personal for one in row.outcomes.values())]
    notes += [
        f"The validation accuracy of {escape(arm_text(group))} is that of the silos' personal models, so that it is "
        "not among those that validation data choose from."
        for group in personal
    ]
    if rows[0].target is not None and rows[0].baseline is not None:
        notes.append(
            f"The target, {percent(rows[0].target)}, is what {escape(arm_text(rows[0].baseline))} ends at in the mean, "
            "the best federated arm from random weights. Rounds and traffic to it are the median over the seeds that "
            "reach it. The difference to this baseline is by seed, in percentage points."
        )
    return " ".join(notes)


def _kept(rows: Sequence[Row]) -> str:
    """What the kept model is the best on: the silos' validation data, of which the note has just spoken, or others."""
    arms = {row.group: {one.kept_by for one in row.outcomes.values()} for row in rows if row.outcomes}
    judged = [escape(arm_text(group)) for group, by in arms.items() if by == {"synthetic"}]
    if not judged:
        return "the best on these"
    synthetic = "the best on held-out synthetic data"
    return synthetic if len(judged) == len(arms) else f"the best on these, but of {', '.join(judged)} {synthetic}"


def _curves(rows: Sequence[Row], looks: Looks) -> str:
    caption = (
        "The mean over seeds, as far as all of them went; a band is one standard deviation. Round 0 is the start, "
        "before any silo trained."
    )
    if rows[0].target is not None:
        caption += " The dashed level is the target."
    ends = "; ".join(f"{arm_text(row.group)} ends at {percent_text(row.accuracy)}" for row in rows if row.outcomes)
    return figure(_SVG, mean_curves(rows, looks), f"Line chart of accuracy on test data by round. {ends}.", caption)


def _bars(rows: Sequence[Row], looks: Looks) -> str:
    caption = "The median over the seeds that reach the target; a dot is a seed. Hollow bars start from random weights."
    ends = "; ".join(
        f"{arm_text(row.group)}: {to_target_text(row.rounds_to_target, rounds_text)}" for row in rows if row.outcomes
    )
    return figure(_SVG, target_bars(rows, looks), f"Bar chart of rounds to the target. {ends}.", caption)


def _panels(rows: Sequence[Row], looks: Looks) -> list[str]:
    """The measures of rounds, of the arms that have some: a figure for each way to take part, as arms of one strategy
    and start look alike."""
    federated = [row for row in rows if row.federated and row.outcomes]
    content = []
    for title, panels, note in (
        ("How far the silos' updates agree", AGREEMENT, _AGREEMENT_NOTE),
        ("Beside accuracy", QUALITY, _QUALITY_NOTE),
    ):
        figures = []
        for silos in dict.fromkeys(row.group.silos for row in federated):
            shown = [row for row in federated if row.group.silos == silos]
            if known := known_panels(shown, panels):
                alt = f"Line charts by round, {silos_text(silos)}: {', '.join(known.values())}. {note}"
                figures.append(figure(_SVG, measure_panels(shown, known, looks), alt, silos_text(silos).capitalize()))
        if figures:
            content += [f"<h3>{title}</h3>", *figures, f'<p class="note">{note}</p>']
    return content


def _costs(rows: Sequence[Row]) -> str:
    head, body = costs_table(rows)
    note = (
        "The mean over seeds. Generation and pre-training are the time of all the coordinator's devices together, once "
        "for all arms of a start; the silos' training is the sum over silos and rounds, as they tell it; traffic is of "
        "all rounds in both directions."
    )
    devices = hardware_text(rows)
    if devices:
        note += f" The coordinator's devices were {devices}."
    return table(head, [[*map(escape, line)] for line in body], "numbers") + f'<p class="note">{escape(note)}</p>'


def _tuning(matrix: Matrix) -> str:
    """A table for each grid, for strategies may have their own."""
    grids: dict[tuple[str, ...], list[Group]] = {}
    for group, tuned in matrix.tuning.items():
        grids.setdefault(tuple(tuned.points), []).append(group)
    tables = []
    for points, groups in grids.items():
        rows = []
        for group in groups:
            tuned = matrix.tuning[group]
            scores = [
                f'<b class="chosen">{percent(score)} ✓</b>' if place == tuned.chosen else percent(score)
                for place, score in enumerate(tuned.scores)
            ]
            rows.append([f"{escape(group.split)}: {escape(arm_text(group))}", _rounds(tuned), *scores])
        tables.append(table(["Arm", "Rounds", *map(escape, points)], rows, "numbers"))
    budgets = sorted({len(points) for points in grids})
    note = (
        f"Every arm was tuned with the same budget: {budgets[0]} points, each a federation on seed "
        f"{matrix.seeds[0]}, of so many rounds as the table says."
        if len(budgets) == 1
        else f"The arms were tuned with different budgets: {' and '.join(map(str, budgets))} points."
    )
    note += " Accuracy on validation data after its last round; ✓ marks the point that was chosen, of equal ones "
    note += "the one that was ahead in the round before."
    if any(None in tuned.scores for tuned in matrix.tuning.values()):
        note += f" {UNKNOWN} stands for a trial that failed or told none, whose point is out."
    return section("tuning", "How each arm was tuned", *tables, f'<p class="note">{note}</p>')


def _rounds(tuned: Tuned) -> str:
    """How long the trials of a group are, of which a point may set another number."""
    least, most = min(tuned.rounds), max(tuned.rounds)
    return str(most) if least == most else f"{least} to {most}"


def _failures(failures: Mapping[str, str]) -> str:
    rows = [[escape(cell), escape(why)] for cell, why in failures.items()]
    return section("failures", "What failed", table(["Federation", "Why"], rows))

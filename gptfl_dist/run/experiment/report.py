"""The report of an experiment, from what its cells came to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptfl_dist.observe.matrix import rows_of
from gptfl_dist.observe.matrix_report import Matrix, Tuned, write_matrix_report
from gptfl_dist.run.experiment.data import COUNTS
from gptfl_dist.run.experiment.plan import grid_of, point_text, trial_rounds_of
from gptfl_dist.run.experiment.run import Experiment, why_it_failed


def report(experiment: Experiment, settings_text: str) -> Path:
    """Writes the report into the experiment's folder; returns the folder. Raises StorageError."""
    file = experiment.file
    random_starts = frozenset(name for name, start in file.starts.items() if start.random)
    splits = dict.fromkeys(group.split for group in experiment.outcomes)
    counts: dict[str, Mapping[str, Sequence[int]]] = {
        split: json.loads((file.folder / "splits" / split / f"seed-{file.seeds[0]}" / COUNTS).read_text())
        for split in splits
    }
    rows = rows_of(experiment.outcomes, random_starts)
    matrix = Matrix(
        name=file.name,
        rows={split: [row for row in rows if row.group.split == split] for split in splits},
        random_starts=random_starts,
        seeds=file.seeds,
        labels=file.labels,
        counts=counts,
        tuning={
            group: Tuned(
                points=[point_text(point) for point in grid_of(file, group)],
                rounds=trial_rounds_of(file, group),
                scores=scores,
                chosen=experiment.points.get(group),
            )
            for group, scores in experiment.trials.items()
            if scores
        },
        failures={str(cell): why_it_failed(file, cell, error) for cell, error in experiment.failures.items()},
        settings_text=settings_text,
    )
    write_matrix_report(file.folder, matrix)
    return file.folder

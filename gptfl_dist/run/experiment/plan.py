"""From the experiment file to its cells, and from a cell to the settings of its federation file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from gptfl_dist.aggregation.rules import rule_of
from gptfl_dist.config.document import Document, laid_over
from gptfl_dist.config.experiment import ExperimentFile, Group, Settings
from gptfl_dist.config.federation import Federation, FederationFile
from gptfl_dist.config.load import federation_of
from gptfl_dist.errors import ConfigError

_MANY = 100
"""Silos of a split by key or more, of which only the data tell how many there are."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One federation of a group, or where `trial` is a number, a short one that tries this point of the grid."""

    group: Group
    seed: int
    trial: int | None = None

    @property
    def path(self) -> PurePosixPath:
        return self.group.path / (f"seed-{self.seed}" if self.trial is None else f"trial-{self.trial + 1}")

    def __str__(self) -> str:
        return str(self.path)


def groups_of(file: ExperimentFile) -> list[Group]:
    """All groups in the order of the file, each once."""
    found = (
        Group(*combination)
        for block in file.cells
        for combination in itertools.product(block.splits, block.starts, block.strategies, block.silos)
    )
    return list(dict.fromkeys(found))


def grid_of(file: ExperimentFile, group: Group) -> list[Settings]:
    """The points that are tried for a group."""
    return file.strategies[group.strategy].grid or file.tuning.grid


def point_text(point: Settings) -> str:
    """What a point of the grid sets, such as "training.learning_rate 0.1, training.epochs 2"."""
    return ", ".join(_texts(point)) or "no change"


def _texts(settings: Mapping[str, Any], section: str = "") -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{section}{name}.")
        else:
            yield f"{section}{name} {json.dumps(value, ensure_ascii=False)}"


def trials_of(file: ExperimentFile, group: Group) -> list[Cell]:
    """The trials of a group; none where there is nothing to choose from."""
    points = len(grid_of(file, group))
    return [Cell(group, file.seeds[0], trial) for trial in range(points)] if points > 1 else []


def cells_of(file: ExperimentFile, group: Group) -> list[Cell]:
    """The cells of a group that count."""
    return [Cell(group, seed) for seed in file.seeds]


def settings_of(file: ExperimentFile, cell: Cell, point: int, silos: list[dict[str, Any]]) -> Settings:
    """The federation file of a cell: `point` is the chosen place in the grid, `silos` its entries of silos.

    Paths are for the cell to fill in: run_folder, test_data, synthesis.folder. Raises ConfigError where a trial could
    tell nothing.
    """
    group, start = cell.group, file.starts[cell.group.start]
    settings = _laid_over(file, group, point)
    # Nobody is late in a process in which silos train in turn.
    rules: Settings = {"cohort": group.silos if isinstance(group.silos, int) else "all", "deadline": "30d"}
    if cell.trial is not None:
        rounds = _trial_rounds(file, settings)
        if rounds == 1 and settings.get("training", {}).get("first_round") == "means":
            raise ConfigError(
                f"cells/{cell}: trials are of 1 round, in which silos send class means and nobody trains, so that no "
                "point is better than another",
                hint="raise tuning.rounds to 2 or more, and federation.rounds where a strategy has a single one",
            )
        # All points are compared after as many rounds.
        rules |= {"rounds": rounds, "max_time": None, "target_accuracy": None, "patience": None, "diversity": False}
    return overlaid(
        settings,
        {
            "name": file.name,
            "seed": cell.seed,
            "labels": file.labels,
            "arms": [start.federated_arm],
            "federation": rules,
            "silos": silos,
        },
    )


def federation_file_of(
    file: ExperimentFile,
    document: Document,
    cell: Cell,
    point: int,
    silos: list[dict[str, Any]],
    places: Settings,
) -> FederationFile:
    """The federation file of a cell, whose paths are in `places`; `document` is the experiment file.

    Raises ConfigError.
    """
    settings = overlaid(settings_of(file, cell, point, silos), places)
    made = federation_of(settings, f"the federation of cells/{cell}", _part_of(document, file, cell.group, point))
    rule_of(made.strategy)
    return made


def example_files(file: ExperimentFile, document: Document) -> dict[Group, list[FederationFile]]:
    """Of each group the files of its trials, then one of a cell at each point, as far as known without the data.

    Raises ConfigError where one of any cell and of any trial would be refused.
    """
    files: dict[Group, list[FederationFile]] = {}
    for group in groups_of(file):
        wanted = group.silos if isinstance(group.silos, int) else 0
        count = file.splits[group.split].silos or max(_MANY, wanted)
        silos = [{"name": f"silo-{number}", "file": "silo.yaml", "max_samples": 1} for number in range(count)]
        (cell, *_), trials = cells_of(file, group), trials_of(file, group)
        points = [*enumerate(trials), *((point, cell) for point in range(len(grid_of(file, group))))]
        files[group] = [federation_file_of(file, document, one, point, silos, {}) for point, one in points]
    return files


def trial_doubts(files: Iterable[Sequence[FederationFile]]) -> list[str]:
    """What is allowed of trials, of each its federations, and hardly meant."""
    if any(file.federation.rounds <= file.training.warm_up_rounds for trial in files for file in trial):
        return [
            "trials of the grid have no more rounds than training.warm_up_rounds, so none comes to the rate that "
            "it is to try: raise tuning.rounds, or lower training.warm_up_rounds"
        ]
    return []


def _part_of(document: Document, file: ExperimentFile, group: Group, point: int) -> Document:
    """What the experiment file sets of the federations of a group at a point of its grid, as `_laid_over`."""
    method = ("strategies", group.strategy)
    grid = (*(method if file.strategies[group.strategy].grid else ("tuning",)), "grid", point)
    return laid_over(document, [("federation",), ("starts", group.start, "settings"), (*method, "settings"), grid])


def _laid_over(file: ExperimentFile, group: Group, point: int) -> Settings:
    """What the experiment file sets of the federations of a group at a point of its grid."""
    start, method = file.starts[group.start], file.strategies[group.strategy]
    settings: Settings = {"federation": {"diversity": True}}
    for part in (file.federation, start.model, start.settings, method.settings, grid_of(file, group)[point]):
        settings = overlaid(settings, part)
    return settings


def trial_rounds_of(file: ExperimentFile, group: Group) -> list[int]:
    """How many rounds each of a group's trials has."""
    points = range(len(trials_of(file, group)))
    return [_trial_rounds(file, _laid_over(file, group, point)) for point in points]


def _trial_rounds(file: ExperimentFile, settings: Settings) -> int:
    """The rounds of a trial with these settings of a federation file, which may ask for less than tuning."""
    rounds = settings["federation"].get("rounds", Federation.model_fields["rounds"].default)
    # What is no number is refused with the other settings, at its place.
    return min(file.tuning.rounds, rounds) if isinstance(rounds, int) else rounds


def overlaid(settings: Mapping[str, Any], over: Mapping[str, Any]) -> Settings:
    """`settings` with those of `over` in place of theirs; sections are laid over each other setting by setting."""
    merged = dict(settings)
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = overlaid(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged

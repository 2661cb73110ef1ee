"""An experiment from its file to its report: splits, starts, trials, cells, tables.

Every step is a command of this package in a process of its own, as a user could give it, in the experiment's folder:

splits/SPLIT/seed-N          what each silo has, and its silo file
starts/START/seed-N          synthetic data and the model that was trained on them
cells/SPLIT/START/STRATEGY/SILOS/trial-K and .../seed-N

Each goes on where it was stopped, and what is finished is not done again. What was begun with other settings stops it.
One process at a time works in the folder. A federation's file is written when the federation is to be run, so that it
says what it was run with.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfl_dist.config.document import read_document
from gptfl_dist.config.experiment import ExperimentFile, Group
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_experiment, to_yaml
from gptfl_dist.errors import ConfigError, GptflError, StageFailed, StorageError
from gptfl_dist.files import write_file
from gptfl_dist.ledger.reader import read
from gptfl_dist.ledger.store import first_difference
from gptfl_dist.lock import held
from gptfl_dist.observe.matrix import Outcome, outcome_of, validations_of
from gptfl_dist.observe.progress import progress
from gptfl_dist.observe.summary import FILE_NAME, FederatedArm, Summary, read_summary
from gptfl_dist.run.candidates import PRETRAINED_FACTS, PRETRAINED_WEIGHTS, PRETRAINING_COST
from gptfl_dist.run.experiment.data import POOLED, Shared, share_out
from gptfl_dist.run.experiment.inputs import keep_inputs
from gptfl_dist.run.experiment.plan import (
    Cell,
    cells_of,
    federation_file_of,
    grid_of,
    groups_of,
    point_text,
    trial_doubts,
    trials_of,
)
from gptfl_dist.run.experiment.work import run_all
from gptfl_dist.run.folder import make_folder
from gptfl_dist.run.settings import request_of
from gptfl_dist.run.stages import stages_of

FEDERATION = "federation.yaml"
_LOCK = "experiment.lock"
_NO_POINT = "not run, for no point of the grid could be trained with"


@dataclass(frozen=True)
class Experiment:
    """What an experiment came to: the outcomes of its groups, the point of the grid of each that has one, what failed
    of its trials and cells."""

    file: ExperimentFile
    outcomes: Mapping[Group, Mapping[int, Outcome]]
    points: Mapping[Group, int]
    trials: Mapping[Group, Sequence[float | None]]
    failures: Mapping[Cell, GptflError]


async def run_experiment(path: Path, workers: int, say: Callable[[str], None]) -> Experiment:
    """Runs what is not finished yet of an experiment file, so many federations at a time.

    Raises DataError, ConfigError, StageFailed or StorageError.
    """
    file = load_experiment(path)
    # Settings may name modules that lie beside the file; the cells' processes get it too.
    sys.path.insert(0, str(path.absolute().parent))
    make_folder(file.folder)
    refusal = StorageError(
        f"{file.folder}: another gptfl experiment is at work there", hint="wait until it ends, or stop it"
    )
    with held(file.folder / _LOCK, refusal):
        return await _run(file, _Bench(path, file, workers, say), say)


async def _run(file: ExperimentFile, bench: _Bench, say: Callable[[str], None]) -> Experiment:
    groups = groups_of(file)
    bench.share_out(groups)
    trials = {group: trials_of(file, group) for group in groups}
    # All settings are looked at first: what is wrong with one is found before anything runs.
    for group in groups:
        for cell in [*trials[group], *cells_of(file, group)]:
            bench.settle(cell, cell.trial or 0)
    for text in trial_doubts([bench.files(cell) for group in groups for cell in trials[group]]):
        say(text)
    bench.refuse_other_settings([cell for group in groups for cell in trials[group] or cells_of(file, group)])
    bench.write_splits()
    await bench.make_starts(groups)
    failures = await bench.run("trials", [cell for each in trials.values() for cell in each])
    points, scores = {}, {}
    for group in groups:
        tried = [() if cell in failures else bench.validations(cell) for cell in trials[group]]
        scores[group] = [next(iter(accuracies), None) for accuracies in tried]
        if (point := best_point(group, tried, failures)) is not None:
            points[group] = point
    if not points:
        first = next(iter(failures.values()))
        raise StageFailed(f"no point of the grid could be trained with in any arm: {first.message}", hint=first.hint)
    left_out = [cell for group in groups if group not in points for cell in cells_of(file, group)]
    failures |= bench.told(dict.fromkeys(left_out, StageFailed(_NO_POINT)))
    cells = [cell for group in points for cell in cells_of(file, group)]
    for cell in cells:
        bench.settle(cell, points[cell.group])
    failures |= await bench.run("cells", cells)
    outcomes = {
        group: {cell.seed: bench.outcome(cell) for cell in cells_of(file, group) if cell not in failures}
        for group in groups
    }
    return Experiment(file, outcomes, points, scores, failures)


def best_point(group: Group, tried: Sequence[tuple[float, ...]], failures: Mapping[Cell, GptflError]) -> int | None:
    """The best point of the grid; None where every trial failed. Raises StageFailed where none told.

    `tried` has for each point its accuracies on validation data, from the last round backwards: of points that end
    alike that one is better which was so in the round before.
    """
    if not tried:
        return 0
    known = {point: accuracies for point, accuracies in enumerate(tried) if accuracies}
    if known:
        return max(known, key=lambda point: known[point])
    if sum(cell.group == group for cell in failures) < len(tried):
        raise StageFailed(
            f"no point of the grid is known to be better than another in {group}: no silo told how the weights do "
            "on its validation data",
            hint="raise data.validation_share, so that silos hold some of their samples back, or leave one point "
            "in the grid, which needs no choice",
        )
    return None


def why_it_failed(file: ExperimentFile, cell: Cell, error: GptflError) -> str:
    """The error's message; that of a trial says first which point of the grid is out."""
    if cell.trial is None:
        return error.message
    return f"the point {point_text(grid_of(file, cell.group)[cell.trial])} is out: {error.message}"


class _Bench:
    """The experiment's folder."""

    def __init__(self, path: Path, file: ExperimentFile, workers: int, say: Callable[[str], None]) -> None:
        self._file, self._workers, self._say = file, workers, say
        self._document = read_document(path)
        self._shared: dict[tuple[str, int], Shared] = {}
        self._synthesising: set[tuple[str, int]] = set()  # starts and seeds whose cells need synthetic data
        self._files: dict[Path, FederationFile] = {}  # of the runs that were settled, by their folders

    def share_out(self, groups: Sequence[Group]) -> None:
        for name in dict.fromkeys(group.split for group in groups):
            for seed in self._file.seeds:
                folder = self._file.folder / "splits" / name / f"seed-{seed}"
                self._shared[name, seed] = share_out(self._file, name, seed, folder)

    def write_splits(self) -> None:
        for shared in self._shared.values():
            shared.write()

    def settle(self, cell: Cell, point: int) -> None:
        """Makes the federation files of a cell, each checked; `run` writes them. Raises ConfigError."""
        shared, start = self._shared[cell.group.split, cell.seed], self._start(cell.group.start, cell.seed)
        for folder, silos in self._runs(cell):
            test_data = self._file.splits[cell.group.split].test_data or self._file.test_data
            file = self._files[folder] = self._federation_file(
                cell, point, shared.entries(*silos), folder, start, test_data=str(test_data.absolute())
            )
            if file.synthesises:
                self._synthesising.add((cell.group.start, cell.seed))

    def files(self, cell: Cell) -> list[FederationFile]:
        """The federation files of a cell that was settled."""
        return [self._files[folder] for folder, _ in self._runs(cell)]

    def refuse_other_settings(self, cells: Sequence[Cell]) -> None:
        """Raises ConfigError where the federation of one of these cells was begun with other settings, or other data.

        They were settled. So nothing is written that belongs to the settings of before.
        """
        others = {}
        for cell in cells:
            for folder, _ in self._runs(cell):
                with contextlib.suppress(StorageError):  # told of where the cell is to be run
                    if difference := self._difference(folder):
                        others[folder] = difference
        if others:
            raise _of_other_settings(others)
        keep_inputs(
            self._file, self._document.file.absolute().parent, [file for cell in cells for file in self.files(cell)]
        )

    def _difference(self, folder: Path) -> str:
        """The first setting that was another when the federation in a folder began. Raises StorageError."""
        begun = read(folder, lambda ledger: ledger.fact("request"))
        wanted = request_of(folder / FEDERATION, self._files[folder])
        return "" if begun in (None, wanted) else first_difference(begun, wanted)

    def _federation_file(
        self, cell: Cell, point: int, silos: list[dict[str, Any]], folder: Path, start: Path, **places: Any
    ) -> FederationFile:
        places |= {"run_folder": str(folder), "synthesis": {"folder": str(start / "synthetic")}}
        return federation_file_of(self._file, self._document, cell, point, silos, places)

    def _write(self, folder: Path, file: FederationFile) -> None:
        make_folder(folder)
        write_file(folder / FEDERATION, to_yaml(file))

    def _runs(self, cell: Cell) -> list[tuple[Path, Sequence[str]]]:
        """The runs of a cell: their folders, and their silos."""
        folder = (self._file.folder / "cells" / cell.path).absolute()
        silos = self._shared[cell.group.split, cell.seed].silos
        if cell.group.silos == "alone":
            return [(folder / silo, [silo]) for silo in silos]
        return [(folder, [POOLED] if cell.group.silos == "pooled" else silos)]

    def _synthetic(self, start: str) -> bool:
        return self._file.starts[start].arm == "synthetic"

    def _start(self, start: str, seed: int) -> Path:
        return (self._file.folder / "starts" / start / f"seed-{seed}").absolute()

    async def make_starts(self, groups: Sequence[Group]) -> None:
        """Synthetic data for each start and seed that needs them, and a model that was trained on them for each of this
        kind."""
        wanted = {
            (group.start, seed): self._start(group.start, seed)
            for group in groups
            for seed in self._file.seeds
            if (group.start, seed) in self._synthesising
        }
        for (start, seed), folder in wanted.items():
            group = next(group for group in groups if group.start == start)
            shared = self._shared[group.split, seed]
            silos = shared.entries(*shared.silos)
            self._write(folder, self._federation_file(Cell(group, seed), 0, silos, folder, folder))
        trained = {key: folder for key, folder in wanted.items() if self._synthetic(key[0])}
        for stage, starts in (("generate", wanted), ("pretrain", trained)):
            commands: dict[tuple[str, int], Sequence[str | Path]]
            commands = {key: [stage, folder / FEDERATION] for key, folder in starts.items()}
            if not commands:
                continue
            with progress(f"{self._file.name}: {stage}", len(commands), "starts") as bar:
                ended = await run_all(commands, self._workers, bar.callback)
            for error in ended.values():
                if error is not None:
                    raise error

    async def run(self, what: str, cells: Sequence[Cell]) -> dict[Cell, GptflError]:
        """Runs cells that are not finished; returns what stopped some of them.

        Raises ConfigError where a federation was begun with other settings than the experiment's file says now.
        """
        failures: dict[Cell, GptflError] = {}
        commands: dict[tuple[Cell, Path], Sequence[str | Path]] = {}
        others: dict[Path, str] = {}
        for cell in cells:
            for folder, _ in self._runs(cell):
                try:
                    difference = self._difference(folder)
                except StorageError as error:  # of another release, or no record that can be read
                    failures.setdefault(cell, _to_be_run_anew(error, folder))
                    continue
                if difference:
                    others[folder] = difference
                elif not (folder / FILE_NAME).exists():
                    commands[cell, folder] = ["run", folder / FEDERATION, "--exchange", "memory"]
        if others:
            raise _of_other_settings(others)
        for cell, folder in commands:
            self._write(folder, self._files[folder])
            if self._synthetic(cell.group.start):
                _link(self._start(cell.group.start, cell.seed), folder)
        if commands:
            with progress(f"{self._file.name}: {what}", len(commands), "federations") as bar:
                ended = await run_all(commands, self._workers, bar.callback)
            for (cell, _), stopped in ended.items():
                if stopped is not None:
                    failures.setdefault(cell, stopped)
        return self.told(failures)

    def told(self, failures: dict[Cell, GptflError]) -> dict[Cell, GptflError]:
        """The failures, of which each was said."""
        for cell, error in failures.items():
            self._say(f"{cell}: {why_it_failed(self._file, cell, error)}")
        return failures

    def outcome(self, cell: Cell) -> Outcome:
        folders = [folder for folder, _ in self._runs(cell)]
        summaries = [read_summary(folder) for folder in folders]
        file = self._files[folders[0]]
        first = summaries[0]
        return outcome_of(
            [_arm(summary) for summary in summaries],
            server=first.server,
            needed=stages_of(file),
            kept_by=first.chosen_by,
            personal=file.training.private_norms,
        )

    def validations(self, cell: Cell) -> tuple[float, ...]:
        return validations_of([_arm(read_summary(folder)) for folder, _ in self._runs(cell)])


def _of_other_settings(others: Mapping[Path, str]) -> ConfigError:
    """Of federations by their folders, and what is other in each: their results must not stand beside those of now."""
    first, difference = next(iter(others.items()))
    also = f"; in all there are {len(others)} such folders" if len(others) > 1 else ""
    return ConfigError(
        f"{first} holds a federation of other settings than the experiment file's ({difference}){also}",
        hint="set another folder in the experiment file; or remove such folders, and their federations are run anew",
    )


def _to_be_run_anew(error: StorageError, folder: Path) -> StorageError:
    """What a run folder that cannot be gone on with says to the reader of an experiment's page."""
    return StorageError(f"{error.message}; to have it run anew, remove {folder}", hint=f"Remove {folder}.")


def _arm(summary: Summary) -> FederatedArm:
    (arm,) = summary.arms.federated.values()
    return arm


def _link(start: Path, folder: Path) -> None:
    """Puts the start's model where a run looks for it."""
    for name in (PRETRAINED_WEIGHTS, PRETRAINED_FACTS, PRETRAINING_COST):
        if (start / name).exists() and not (folder / name).exists():
            os.link(start / name, folder / name)

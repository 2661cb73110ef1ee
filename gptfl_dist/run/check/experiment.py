"""The pre-flight of an experiment file: the settings of every federation, how data are shared out, the test data."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from gptfl_dist.config.document import read_document
from gptfl_dist.config.experiment import ExperimentFile, Group
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.run.check.common import check_test_data, code_beside, writable
from gptfl_dist.run.check.federation import check_model
from gptfl_dist.run.check.findings import Checklist, Doubt
from gptfl_dist.run.check.synthesis import check_synthesis
from gptfl_dist.run.experiment.data import share_out
from gptfl_dist.run.experiment.plan import example_files, trial_doubts, trials_of


def check_experiment(checks: Checklist, path: Path, file: ExperimentFile) -> None:
    files: dict[Group, list[FederationFile]] = {}
    checks.run("settings", lambda: _settings(path, file, files))
    for name in dict.fromkeys(split for block in file.cells for split in block.splits):
        checks.run(f"splits.{name}", partial(_split, file, name))
    tested: dict[Path, FederationFile] = {}
    starts: dict[str, FederationFile] = {}
    for group, (*_, example) in files.items():
        test_data = file.splits[group.split].test_data or file.test_data
        tested[test_data] = example.model_copy(update={"test_data": test_data})
        if group.start not in starts or example.synthesises:
            starts[group.start] = example
    for example in tested.values():
        checks.run("test data", partial(check_test_data, example))
    for start, example in starts.items():
        checks.run(f"model of starts.{start}", partial(check_model, path, example))
        if example.synthesises:
            check_synthesis(checks, example, f" of starts.{start}")
    checks.run("folder", lambda: writable(file.folder))


def _settings(path: Path, file: ExperimentFile, files: dict[Group, list[FederationFile]]) -> str:
    with code_beside(path):
        files |= example_files(file, read_document(path))
    trials = [files[group][: len(trials_of(file, group))] for group in files]
    for doubt in trial_doubts(trials):
        raise Doubt(doubt, hint="see docs/experiments.md")
    short = sum(map(len, trials))
    return f"{len(files) * len(file.seeds)} federations, and {short} short ones that choose points of the grids"


def _split(file: ExperimentFile, name: str) -> str:
    """Shares the data out as for the first seed."""
    shared = share_out(file, name, file.seeds[0], file.folder)
    samples = [shared.samples[silo] for silo in shared.silos]
    return f"{len(samples)} silos of {min(samples)} to {max(samples)} samples each with seed {file.seeds[0]}"

"""The pre-flight of a federation, silo, operator or experiment file: what would fail is tried before it costs hours.

Each check is a function that returns what it found or raises the error that a run would end with. `Checklist` turns
either into a `Finding`, so no check stops the others. Nothing is left behind on disk, and no port stays open.
"""

from __future__ import annotations

from pathlib import Path

from gptfl_dist.config.document import HINT, SILO_HINT, read_document
from gptfl_dist.config.experiment import ExperimentFile
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import File, kind_of, load_experiment, load_federation, load_operator, load_silo
from gptfl_dist.config.operator import OperatorFile
from gptfl_dist.errors import ConfigError
from gptfl_dist.run.check.experiment import check_experiment
from gptfl_dist.run.check.federation import check_federation
from gptfl_dist.run.check.findings import Checklist, Finding
from gptfl_dist.run.check.operator import check_operator
from gptfl_dist.run.check.silo import check_silo
from gptfl_dist.run.experiment.plan import groups_of

__all__ = ["Finding", "check_file"]


def check_file(path: Path) -> list[Finding]:
    """Makes every check that fits the file at `path`, each of which gives one finding."""
    checks = Checklist()
    try:
        file = _load(path)
    except ConfigError as error:
        return [Finding("file", "failed", error.message, error.hint, error.exit_code)]
    if isinstance(file, FederationFile):
        sizes = f"{len(file.silos)} silos and {len(file.labels)} labels"
        checks.findings.append(Finding("file", "ok", f"{path} is a federation file of {sizes}"))
        check_federation(checks, path, file)
    elif isinstance(file, ExperimentFile):
        groups = len(groups_of(file))
        told = f"{path} is an experiment file of {groups} cells for each of {len(file.seeds)} seeds"
        checks.findings.append(Finding("file", "ok", told))
        check_experiment(checks, path, file)
    elif isinstance(file, OperatorFile):
        checks.findings.append(Finding("file", "ok", f"{path} is the file of the {file.role} {file.name}"))
        check_operator(checks, file)
    else:
        checks.findings.append(Finding("file", "ok", f"{path} is the silo file of {file.name}"))
        check_silo(checks, path, file)
    return checks.findings


def _load(path: Path) -> File:
    """The file, of the kind that more of its keys belong to. Raises ConfigError."""
    value = read_document(path, hint=f"{HINT} {SILO_HINT}").value
    kind = kind_of(value)
    if kind is None:
        keys = sorted(value) if isinstance(value, dict) else []
        raise ConfigError(
            f"{path} has the keys {', '.join(keys) or '(none)'}: no federation, silo, operator or experiment file",
            hint="a federation file has labels and silos (see `gptfl init`), a silo file has data (`gptfl init silo`), "
            "an operator file has a role",
        )
    if kind is OperatorFile:
        return load_operator(path)
    if kind is ExperimentFile:
        return load_experiment(path)
    return load_federation(path) if kind is FederationFile else load_silo(path)

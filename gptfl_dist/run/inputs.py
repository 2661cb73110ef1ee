"""What a run needs of its files, looked at before hours of synthesis, and before `--fresh` deletes an earlier run."""

from __future__ import annotations

import sys
from pathlib import Path

from gptfl_dist.aggregation.rules import rule_of
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_silo
from gptfl_dist.config.silo import SiloFile
from gptfl_dist.errors import ConfigError, DataError, LaunchError
from gptfl_dist.run.requirements import require_data


def require_inputs(path: Path, file: FederationFile) -> None:
    """Raises what the coordinator of the federation file at `path` cannot do without: DataError, ModelError.

    Imports the code that strategy.rule names, which may lie beside the file.
    """
    if file.test_data is not None and not file.test_data.exists():
        raise DataError(
            f"the data {file.test_data} does not exist", hint=f"check test_data in {path}: it is relative to that file"
        )
    if ":" in file.strategy.rule and (beside := str(path.absolute().parent)) not in sys.path:
        sys.path.insert(0, beside)
    rule_of(file.strategy)


def silo_files(file: FederationFile) -> dict[str, Path]:
    """The silo file of each silo, by name in sorted order, for runs that start the silos themselves."""
    missing = [entry.name for entry in file.silos if entry.file is None]
    if missing:
        raise ConfigError(
            f"silos: {', '.join(missing)} have no file, and this run starts the silos itself",
            hint="give each silo its file, or start the sides apart with gptfl coordinator and gptfl silo",
        )
    return {entry.name: entry.file for entry in sorted(file.silos, key=lambda s: s.name) if entry.file is not None}


def load_silos(path: Path, file: FederationFile) -> dict[str, tuple[Path, SiloFile]]:
    """Each silo's file with its path, checked, for runs that start the silos themselves. By name in sorted order."""
    loaded = {}
    for name, silo_path in silo_files(file).items():
        silo = load_silo(silo_path)
        if silo.name != name:
            raise ConfigError(f"{silo_path}: name is {silo.name}, {path} expects {name}")
        require_data(silo)  # the trainer would find out only after synthesis and pre-training
        loaded[name] = silo_path, silo
    return loaded


def require_one_key(file: FederationFile, silos: dict[str, SiloFile]) -> None:
    """Raises LaunchError where a side encrypts at rest, in a run whose sides share processes and so have one key."""
    keys = {"the federation file": file.at_rest, **{name: silo.at_rest for name, silo in silos.items()}}
    if encrypting := [name for name, key in keys.items() if key is not None]:
        raise LaunchError(
            f"at_rest is set in {', '.join(encrypting)}, and here all sides share processes, which have one key",
            hint="start the sides apart with gptfl coordinator and gptfl silo, or use an encrypted disk",
        )

"""What the federations of an experiment are made from beside its settings: the data, and code beside the file.

Their digests stand in the experiment's folder from its first federation on. So what was changed since is refused, as
changed settings are: results of the old and of the new would stand side by side, or be averaged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from gptfl_dist.config.experiment import ExperimentFile
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.errors import ConfigError
from gptfl_dist.files import write_file
from gptfl_dist.ledger.record import FILE_NAME as LEDGER

INPUTS = "inputs.json"
_FUNCTION = re.compile(r"(\w+(?:\.\w+)*):\w+")
_READ = 1 << 20


def keep_inputs(file: ExperimentFile, beside: Path, files: Iterable[FederationFile]) -> None:
    """Writes down what is there now; `files` are federation files, `beside` is the folder of the experiment file.

    Raises ConfigError where something is not what it was.
    """
    record = file.folder / INPUTS
    begun = next((file.folder / "cells").rglob(LEDGER), None) is not None
    known = json.loads(record.read_text(encoding="utf-8")) if begun and record.exists() else {}
    paths = {file.data.path, file.test_data, *_modules(beside, files)}
    paths |= {split.test_data for split in file.splits.values() if split.test_data is not None}
    paths |= {file.data.samples} if file.data.samples is not None else set()
    found = {_name(path, beside): _digest(path) for path in sorted(paths) if path.exists()}
    changed = [name for name, digest in found.items() if known.get(name, digest) != digest]
    if changed:
        differ = "differs" if len(changed) == 1 else "differ"
        raise ConfigError(
            f"{', '.join(changed)} {differ} from what the federations in {file.folder} were made from",
            hint=f"set another folder in the experiment file; or remove {file.folder}, and all is run anew",
        )
    write_file(record, json.dumps({**known, **found}, indent=1) + "\n")


def _modules(beside: Path, files: Iterable[FederationFile]) -> set[Path]:
    """Modules beside the file that settings name as MODULE:FUNCTION. What these import is not known."""
    modules = {match[1] for file in files for text in _texts(file.model_dump()) if (match := _FUNCTION.fullmatch(text))}
    paths = (beside.joinpath(*module.split(".")) for module in modules)
    return {found for path in paths for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()}


def _texts(settings: Any) -> Iterator[str]:
    if isinstance(settings, str):
        yield settings
    elif isinstance(settings, Mapping):
        for value in settings.values():
            yield from _texts(value)
    elif isinstance(settings, Sequence):
        for value in settings:
            yield from _texts(value)


def _name(path: Path, beside: Path) -> str:
    """From the experiment file, so that both may be moved together."""
    return str(path.relative_to(beside) if path.is_relative_to(beside) else path)


def _digest(path: Path) -> str:
    """Of a file's bytes; of a folder, which may be large, of the names and sizes of the files below it."""
    hasher = blake3()
    if path.is_dir():
        for each in sorted(path.rglob("*")):
            if each.is_file():
                hasher.update(f"{each.relative_to(path)} {each.stat().st_size}\n".encode())
    else:
        with path.open("rb") as content:
            while block := content.read(_READ):
                hasher.update(block)
    return hasher.hexdigest()

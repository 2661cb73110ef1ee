"""The folder of a pre-trained model on this machine, with the digest by which it is known again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from gptfl_dist.errors import ModelError, first_line

_READ = ("*.json", "*.safetensors", "*.txt", "*.model")
"""What a `transformers` model is read from: settings, weights, vocabularies; never a pickle, never code."""


@dataclass(frozen=True)
class ModelFolder:
    """Its name for people (for a hub id with its commit), where it lies, and the BLAKE3 digest of what is read."""

    id: str
    folder: Path
    digest: str


def find_model(source: str, setting: str) -> ModelFolder:
    """Find a `transformers` model that `setting` names, fetching it from the hub where it is a hub id.

    Loads no weights. Raises ModelError if there is none.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if is_folder_name(source):
            raise ModelError(f"{setting} is {source}, but no such folder exists", hint="name a folder, or a hub id")
        folder = _download(source, setting)
        source = f"{source}@{folder.name}"
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{setting} is {source}, a folder without config.json: no transformers model",
            hint="name the folder of a transformers model, or a hub id",
        )
    files = sorted({path for pattern in _READ for path in folder.rglob(pattern) if path.is_file()})
    try:
        return ModelFolder(source, folder, files_digest(folder, files))
    except OSError as error:
        raise ModelError(f"{setting} is {source}: {error}", hint="check its permissions") from error


def is_folder_name(source: str) -> bool:
    """Whether a source can only be a folder: a hub id is a name, or owner/name."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def files_digest(folder: Path, files: Iterable[Path]) -> str:
    """BLAKE3 over the names, sizes and contents of files below `folder`. Raises OSError that names the file."""
    hasher = blake3()
    for path in files:
        try:
            hasher.update(json.dumps([path.relative_to(folder).as_posix(), path.stat().st_size]).encode())
            hasher.update_mmap(path)
        except OSError as error:  # of a library that leaves the name out
            raise OSError(f"{path} cannot be read: {first_line(error)}") from error
    return hasher.hexdigest()


def quiet_transformers() -> None:
    """Keeps the bars of `transformers` out of ours, and its report of absent weights: ours says it, and is stricter."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves types out
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers leaves types out


def _download(source: str, setting: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(_READ)))
    except Exception as error:  # the hub client and its HTTP library raise unrelated types
        raise ModelError(
            f"{setting} is {source}: there is no such folder, and the hub gave no such model: {first_line(error)}",
            hint="check the name and the connection (a gated model also needs `hf auth login`), or download it "
            "elsewhere and name its folder",
        ) from error

"""A coordinator out of a backup: every byte is checked, then all of it is put in place at once, in a new epoch.

The silos remember how far the run had come. Without the statement that begins the epoch they would refuse to go back.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import ConfigError
from gptfl_dist.files import storage_error, sync_folder
from gptfl_dist.ledger.record import FILE_NAME
from gptfl_dist.observe.progress import progress
from gptfl_dist.run.archive import Manifest, manifest_of, unpack
from gptfl_dist.run.at_rest import place_of
from gptfl_dist.run.epoch import EpochBegun, begin_epoch_in


@dataclass(frozen=True, slots=True)
class Restored:
    """`file` is the federation file; `epoch` is None where the backup holds no run that was begun. `next` says what the
    operator has to see to."""

    file: Path
    files: int
    epoch: EpochBegun | None
    next: list[str]


def restore(archive: Path, into: Path, reason: str) -> Restored:
    """Puts what an archive holds into a folder that is new or empty.

    Raises ConfigError where the folder is not, StorageError where a byte of the archive is not as it was; nothing is in
    place then.
    """
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ConfigError(f"{into} is not empty", hint="name a folder that is new or empty")
    size = manifest_of(archive).size
    beside = into.absolute().with_name(f".{into.absolute().name}.{os.getpid()}.part")
    try:
        beside.mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise storage_error(error, beside) from None
    try:
        with progress("restore", size, "bytes") as bar:
            manifest = unpack(archive, beside, bar.callback)
        epoch = _next_epoch(beside, manifest, reason)
        try:
            sync_folder(beside)
            beside.replace(into)
            sync_folder(into.absolute().parent)
        except OSError as error:
            raise storage_error(error, into) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Restored(into / manifest.file, len(manifest.files), epoch, _what_is_next(manifest, into / manifest.file))


def _next_epoch(folder: Path, manifest: Manifest, reason: str) -> EpochBegun | None:
    path = folder / manifest.file
    file = _placed(load_federation(path), folder, manifest)
    if not (file.run_folder / FILE_NAME).exists():
        return None
    made = datetime.fromtimestamp(manifest.at, UTC).isoformat()
    return begin_epoch_in(path, file, reason or f"restored from the backup of {made}")


def _placed(file: FederationFile, folder: Path, manifest: Manifest) -> FederationFile:
    """The settings with every part where it lies now."""

    def place(part: str) -> Path:
        return folder / manifest.places[part]

    changes: dict[str, object] = {"run_folder": place("run")}
    if file.enrolment is not None:
        changes["enrolment"] = file.enrolment.model_copy(update={"authority": place("authority")})
    if file.exchange.certificate is not None:
        pems = {name: place(f"exchange-{name}") for name in ("authority", "certificate", "key")}
        changes["exchange"] = file.exchange.model_copy(update=pems)
    return file.model_copy(update=changes)


def _what_is_next(manifest: Manifest, file: Path) -> list[str]:
    made = f"{datetime.fromtimestamp(manifest.at, UTC):%F %T} UTC"
    told = [f"in {file} set {setting}: {place}" for setting, place in manifest.moved.items()]
    if "authority" in manifest.places:
        told.append(
            f"revoke again whom you revoked after {made}, and invite again whose certificate was made after it: the "
            "registry knows nothing of either"
        )
    if (at_rest := load_federation(file).at_rest) is not None:
        told.append(
            f"bring the key of {place_of(at_rest)}: it is not in the archive, and without the one that was in use then "
            "the weights there cannot be read"
        )
    return [*told, f"start it with: gptfl coordinator {file}"]

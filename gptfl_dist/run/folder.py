"""What a run leaves in its run folder, and how that is deleted."""

from __future__ import annotations

import shutil
from pathlib import Path

from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import StorageError
from gptfl_dist.files import storage_error
from gptfl_dist.ledger.lock import locked
from gptfl_dist.ledger.record import FILE_NAME
from gptfl_dist.observe.live import LIVE
from gptfl_dist.observe.logs import configure
from gptfl_dist.run.at_rest import KEY_CHECK, key_of
from gptfl_dist.run.auditor import close_log
from gptfl_dist.run.candidates import (
    CANDIDATES,
    CHOICE,
    CONTACT_SHEET,
    DROPPED_SHEET,
    PRETRAINING_COST,
    PRETRAINING_STATE,
)
from gptfl_dist.run.credentials import coordinator_credentials
from gptfl_dist.run.inputs import load_silos, require_inputs
from gptfl_dist.run.synthetic import SAMPLES

PRIVATE = 0o700
"""The mode of a silo's work folder, which nobody but its owner enters."""

_MADE_BY_A_RUN = (
    *(FILE_NAME, f"{FILE_NAME}-wal", f"{FILE_NAME}-shm", LIVE, "weights", "strategy", "spools", "silos", "models"),
    *("logs", "summary.json", "report.html", "pretrained.safetensors", "pretrained.json", "random.safetensors"),
    *("handed-out", SAMPLES, KEY_CHECK),
    *(CONTACT_SHEET, DROPPED_SHEET, CANDIDATES, CHOICE, PRETRAINING_STATE, PRETRAINING_COST),
)
"""What `--fresh` deletes: never the federation file, data or a synthetic set in the same folder, nor the audit log."""


ENDED = "ended"
"""The fact in the ledger that tells how the last coordinator ended; empty where one is at work, or was killed."""


def run_folder_of(path: Path) -> Path:
    """`path` itself where it is a folder, else the run folder of the federation file there. Raises ConfigError."""
    return path if path.is_dir() else load_federation(path).run_folder


def open_run_folder(path: Path, fresh: bool, *, with_silos: bool = False, certified: bool = False) -> None:
    """Starts the log in the run folder of the federation file at `path`; `fresh` deletes first what a run left there.

    `with_silos`: the run starts the silos as well, whose work folders lie in the run folder. `certified`: it shows the
    certificates that the file names.

    Raises, with nothing deleted, ConfigError, DataError, IdentityError or ModelError where the run could not begin
    anew: its data, a silo file, its certificates, code or a key of `at_rest` cannot be had. StorageError, also where
    `fresh` meets a coordinator at work.
    """
    file = load_federation(path)
    folder = file.run_folder
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"run_folder is {folder}, which is a file", hint=f"name a folder in {path}")
    if fresh and (folder / FILE_NAME).exists():
        require_inputs(path, file)
        silos = [silo.at_rest for _, silo in load_silos(path, file).values()] if with_silos else []
        for at_rest in (file.at_rest, *silos):
            if at_rest is not None:
                key_of(at_rest)  # it may be another than before, as nothing stays that the old one encrypted
        if certified:
            coordinator_credentials(path, file)
        with locked(folder):
            delete_run(folder)
    configure(folder / "logs" / "coordinator.jsonl")


def delete_run(folder: Path) -> None:
    """Deletes what a run left in its folder. Under the ledger's lock, or a coordinator may be at work there."""
    close_log(folder)
    for name in _MADE_BY_A_RUN:
        delete(folder / name)


def delete(path: Path) -> None:
    """Deletes a file or a folder, if it is there. Raises StorageError."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, path) from None


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Makes a folder where there is none. Raises StorageError."""
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from None

"""A backup of all that a coordinator needs, taken beside a coordinator at work, which is not disturbed.

The ledger is copied as of one instant, and names the weights that belong to it. Those never change, but a round that
ends drops what nobody needs any more; so they are held by links first, and where one was gone already the ledger is
copied anew. What follows from other files (spools, encoded weights) and what is the silos' own is left out: a silo
whose update was committed and not counted yet is asked for it again after a restore.

Every file is read twice: for the manifest, and into the archive, where it must still be the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gptfl_dist import __version__
from gptfl_dist.config.base import Section
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import ConfigError, ModelError, StorageError
from gptfl_dist.files import storage_error, write_file
from gptfl_dist.ledger.copy import copy_database
from gptfl_dist.ledger.reader import LedgerReader, read
from gptfl_dist.ledger.record import FILE_NAME
from gptfl_dist.observe.progress import progress
from gptfl_dist.run.archive import Manifest, Packed, digested, is_name, pack
from gptfl_dist.run.arm import needed_weights
from gptfl_dist.run.at_rest import KEY_CHECK, use_at_rest
from gptfl_dist.run.candidates import (
    CANDIDATES,
    CHOICE,
    CONTACT_SHEET,
    DROPPED_SHEET,
    PRETRAINED_FACTS,
    PRETRAINED_WEIGHTS,
    PRETRAINING_COST,
    PRETRAINING_STATE,
)
from gptfl_dist.run.evaluation import RANDOM_WEIGHTS
from gptfl_dist.run.folder import PRIVATE, delete, make_folder
from gptfl_dist.run.synthetic import SAMPLES
from gptfl_dist.security.audit_log import KEY, LOG, read_log
from gptfl_dist.security.registry import FILE_NAME as REGISTRY
from gptfl_dist.weights import WeightsFile

HELD = ".backup"
"""The folder in a run folder in which a backup holds what belongs to it."""

_TRIES = 5
_UNFINISHED = re.compile(r"incoming\..*|.*\.sqlite-(journal|wal|shm)")  # what is being written, and is copied otherwise
_KEPT = (
    *("models", "summary.json", "report.html", "split.json", RANDOM_WEIGHTS, PRETRAINED_WEIGHTS, PRETRAINED_FACTS),
    *(SAMPLES, PRETRAINING_STATE, PRETRAINING_COST, KEY_CHECK, CONTACT_SHEET, DROPPED_SHEET, CANDIDATES, CHOICE, KEY),
)
"""What lies in a run folder beside ledger, weights and audit log, and is written whole or not at all."""


@dataclass(frozen=True, slots=True)
class BackedUp:
    """`left_out` are files and folders that the federation file names and the archive does not hold."""

    archive: Path
    files: int
    bytes: int
    left_out: list[str]


@dataclass(frozen=True, slots=True)
class _Part:
    """Something that the federation file names: the setting, where it lies, and where it belongs if that is elsewhere
    than below the file's folder."""

    setting: str
    source: Path
    default: str


class _Moved(Exception):
    """A round was closed meanwhile."""


def back_up(path: Path, to: Path) -> BackedUp:
    """Writes an archive of the federation file at `path`: the file `to`, or in the folder `to` one named by the time.

    Raises ConfigError where a file is in the way, StorageError where something cannot be read or written.
    """
    file = load_federation(path)
    use_at_rest(file.at_rest, file.run_folder)
    at = int(time.time())
    if to.is_dir():
        to /= f"{file.name}-{datetime.fromtimestamp(at, UTC):%Y%m%dT%H%M%SZ}.tar"
    if to.exists():
        raise ConfigError(
            f"{to} exists", hint="name another file, or a folder: each backup then gets a name of its own"
        )
    parts = _parts(file)
    folder, own = path.absolute().parent, path.name if is_name(path.name) else "federation.yaml"
    places, moved = {"file": own}, {}
    for name, part in parts.items():
        inside = part.source.relative_to(folder).as_posix() if part.source.is_relative_to(folder) else ""
        places[name] = inside if is_name(inside) or inside == "." else part.default
        if places[name] != inside:
            moved[part.setting] = places[name]
    with _collected(path, file, parts) as sources:
        packed = _digests(sources)
        manifest = Manifest(file.name, own, __version__, at, places, moved, packed)
        with progress("back up", manifest.size, "bytes") as bar:
            pack(to, manifest, [sources[one.name] for one in packed], bar.callback)
    covered = {part.source for part in parts.values()}
    left_out = sorted({str(each) for each in _named(file) if each.exists()} - {str(each) for each in covered})
    return BackedUp(to, len(packed), manifest.size, left_out)


def _parts(file: FederationFile) -> dict[str, _Part]:
    """What is backed up beside the federation file, by the name that it has in the archive."""
    parts = {
        "run": _Part("run_folder", file.run_folder, "run"),
        "synthetic": _Part("synthesis.folder", file.synthesis.folder, "synthetic"),
    }
    if file.synthesis.prompts.file is not None:
        parts["prompts"] = _Part("synthesis.prompts.file", file.synthesis.prompts.file, "prompts.yaml")
    if file.enrolment is not None:
        parts["authority"] = _Part("enrolment.authority", file.enrolment.authority, "authority")
    for name in ("authority", "certificate", "key"):
        if (source := getattr(file.exchange, name)) is not None:
            parts[f"exchange-{name}"] = _Part(f"exchange.{name}", source, f"credentials/{name}.pem")
    return parts


@contextlib.contextmanager
def _collected(path: Path, file: FederationFile, parts: dict[str, _Part]) -> Iterator[dict[str, Path]]:
    """Every file by its name in the archive, held while the block lasts."""
    held = file.run_folder / HELD  # where links reach
    make_folder(held, PRIVATE)
    with contextlib.closing(_Lock(held)), _storing(held):
        sources = {"file": path}
        for name, part in parts.items():
            if name != "run" and part.source.exists():
                sources |= _below(part.source, name)
        if (registry := f"authority/{REGISTRY}") in sources:
            copy_database(sources[registry], held / REGISTRY)
            sources[registry] = held / REGISTRY
        for name in _KEPT:
            sources |= _below(file.run_folder / name, f"run/{name}")
        sources |= {f"run/{name}": source for name, source in _state(file.run_folder, held).items()}
        if log := read_log(file.run_folder):  # after the ledger, so it is never behind it
            write_file(held / LOG, log)
            sources[f"run/{LOG}"] = held / LOG
        yield sources


class _Lock:
    """Keeps other backups of the same run out, and clears away what a killed one left, and this one leaves."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise StorageError(f"{folder}: another backup is under way", hint="wait until it is done") from None
        self._clear()

    def close(self) -> None:
        self._clear()
        os.close(self._fd)

    def _clear(self) -> None:
        for path in self._folder.iterdir():
            delete(path)


@contextlib.contextmanager
def _storing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(error, folder) from None


def _below(source: Path, name: str) -> dict[str, Path]:
    """A file, or all files of a folder that are not being written, by name."""
    if source.is_file():
        return {name: source}
    found = {f"{name}/{path.relative_to(source).as_posix()}": path for path in source.rglob("*") if path.is_file()}
    return {name: path for name, path in found.items() if is_name(name) and not _UNFINISHED.match(path.name)}


def _state(run_folder: Path, held: Path) -> dict[str, Path]:
    """A copy of the ledger, and links to the weights and states that it names."""
    if not (run_folder / FILE_NAME).exists():
        return {}
    for tries_left in range(_TRIES, 0, -1):
        folder = Path(tempfile.mkdtemp(dir=held))
        copy_database(run_folder / FILE_NAME, folder / FILE_NAME)
        try:
            return _linked(run_folder, folder)
        except _Moved as gone:
            if tries_left == 1:
                raise StorageError(
                    f"{gone} is missing or damaged", hint="without it the run cannot go on, and so it is not backed up"
                ) from None
        time.sleep(0.2)
    raise AssertionError


def _linked(run_folder: Path, folder: Path) -> dict[str, Path]:
    found = {FILE_NAME: folder / FILE_NAME}
    needed, wanted = read(folder, _weights_of) or (set(), set())
    for name in sorted(needed | wanted):
        (folder / name).parent.mkdir(exist_ok=True)
        try:
            (folder / name).hardlink_to(run_folder / name)
        except FileNotFoundError:
            if name in needed:
                raise _Moved(run_folder / name) from None
            continue
        if name.startswith("weights/") and not _whole(folder / name):
            raise _Moved(run_folder / name)
        found[name] = folder / name
    return found


def _weights_of(ledger: LedgerReader) -> tuple[set[str], set[str]]:
    """The files that a run needs to go on, and others that may be kept."""
    needed, wanted = set(), set()
    for name in ledger.arms():
        record = ledger.begun_arm(name)
        needed |= {f"weights/{digest}.safetensors" for digest in needed_weights(record)}
        wanted |= {f"weights/{closed.weights}.safetensors" for closed in record.rounds if closed.weights is not None}
        if ledger.fact(f"state/{record.final}") is not None:
            needed.add(f"strategy/{record.final}.safetensors")
    return needed, wanted


def _whole(path: Path) -> bool:
    try:
        with WeightsFile(path) as weights:
            return weights.digest() == path.stem
    except (ModelError, StorageError):
        return False


def _digests(sources: dict[str, Path]) -> tuple[Packed, ...]:
    with progress("read", len(sources), "files") as bar:
        packed = []
        for name, source in sorted(sources.items()):
            packed.append(digested(name, source))
            bar.update(len(packed))
    return tuple(packed)


def _named(section: Any) -> Iterator[Path]:
    """Every path that settings name."""
    if isinstance(section, Path):
        yield section
    elif isinstance(section, Section):
        for name, value in section:
            local = name.endswith("source") and isinstance(value, str) and value.startswith("/")
            yield from _named(Path(value) if local else value)
    elif isinstance(section, list | tuple):
        for value in section:
            yield from _named(value)
    elif isinstance(section, dict):
        for value in section.values():
            yield from _named(value)

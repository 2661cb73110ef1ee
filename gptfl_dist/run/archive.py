"""A backup as one file: a plain tar (GNU), of which every byte is checked before anything is put in place.

The first member is `manifest.json`: name, size and BLAKE3 of every other file, in the order in which they follow, and a
digest of the manifest itself. All else in a tar (headers, padding, the end) follows from the manifest, and is compared
with what follows. So no byte can be changed, left out or added without being found, and nothing is ever written that
the manifest does not name. `tar -tf` lists an archive; nothing but this module needs to read one.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from gptfl_dist.errors import StorageError
from gptfl_dist.files import replacing, storage_error

MANIFEST = "manifest.json"
FORMAT = 1

_BLOCK = 1 << 20  # bytes that are read at a time
_UNIT = tarfile.BLOCKSIZE
_LARGEST_MANIFEST = 64 << 20
_STEP = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_NAME = re.compile(rf"{_STEP}(/{_STEP})*")  # so never absolute, and never upwards
_HINT = "take another copy of the backup, or an older one"

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Packed:
    """A file in an archive."""

    name: str
    size: int
    blake3: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an archive holds. `at` is when it was made, in seconds since 1970.

    `places` says where each part, the first step of a file's name, belongs below the folder of the federation file;
    `moved` names the settings that must say so, because they named a place elsewhere.
    """

    federation: str
    file: str
    release: str
    at: int
    places: Mapping[str, str]
    moved: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Packed, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def spelled(self) -> bytes:
        """The manifest as it stands in the archive."""
        content = {"format": FORMAT, **asdict(self)}
        return _json({**content, "blake3": blake3(_json(content)).hexdigest()})

    @classmethod
    def parsed(cls, text: bytes) -> Manifest:
        """Raises ValueError where it is none, or was changed."""
        content = json.loads(text.decode("ascii"))
        if not isinstance(content, dict) or content.pop("format", FORMAT) != FORMAT:
            raise ValueError("made by another release")
        del content["blake3"]
        manifest = cls(**{**content, "files": tuple(Packed(**file) for file in content["files"])})
        if manifest.spelled() != text:
            raise ValueError("was changed")
        for name in (*(file.name for file in manifest.files), *manifest.places.values(), manifest.file):
            if not _NAME.fullmatch(name) and name != ".":
                raise ValueError(f"names {name!r}")
        return manifest

    def place_of(self, name: str) -> Path:
        """Where a file belongs, below the folder of the federation file."""
        part, _, rest = name.partition("/")
        return Path(self.places[part]) / rest


def is_name(name: str) -> bool:
    """Whether a file of this name can be put into an archive."""
    return _NAME.fullmatch(name) is not None


def digested(name: str, path: Path) -> Packed:
    """What a manifest says of a file. Raises StorageError."""
    hasher, size = blake3(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                hasher.update(block)
                size += len(block)
    except OSError as error:
        raise storage_error(error, path) from None
    return Packed(name, size, hasher.hexdigest())


def pack(archive: Path, manifest: Manifest, sources: Iterable[Path], report: Report) -> None:
    """Writes an archive of 0600, whole or not at all, of the files of a manifest, whose sources come in its order.

    Raises StorageError, also where a file is not what the manifest says.
    """
    text, done = manifest.spelled(), 0
    with replacing(archive) as fd, os.fdopen(os.dup(fd), "wb") as out:
        out.write(_header(MANIFEST, len(text), manifest.at) + text + _padding(len(text)))
        for packed, path in zip(manifest.files, sources, strict=True):
            hasher, left = blake3(), packed.size
            out.write(_header(packed.name, packed.size, manifest.at))
            with path.open("rb") as file:
                while block := file.read(min(_BLOCK, left)):
                    hasher.update(block)
                    out.write(block)
                    left, done = left - len(block), done + len(block)
                    report(done, manifest.size)
            if left or hasher.hexdigest() != packed.blake3:
                raise StorageError(f"{path}: changed while it was backed up", hint="back up again")
            out.write(_padding(packed.size))
        out.write(bytes(2 * _UNIT))


def manifest_of(archive: Path) -> Manifest:
    """What an archive says that it holds. Raises StorageError where it is none."""
    try:
        with archive.open("rb") as file:
            return _Reader(archive, file).manifest()
    except OSError as error:
        raise storage_error(error, archive) from None


def unpack(archive: Path, folder: Path, report: Report) -> Manifest:
    """Writes the files of an archive below a folder that is new, each 0600 in folders of 0700, and checks every byte.

    Raises StorageError with the name of the first file that is not as it was; then what lies in the folder is of no
    use.
    """
    try:
        with archive.open("rb") as file:
            reader, done = _Reader(archive, file), 0
            manifest = reader.manifest()
            for packed in manifest.files:
                target = folder / manifest.place_of(packed.name)
                target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with os.fdopen(fd, "wb") as out:
                    for block in reader.content(packed, manifest.at):
                        out.write(block)
                        done += len(block)
                        report(done, manifest.size)
                    out.flush()
                    os.fsync(fd)
            reader.end()
            return manifest
    except OSError as error:
        raise storage_error(error, archive if error.filename is None else Path(os.fsdecode(error.filename))) from None


class _Reader:
    """Reads an archive from its beginning to its end."""

    def __init__(self, archive: Path, file: BinaryIO) -> None:
        self._archive = archive
        self._file = file

    def manifest(self) -> Manifest:
        try:
            size = tarfile.TarInfo.frombuf(self._file.read(_UNIT), "ascii", "strict").size
        except (tarfile.HeaderError, UnicodeError):
            size = -1
        if not 0 <= size <= _LARGEST_MANIFEST:
            raise StorageError(f"{self._archive} is no backup: it does not begin with {MANIFEST}", hint=_HINT)
        text = self._file.read(size)
        try:
            manifest = Manifest.parsed(text)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise StorageError(
                f"{self._archive}: {MANIFEST} cannot be read: {error or type(error).__name__}", hint=_HINT
            ) from None
        self._file.seek(0)
        self._expect(_header(MANIFEST, size, manifest.at) + text + _padding(size), MANIFEST)
        return manifest

    def content(self, packed: Packed, at: int) -> Iterable[bytes]:
        """The blocks of the file that comes next."""
        self._expect(_header(packed.name, packed.size, at), packed.name)
        hasher, left = blake3(), packed.size
        while left:
            block = self._file.read(min(_BLOCK, left))
            if not block:
                raise StorageError(f"{self._archive} is cut short: it ends in {packed.name}", hint=_HINT)
            hasher.update(block)
            left -= len(block)
            yield block
        if hasher.hexdigest() != packed.blake3:
            raise StorageError(
                f"{self._archive} is damaged: {packed.name} has the BLAKE3 {hasher.hexdigest()[:16]}, expected "
                f"{packed.blake3[:16]}",
                hint=_HINT,
            )
        self._expect(_padding(packed.size), packed.name)

    def end(self) -> None:
        self._expect(bytes(2 * _UNIT), "its end")
        if self._file.read(1):
            raise StorageError(f"{self._archive} is damaged: bytes follow its end", hint=_HINT)

    def _expect(self, expected: bytes, where: str) -> None:
        found = self._file.read(len(expected))
        if len(found) < len(expected):
            raise StorageError(f"{self._archive} is cut short: it ends in {where}", hint=_HINT)
        if found != expected:
            raise StorageError(f"{self._archive} is damaged in {where}", hint=_HINT)


def _header(name: str, size: int, at: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size, at, 0o600
    return member.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


def _padding(size: int) -> bytes:
    return bytes(-size % _UNIT)


def _json(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()

"""Files that are whole or not there: written under a temporary name, then renamed.

Those that are durable are so after a power cut, too. The others are so after any process was killed, which costs no
wait for the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from gptfl_dist.errors import StorageError

__all__ = ["replacing", "stamp_of", "storage_error", "sync_folder", "write_at", "write_file"]


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True, over: Path | None = None) -> Iterator[int]:
    """A descriptor of a temporary file (0600) that becomes `path` when the block ends well, and vanishes if not.

    `durable`: once it is `path`, a power cut does not take it away. Else that is left to the kernel, which is quicker.
    `over` is a file that nobody needs any more, if it is there: it becomes the temporary one, with its content and
    length, for pages that are there cost less to write than fresh ones.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        known = path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        if over is not None and over.exists():
            over.replace(temporary)
        emptied = os.O_TRUNC if over is None else 0
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | emptied | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o600)  # also where `over` was made by somebody else
            yield fd
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
            if not known:
                sync_folder(path.parent.parent)
    except OSError as error:
        raise storage_error(error, path) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """Changes where a file is written or replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def sync_folder(folder: Path) -> None:
    """Makes what was created and renamed in the folder survive a power cut. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def storage_error(error: OSError, path: Path) -> StorageError:
    """The StorageError that tells a user what an OSError while writing `path` means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{path}: the disk is full", hint="free some space; the same command goes on from there")
    return StorageError(f"{path}: {error.strerror or error}", hint="check the folder and its permissions")


def write_at(fd: int, offset: int, view: memoryview) -> None:
    """Writes all bytes of a view at `offset` of a file. Raises OSError."""
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def write_file(path: Path, content: bytes | str) -> None:
    """Writes a small file in one step, 0600. Raises StorageError where the disk refuses."""
    with replacing(path) as fd, os.fdopen(os.dup(fd), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)

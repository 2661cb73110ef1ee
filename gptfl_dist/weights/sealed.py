"""Files that are encrypted on disk, and read and written at any place all the same.

    magic (16) | id (16) | size (8) | nonce (12) | the file's key, wrapped with the master key (48)
    then of every 64 KiB of content: nonce (12) | the content, encrypted | tag (16)

AES-256-GCM throughout. Each file that is written has a random key of its own, wrapped with the master key together with
the file's id and size; each block is bound to id, size and its place. So a block that was changed, moved, cut off, or
taken from another file or from what this file held before does not decrypt. Nonces are random: of blocks under a key
that is used for one file, each of which is written once.

A process that was given the master key (`use_key`) writes what it writes through `writer` encrypted; without one
nothing changes. Files say themselves whether they are encrypted, so plain ones are read in either case.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from gptfl_dist.errors import StorageError
from gptfl_dist.files import write_at

KEY_BYTES = 32

_MAGIC = b"gptfl sealed 1\n\0"  # no safetensors file begins like this: it would have a header of exabytes
_BLOCK = 64 << 10
_NONCE, _TAG = 12, 16
_OVERHEAD = _NONCE + _TAG
_BOUND = len(_MAGIC) + 16 + 8  # bytes of the header that are bound to the key
_HEADER = _BOUND + _NONCE + KEY_BYTES + _TAG
_RUN = 16  # blocks that are read at a time

_master: AESGCM | None = None


def use_key(key: bytes | None) -> None:
    """From now on this process encrypts what it writes with this master key; with None it does not."""
    global _master
    _master = None if key is None else AESGCM(key)


def in_use() -> bool:
    """Whether this process encrypts what it writes."""
    return _master is not None


class Writer(Protocol):
    """Takes the content of a file, each byte once, in whatever order. `stored` is how long the file gets."""

    stored: int

    def write(self, fd: int, offset: int, view: memoryview) -> None:
        """Raises OSError."""

    def finish(self, fd: int) -> None:
        """All is written. Raises OSError."""


def writer(size: int, *, sealed: bool = True) -> Writer:
    """What writes a file of `size` bytes of content; `sealed` False is for files that leave, which stay plain."""
    if _master is None or not sealed:
        return _PlainWriter(size)
    return _SealedWriter(_master, size)


def stored(size: int) -> int:
    """How long a file of `size` bytes of content is on the disk."""
    return size if _master is None else _stored(size)


class SealedFile:
    """Reads an encrypted file by ranges of its content."""

    def __init__(self, fd: int, path: Path, header: bytes) -> None:
        """Raises StorageError where the key is missing or another, or the file was cut short."""
        self._fd = fd
        self._path = path
        self.size = int.from_bytes(header[_BOUND - 8 : _BOUND], "little")
        self._cipher = _Cipher.opened(header, path)
        self._last = (-1, b"")  # the block that was read last: the next range often begins in it
        if (found := os.fstat(fd).st_size) != _stored(self.size):
            raise StorageError(f"{path}: has {found} bytes, expected {_stored(self.size)}: it is cut short or padded")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with the content from `offset`. Raises StorageError, also where it was changed."""
        if offset + len(buffer) > self.size:
            raise StorageError(f"{self._path}: ends at byte {self.size}, expected more")
        done = 0
        while done < len(buffer):
            first = (offset + done) // _BLOCK
            last = min((offset + len(buffer) - 1) // _BLOCK, first + _RUN - 1)
            for index, content in self._blocks(first, last):
                start = max(offset + done - index * _BLOCK, 0)
                part = memoryview(content)[start : start + len(buffer) - done]
                buffer[done : done + len(part)] = part
                done += len(part)

    def _blocks(self, first: int, last: int) -> list[tuple[int, bytes]]:
        blocks = []
        if self._last[0] == first:
            blocks.append(self._last)
            first += 1
        place = _place(first)
        raw = memoryview(os.pread(self._fd, _place(last + 1) - place, place))
        for index in range(first, last + 1):
            length = _length(self.size, index) + _OVERHEAD
            blocks.append((index, self._cipher.decrypt(index, raw[:length])))
            raw = raw[length:]
        self._last = blocks[-1]
        return blocks


def sealed_in(fd: int, path: Path) -> SealedFile | None:
    """Reads the open file where it is encrypted; None where it is plain. Raises StorageError."""
    header = os.pread(fd, _HEADER, 0)
    return SealedFile(fd, path, header) if header.startswith(_MAGIC) else None


def seal(content: bytes) -> bytes:
    """A small file's content as it is to be written: encrypted, where this process does that."""
    if _master is None:
        return content
    header, cipher = _Cipher.made(_master, len(content))
    parts = (content[start : start + _BLOCK] for start in range(0, len(content), _BLOCK))
    return header + b"".join(cipher.encrypt(index, part) for index, part in enumerate(parts))


def unsealed(content: bytes, path: Path) -> bytes:
    """The reverse; what is plain stays as it is. Raises StorageError."""
    if not content.startswith(_MAGIC):
        return content
    size, raw = int.from_bytes(content[_BOUND - 8 : _BOUND], "little"), memoryview(content)[_HEADER:]
    cipher = _Cipher.opened(content[:_HEADER], path)
    if len(content) != _stored(size):
        raise StorageError(f"{path}: has {len(content)} bytes, expected {_stored(size)}: it is cut short or padded")
    step = _BLOCK + _OVERHEAD
    return b"".join(cipher.decrypt(at // step, raw[at : at + step]) for at in range(0, len(raw), step))


class _PlainWriter:
    def __init__(self, size: int) -> None:
        self.stored = size

    def write(self, fd: int, offset: int, view: memoryview) -> None:
        write_at(fd, offset, view)

    def finish(self, fd: int) -> None:
        os.ftruncate(fd, self.stored)


class _SealedWriter:
    """Encrypts a block once all of it is there; the others wait in memory: few, where writing goes in order."""

    def __init__(self, master: AESGCM, size: int) -> None:
        self.stored = _stored(size)
        self._size = size
        self._header, self._cipher = _Cipher.made(master, size)
        self._waiting: dict[int, tuple[bytearray, int]] = {}  # by block: what is there of it, and how many bytes
        self._written = 0

    def write(self, fd: int, offset: int, view: memoryview) -> None:
        if self._written == 0:
            write_at(fd, 0, memoryview(self._header))
        self._written += len(view)
        while view:
            index, start = divmod(offset, _BLOCK)
            length = _length(self._size, index)
            part = view[: length - start]
            if len(part) == length:
                self._put(fd, index, part)
            else:
                block, filled = self._waiting.pop(index, (bytearray(length), 0))
                block[start : start + len(part)] = part
                if filled + len(part) == length:
                    self._put(fd, index, memoryview(block))
                else:
                    self._waiting[index] = block, filled + len(part)
            view, offset = view[len(part) :], offset + len(part)

    def finish(self, fd: int) -> None:
        if self._written != self._size or self._waiting:
            raise StorageError(f"{self._written} of {self._size} bytes were written")
        if not self._size:
            write_at(fd, 0, memoryview(self._header))
        os.ftruncate(fd, self.stored)

    def _put(self, fd: int, index: int, content: memoryview) -> None:
        write_at(fd, _place(index), memoryview(self._cipher.encrypt(index, content)))


@dataclass(frozen=True, slots=True)
class _Cipher:
    """What encrypts the blocks of one file; `bound` are its id and size."""

    key: AESGCM
    bound: bytes
    path: Path | None = None

    @classmethod
    def made(cls, master: AESGCM, size: int) -> tuple[bytes, _Cipher]:
        """A new file's header, and what encrypts it."""
        bound = _MAGIC + os.urandom(16) + size.to_bytes(8, "little")
        key, nonce = AESGCM.generate_key(8 * KEY_BYTES), os.urandom(_NONCE)
        return bound + nonce + master.encrypt(nonce, key, bound), cls(AESGCM(key), bound)

    @classmethod
    def opened(cls, header: bytes, path: Path) -> _Cipher:
        """Raises StorageError."""
        if _master is None:
            raise StorageError(f"{path} is encrypted, and no key was given", hint="name its key under at_rest")
        bound, nonce, wrapped = header[:_BOUND], header[_BOUND : _BOUND + _NONCE], header[_BOUND + _NONCE : _HEADER]
        try:
            return cls(AESGCM(_master.decrypt(nonce, wrapped, bound)), bound, path)
        except (InvalidTag, ValueError):
            raise StorageError(
                f"{path} was encrypted with another key than that of at_rest, or its beginning was changed",
                hint="name the key that it was written with",
            ) from None

    def encrypt(self, index: int, content: bytes | memoryview) -> bytes:
        nonce = os.urandom(_NONCE)
        return nonce + self.key.encrypt(nonce, content, self._place_of(index))

    def decrypt(self, index: int, block: memoryview) -> bytes:
        try:
            return self.key.decrypt(block[:_NONCE], block[_NONCE:], self._place_of(index))
        except (InvalidTag, ValueError):
            raise StorageError(
                f"{self.path} is damaged: its block {index} was changed, moved or cut off",
                hint="bring the file back from a backup",
            ) from None

    def _place_of(self, index: int) -> bytes:
        return self.bound + index.to_bytes(8, "little")


def _length(size: int, index: int) -> int:
    """Bytes of content in a block."""
    return min(_BLOCK, size - index * _BLOCK)


def _place(index: int) -> int:
    """Where a block begins in the file."""
    return _HEADER + index * (_BLOCK + _OVERHEAD)


def _stored(size: int) -> int:
    return _HEADER + size + -(-size // _BLOCK) * _OVERHEAD

"""Weights on disk: a safetensors file whose data section is the flat buffer of the layout.

`WeightsFile` reads any range of the flat buffer with `pread`, so a model is sent or aggregated without being held in
memory. `write_weights` takes the buffer block by block, writes to a temporary file and renames it when it is whole;
`overwrite_weights` writes in place, for files that pass from one process to another with their digest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, Self

from blake3 import blake3

from gptfl_dist.errors import ModelError, StorageError
from gptfl_dist.files import replacing, storage_error
from gptfl_dist.weights.layout import Layout
from gptfl_dist.weights.sealed import SealedFile, sealed_in, writer

BLOCK = 256 << 10
"""Bytes that are read or written at a time: few enough to stay in a core's cache."""

_MAX_HEADER = 100_000_000  # the format's own limit


class FlatReader(Protocol):
    """Reads ranges of a flat buffer, as `WeightsFile` and a spool do."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with the flat buffer's bytes from `offset`. Raises StorageError if they are not there."""


def digest_of(reader: FlatReader, size: int) -> str:
    """BLAKE3 of a flat buffer of `size` bytes, in hex."""
    hasher = blake3()
    for block in blocks(reader, size):
        hasher.update(block)
    return hasher.hexdigest()


def blocks(reader: FlatReader, size: int) -> Iterator[memoryview]:
    """A flat buffer of `size` bytes block by block, each in the same memory."""
    memory = memoryview(bytearray(min(BLOCK, size)))
    for offset in range(0, size, BLOCK):
        block = memory[: size - offset]
        reader.read_into(offset, block)
        yield block


class WeightsFile:
    """An open safetensors file read by ranges of its flat buffer. A context manager."""

    def __init__(self, path: Path) -> None:
        """Opens and checks the header. Raises ModelError if the file is no safetensors file of a gapless layout.

        Raises StorageError where it is encrypted and this process has not its key.
        """
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}", hint="name an existing .safetensors file") from None
        try:
            self._sealed = sealed_in(self._fd, path)  # None where it is plain
            self.layout, self._start = _read_header(self._fd, path, self._sealed)
        except BaseException:
            os.close(self._fd)
            raise
        self.nbytes = self.layout.nbytes

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes of the flat buffer from `offset`. Raises StorageError if the file ends early."""
        if self._sealed is not None:
            sealed = bytearray(size)
            self._sealed.read_into(self._start + offset, memoryview(sealed))
            return bytes(sealed)
        data = os.pread(self._fd, size, self._start + offset)
        if len(data) != size:
            raise StorageError(f"{self.path}: ends at byte {offset + len(data)} of the flat buffer, expected more")
        return data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with the flat buffer's bytes from `offset`. Raises StorageError if the file ends early."""
        if self._sealed is not None:
            self._sealed.read_into(self._start + offset, buffer)
            return
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], self._start + offset + done)
            if count <= 0:
                raise StorageError(f"{self.path}: ends at byte {offset + done} of the flat buffer, expected more")
            done += count

    def digest(self) -> str:
        """BLAKE3 of the flat buffer, in hex."""
        return digest_of(self, self.nbytes)

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_header(fd: int, path: Path, sealed: SealedFile | None) -> tuple[Layout, int]:
    """The layout and the place of the data section."""

    def read(count: int, offset: int) -> bytes:
        if sealed is None:
            return os.pread(fd, count, offset)
        content = bytearray(max(0, min(count, sealed.size - offset)))
        sealed.read_into(offset, memoryview(content))
        return bytes(content)

    size = os.fstat(fd).st_size if sealed is None else sealed.size
    length = int.from_bytes(read(8, 0), "little")
    if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise ModelError(f"{path}: not a safetensors file", hint="expected weights as safetensors; no pickle is read")
    try:
        header = json.loads(read(length, 8))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        layout = Layout.of((name, tuple(entry["shape"]), entry["dtype"]) for name, entry in entries.items())
        offsets = {name: tuple(entry["data_offsets"]) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ModelError(f"{path}: its safetensors header cannot be read") from None
    for tensor in layout.tensors:
        if offsets[tensor.name] != (tensor.offset, tensor.offset + tensor.nbytes):
            raise ModelError(
                f"{path}: tensor {tensor.name} lies at {offsets[tensor.name]}, not in layout order",
                hint="write it anew from its model: gptfl_dist.weights.flat.FlatModel(model).save(path)",
            )
    if size != 8 + length + layout.nbytes:
        raise ModelError(f"{path}: has {size} bytes, expected {8 + length + layout.nbytes}: it is cut short or padded")
    return layout, 8 + length


def header_of(layout: Layout, metadata: Mapping[str, str] | None = None) -> bytes:
    """The safetensors header of a layout: eight bytes of length, then JSON padded so that the data is aligned."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    entries |= {
        t.name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.offset, t.offset + t.nbytes]}
        for t in layout.tensors
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


def write_weights(
    path: Path,
    layout: Layout,
    blocks: Iterable[bytes | bytearray | memoryview],
    *,
    durable: bool = True,
    over: Path | None = None,
    metadata: Mapping[str, str] | None = None,
    sealed: bool = True,
) -> str:
    """Writes the flat buffer given as consecutive blocks; returns its BLAKE3 digest in hex.

    The file is whole or not there; see `files.replacing` for `durable` and `over`. `metadata` stands in the header, for
    people and other programs: nothing here reads it. `sealed` False leaves it plain, whatever this process encrypts.
    Raises StorageError where the disk refuses, ModelError if the
    blocks are not as long as the layout.
    """
    with replacing(path, durable=durable, over=over) as fd:
        return _fill(fd, path, layout, blocks, metadata, sealed=sealed)


def overwrite_weights(path: Path, layout: Layout, blocks: Iterable[bytes | bytearray | memoryview]) -> str:
    """Like `write_weights`, but over the pages of the file that is there, which costs less than fresh ones.

    A file that a crash leaves half-written is told by its digest alone, so nobody may rely on it before that is known.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            return _fill(fd, path, layout, blocks)
        finally:
            os.close(fd)
    except OSError as error:
        raise storage_error(error, path) from None


def _fill(
    fd: int,
    path: Path,
    layout: Layout,
    blocks: Iterable[bytes | bytearray | memoryview],
    metadata: Mapping[str, str] | None = None,
    *,
    sealed: bool = True,
) -> str:
    """Writes a whole file, whatever it held before."""
    header = memoryview(header_of(layout, metadata))
    hasher, written = blake3(), 0
    out = writer(len(header) + layout.nbytes, sealed=sealed)
    out.write(fd, 0, header)
    for block in blocks:
        view = memoryview(block).cast("B")
        if written + len(view) <= layout.nbytes:
            out.write(fd, len(header) + written, view)
        hasher.update(view)
        written += len(view)
    if written != layout.nbytes:
        raise ModelError(f"{path}: {written} bytes of weights given, the layout has {layout.nbytes}")
    out.finish(fd)
    return hasher.hexdigest()

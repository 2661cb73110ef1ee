"""Encrypted files: they read as they were written, and nothing else reads at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.errors import StorageError
from gptfl_dist.weights import Layout, WeightsFile, overwrite_weights, write_weights
from gptfl_dist.weights.sealed import SealedFile, seal, sealed_in, unsealed, use_key, writer

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
BLOCK = 64 << 10
STORED = BLOCK + 28
SIZE = 3 * BLOCK + 100
LAYOUT = Layout.of([("w", (50_000,), "F32")])
FLAT = np.random.default_rng(1).bytes(LAYOUT.nbytes)


@pytest.fixture(autouse=True)
def key() -> Iterator[None]:
    use_key(KEY)
    yield
    use_key(None)


def written(path: Path, content: bytes, cuts: list[int]) -> Path:
    """A file that was written in pieces, the last first."""
    out = writer(len(content))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    places = sorted({0, len(content), *(min(cut, len(content)) for cut in cuts)})
    for start, stop in reversed(list(pairwise(places))):
        out.write(fd, start, memoryview(content)[start:stop])
    out.finish(fd)
    os.close(fd)
    return path


def opened(path: Path) -> SealedFile:
    found = sealed_in(os.open(path, os.O_RDONLY), path)
    assert found is not None
    return found


def read(path: Path, start: int, stop: int) -> bytes:
    content = bytearray(stop - start)
    opened(path).read_into(start, memoryview(content))
    return bytes(content)


@given(
    size=st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, SIZE]),
    cuts=st.lists(st.integers(0, SIZE), max_size=6),
    ranges=st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=6),
)
def test_any_range_reads_as_it_was_written_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, size: int, cuts: list[int], ranges: list[tuple[int, int]]
) -> None:
    content = np.random.default_rng(size).bytes(size)
    path = written(tmp_path_factory.getbasetemp() / "sealed", content, cuts)
    file = opened(path)
    for one, other in ranges:
        start, stop = sorted((min(one, size), min(other, size)))
        buffer = bytearray(stop - start)
        file.read_into(start, memoryview(buffer))
        assert bytes(buffer) == content[start:stop]
    with pytest.raises(StorageError, match="ends at byte"):
        file.read_into(size, memoryview(bytearray(1)))


def test_every_changed_swapped_or_replayed_block_is_found(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(SIZE)
    path = written(tmp_path / "a", content, [])
    whole = path.read_bytes()
    header = len(whole) - 3 * STORED - 128
    first, second = (whole[header + i * STORED : header + (i + 1) * STORED] for i in (0, 1))
    again = written(tmp_path / "b", content, []).read_bytes()  # the same content under another key
    forged = {
        "swapped": whole[:header] + second + first + whole[header + 2 * STORED :],
        "doubled": whole[:header] + first + first + whole[header + 2 * STORED :],
        "of another file": whole[:header] + again[header : header + STORED] + whole[header + STORED :],
    }
    for place in range(header, len(whole), 7919):
        forged[f"byte {place}"] = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for stored in forged.values():
        path.write_bytes(stored)
        with pytest.raises(StorageError, match="was changed, moved or cut off"):
            read(path, 0, SIZE)


def test_a_header_that_was_changed_and_a_file_that_was_cut_short_do_not_open(tmp_path: Path) -> None:
    path = written(tmp_path / "a", bytes(SIZE), [])
    whole = path.read_bytes()
    for place in range(16, 100):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(StorageError, match="another key"):
            opened(path)
    for stored in (whole[:-1], whole[:-128], whole + b"\0", whole[: -STORED - 128]):
        path.write_bytes(stored)
        with pytest.raises(StorageError, match="cut short or padded"):
            opened(path)


def test_another_key_or_none_is_said(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_weights(path, LAYOUT, [FLAT])
    use_key(OTHER)
    with pytest.raises(StorageError, match="encrypted with another key"):
        WeightsFile(path)
    use_key(None)
    with pytest.raises(StorageError, match="is encrypted, and no key was given"):
        WeightsFile(path)


def test_weights_have_the_same_digest_and_no_window_of_them_is_on_the_disk(tmp_path: Path) -> None:
    sealed, over, left = (tmp_path / f"{name}.safetensors" for name in ("sealed", "over", "left"))
    digest = write_weights(sealed, LAYOUT, [FLAT[:1000], FLAT[1000:]])
    assert overwrite_weights(over, LAYOUT, [FLAT]) == digest
    assert write_weights(left, LAYOUT, [FLAT], sealed=False) == digest
    for path in (sealed, over):
        stored = path.read_bytes()
        assert not any(FLAT[start : start + 8] in stored for start in range(0, len(FLAT), 4096))
        with WeightsFile(path) as weights:
            assert weights.digest() == digest
            assert weights.read(77, 70_000) == FLAT[77:70_077]
    use_key(None)
    with WeightsFile(left) as plain:
        assert plain.digest() == digest


def test_plain_weights_are_read_beside_encrypted_ones(tmp_path: Path) -> None:
    use_key(None)
    digest = write_weights(tmp_path / "w.safetensors", LAYOUT, [FLAT])
    use_key(KEY)
    with WeightsFile(tmp_path / "w.safetensors") as weights:
        assert weights.digest() == digest


@given(st.binary(max_size=200), st.sampled_from([0, BLOCK - 50, 2 * BLOCK]))
def test_small_files_too(text: bytes, more: int) -> None:
    content = text + bytes(more)
    stored = seal(content)
    assert unsealed(stored, Path("x")) == content
    if text and more:
        assert content[:64] not in stored
    with pytest.raises(StorageError):
        unsealed(stored[:-1], Path("x"))


def test_no_two_files_or_blocks_share_a_nonce_or_a_key(tmp_path: Path) -> None:
    nonces = set()
    for name in range(20):
        stored = written(tmp_path / str(name), bytes(SIZE), []).read_bytes()
        nonces |= {stored[100 + block * STORED :][:12] for block in range(4)} | {stored[40:52]}
    assert len(nonces) == 20 * 5


def test_what_was_not_written_whole_is_said(tmp_path: Path) -> None:
    out = writer(10)
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    out.write(fd, 0, memoryview(b"12345"))
    with pytest.raises(StorageError, match="5 of 10 bytes"):
        out.finish(fd)
    os.close(fd)

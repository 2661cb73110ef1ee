"""Where a rank keeps weights that were broadcast: in as few files as silos need, none of them changed under a silo."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import numpy as np
import pytest
from blake3 import blake3

from gptfl_dist.errors import ProtocolError
from gptfl_dist.exchange.collective.silo import FileKeeper
from gptfl_dist.weights import Layout, WeightsFile

LAYOUT = Layout.of([("w", (300_000,), "F32")])
SMALLER = Layout.of([("w", (5,), "F32")])


class Broadcast:
    """A broadcast that brings these bytes, part by part."""

    def __init__(self, content: bytes) -> None:
        self._rest = memoryview(content)

    async def _arrive(self, part: np.ndarray) -> None:
        part[:] = np.frombuffer(self._rest[: len(part)], np.uint8)
        self._rest = self._rest[len(part) :]

    def broadcast(self, part: np.ndarray) -> Awaitable[None]:
        return self._arrive(part)


def content_of(number: int, layout: Layout = LAYOUT) -> bytes:
    return np.random.default_rng(number).bytes(layout.nbytes)


def digest_of(content: bytes) -> str:
    return blake3(content).hexdigest()


CONTENTS = [(content_of(1), LAYOUT), (content_of(2, SMALLER), SMALLER)]


def round_of(keeper: FileKeeper, number: int, *paths, layout: Layout = LAYOUT) -> None:
    """What a round asks of the keeper: the weights before are dropped, these come, and some silos take them."""
    content = content_of(number, layout)

    async def take() -> None:
        keeper.keep_only([digest_of(content)])
        await keeper.take(Broadcast(content), digest_of(content), layout)
        for path in paths:
            await keeper.fetch(digest_of(content), path)

    asyncio.run(take())


def read(path) -> bytes:
    with WeightsFile(path) as file:
        return file.read(0, file.nbytes)


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "broadcast" in path.name)


def test_weights_are_written_over_files_that_nobody_needs_any_more(tmp_path):
    keeper, path = FileKeeper(tmp_path), tmp_path / "weights.safetensors"
    inodes = []
    for number in range(6):
        round_of(keeper, number, path)
        assert read(path) == content_of(number)
        inodes.append(path.stat().st_ino)
    assert len(set(inodes)) == 2
    assert len(files(tmp_path)) == 2


def test_a_silo_that_trains_on_keeps_the_weights_it_began_with(tmp_path):
    keeper, slow, quick = FileKeeper(tmp_path), tmp_path / "slow.safetensors", tmp_path / "quick.safetensors"
    round_of(keeper, 0, slow, quick)
    for number in range(1, 6):
        round_of(keeper, number, quick)
        assert read(slow) == content_of(0)
        assert read(quick) == content_of(number)
    assert len(files(tmp_path)) == 3
    round_of(keeper, 6, slow, quick)
    round_of(keeper, 7, slow, quick)
    assert read(slow) == read(quick) == content_of(7)
    assert len(files(tmp_path)) == 2


def test_weights_of_another_size_fit_into_a_file_that_was_written_over(tmp_path):
    keeper, path = FileKeeper(tmp_path), tmp_path / "weights.safetensors"
    for number in range(6):
        layout = LAYOUT if number % 2 else SMALLER
        round_of(keeper, number, path, layout=layout)
        assert read(path) == content_of(number, layout)


def test_what_an_earlier_run_left_is_used_again(tmp_path):
    round_of(FileKeeper(tmp_path), 0)
    half_written = tmp_path / ".broadcast-abc.safetensors.99.part"
    half_written.write_bytes(b"half")
    half_written.chmod(0o644)
    keeper, path = FileKeeper(tmp_path), tmp_path / "weights.safetensors"
    round_of(keeper, 1, path)
    round_of(keeper, 2, path)
    assert read(path) == content_of(2)
    assert len(files(tmp_path)) == 2
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in files(tmp_path)} == {0o600}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_job_that_goes_on_gets_all_that_is_handed_out_at_once(tmp_path, order):
    """Such as weights and synthetic samples. Files of their names are there, from before."""
    contents = {digest_of(content): (content, layout) for content, layout in (CONTENTS[number] for number in order)}

    async def job() -> None:
        keeper = FileKeeper(tmp_path)
        keeper.keep_only(contents)
        for digest, (content, layout) in contents.items():
            await keeper.take(Broadcast(content), digest, layout)
        for digest in contents:
            await keeper.fetch(digest, tmp_path / f"{digest}.safetensors")

    asyncio.run(job())
    asyncio.run(job())
    for digest, (content, _) in contents.items():
        assert read(tmp_path / f"{digest}.safetensors") == content


def test_weights_with_another_digest_than_told_are_not_kept(tmp_path):
    """Over `trust: tls` all silos know the key of broadcasts: this is what keeps one from sending its own."""
    keeper, content = FileKeeper(tmp_path), content_of(1)
    keeper.keep_only([])
    with pytest.raises(ProtocolError, match="do not have the digest that was announced"):
        asyncio.run(keeper.take(Broadcast(content_of(2)), digest_of(content), LAYOUT))
    assert not files(tmp_path)

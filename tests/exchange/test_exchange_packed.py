"""Chunks that are packed on their way over gRPC: the same files arrive, in fewer bytes, wherever a line breaks."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from exchange_world import PLAN, World, header_of, in_loop, train_order, whole

from gptfl_dist.config.wire import Compression
from gptfl_dist.exchange.base import Disconnected, OrderFailed, Receipt
from gptfl_dist.exchange.grpc import frames
from gptfl_dist.testing.proxy import TcpProxy
from gptfl_dist.weights import Layout, WeightsFile, write_weights

PACKED = PLAN.model_copy(update={"compression": Compression(lossless="zstd")})
LAYOUT = Layout.of([("n", (5,), "I64"), ("w", (4 << 20,), "F32")])  # 16 MiB
FLAT = bytes(40) + (np.random.default_rng(0).standard_normal(4 << 20).astype(np.float16).astype("<f4")).tobytes()


@pytest.fixture
def file(tmp_path):
    """Numbers with some zeros at their ends, as an open weights file, and their digest."""
    digest = write_weights(tmp_path / "w", LAYOUT, [FLAT])
    with WeightsFile(tmp_path / "w") as weights:
        yield weights, digest


@pytest.mark.parametrize("cut_at", [3_001, 5 << 20])
@in_loop
async def test_a_packed_download_goes_on_where_it_was_cut(tmp_path, file, cut_at):
    weights, digest = file
    async with World(tmp_path, LAYOUT, plan=PACKED) as world, TcpProxy(world.server.port) as proxy:
        await world.server.publish({digest: weights})
        silo = await world.joined(port=proxy.port)
        proxy.cut_down = proxy.down + cut_at
        with contextlib.suppress(Disconnected):
            await silo.download(digest, LAYOUT, tmp_path / "got")
        await silo.connect()
        await silo.download(digest, LAYOUT, tmp_path / "got")
        assert proxy.cuts == 1
        with WeightsFile(tmp_path / "got") as got:
            assert got.read(0, got.nbytes) == FLAT
        assert world.server.traffic.down < 0.8 * len(FLAT)  # what was in buffers when it was cut went out twice
        assert 0.4 * len(FLAT) < proxy.down < 0.8 * len(FLAT)


@pytest.mark.parametrize("cut_at", [3_001, 5 << 20])
@in_loop
async def test_a_packed_upload_goes_on_where_it_was_cut(tmp_path, file, cut_at):
    update, digest = file
    order = train_order("n1", "00" * 32)
    async with World(tmp_path, LAYOUT, plan=PACKED) as world, TcpProxy(world.server.port) as proxy:
        silo = await world.joined(port=proxy.port)
        await world.give("alice", order)
        proxy.cut_up = proxy.up + cut_at
        with pytest.raises(Disconnected):
            await silo.upload(header_of(order, LAYOUT, digest), update)
        await silo.connect()
        assert await silo.upload(header_of(order, LAYOUT, digest), update) == Receipt(True)
        assert whole(world.inbox.updates(("alice",))["alice"]) == FLAT
        assert 0.4 * len(FLAT) < world.server.traffic.up < proxy.up < 0.8 * len(FLAT)


def packed_chunk(source, offset, size):
    return frames.pack_chunk(offset, source.read(offset, size), 4)[0]


@in_loop
async def test_packed_chunks_that_were_not_agreed_on_are_refused(tmp_path, file, monkeypatch):
    update, digest = file
    order = train_order("n1", "00" * 32)
    async with World(tmp_path, LAYOUT) as world:
        silo = await world.joined()
        await world.give("alice", order)
        monkeypatch.setattr(frames, "read_chunk", packed_chunk)
        receipt = await silo.upload(header_of(order, LAYOUT, digest), update)
        assert receipt == Receipt(False, "a chunk is packed, which was not agreed on")
        assert isinstance(await world.event(), OrderFailed)

"""Frames that silos share: the same bytes for each, however far apart they read, and one reading for those in step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.exchange.grpc.frames import decode_chunk
from gptfl_dist.exchange.grpc.shared import SharedFrames
from gptfl_dist.weights import Layout, WeightsFile, write_weights

CHUNK = 1 << 20
LAYOUT = Layout.of([("w", (12 << 20,), "F32")])  # 48 MiB: more than is kept
FLAT = np.arange(12 << 20, dtype="<f4").tobytes()


class Counting(WeightsFile):
    """Counts the bytes that are read."""

    count = 0

    def read(self, offset, size):
        self.count += size
        return super().read(offset, size)

    def read_into(self, offset, buffer):
        self.count += len(buffer)
        super().read_into(offset, buffer)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("shared") / "w"
    write_weights(path, LAYOUT, [FLAT], durable=False)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_silos_in_step_cost_one_reading(path, packed):
    with Counting(path) as weights:
        shared = SharedFrames(CHUNK, packed=packed)
        for offset in range(0, weights.nbytes, CHUNK):
            for _ in range(4):
                frame, carried = shared.frame("d", weights, offset)
                assert decode_chunk(frame, CHUNK).data == FLAT[offset : offset + CHUNK]
                assert carried <= len(frame)
        assert weights.count == weights.nbytes


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, len(FLAT) - 1)), max_size=6))
def test_a_frame_is_that_of_its_weights_and_its_place(path, asked):
    with WeightsFile(path) as one, Counting(path) as other:
        other.read_into = lambda offset, buffer: buffer.__setitem__(slice(None), bytes(len(buffer)))
        shared = SharedFrames(CHUNK, packed=False)
        for digest, offset in asked:
            frame, _ = shared.frame(digest, one if digest == "a" else other, offset)
            expected = FLAT[offset : offset + CHUNK]
            assert decode_chunk(frame).offset == offset
            assert decode_chunk(frame).data == (expected if digest == "a" else bytes(len(expected)))


def test_a_silo_far_behind_gets_its_bytes_and_memory_stays_bounded(path):
    with Counting(path) as weights:
        shared = SharedFrames(CHUNK, packed=False)
        for offset in range(0, weights.nbytes, CHUNK):
            shared.frame("d", weights, offset)
        frame, _ = shared.frame("d", weights, 0)
        assert decode_chunk(frame).data == FLAT[:CHUNK]
        assert weights.count == weights.nbytes + CHUNK  # it was not kept all the while

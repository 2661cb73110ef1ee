"""A frame is what protobuf calls a Chunk, and anything else is refused."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import zstandard
from flat_buffers import Flat
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.errors import ProtocolError
from gptfl_dist.exchange.grpc import exchange_pb2 as pb
from gptfl_dist.exchange.grpc.frames import MAX_OVERHEAD, decode_chunk, encode_chunk, pack_chunk, read_chunk, width_of
from gptfl_dist.weights import Layout

offsets = st.integers(0, 2**64 - 1)
payloads = st.binary(min_size=1, max_size=300)


@given(offsets, payloads)
def test_protobuf_reads_our_frames(offset, data):
    frame = encode_chunk(offset, data)
    chunk = pb.Chunk.FromString(frame)
    assert (chunk.offset, chunk.data) == (offset, data)
    assert len(frame) <= len(data) + MAX_OVERHEAD
    assert decode_chunk(frame) == (offset, data, len(data))


@given(offsets, payloads)
def test_we_read_protobufs_chunks(offset, data):
    assert decode_chunk(pb.Chunk(offset=offset, data=data).SerializeToString()) == (offset, data, len(data))


@given(st.binary(min_size=1, max_size=300), st.data())
def test_a_frame_that_is_read_from_a_flat_buffer_is_that_of_its_bytes(content, draw):
    offset = draw.draw(st.integers(0, len(content) - 1))
    size = draw.draw(st.integers(1, len(content) - offset))
    frame = read_chunk(Flat(content), offset, size)
    assert type(frame) is bytes
    assert frame == encode_chunk(offset, content[offset : offset + size])
    assert hash(frame) == hash(encode_chunk(offset, content[offset : offset + size]))


def test_the_largest_frame_stays_within_its_overhead():
    assert len(encode_chunk(2**64 - 1, bytes(1 << 24))) <= (1 << 24) + MAX_OVERHEAD


tags = st.sampled_from([b"\x08", b"\x12", b"\x12\x05", b"\x80", b"\xff" * 9, b"\xff" * 11, b"\x01", b"hello"])


@given(st.one_of(st.binary(max_size=64), st.lists(tags, max_size=6).map(b"".join)))
def test_anything_else_is_a_protocol_error(frame):
    try:
        offset, data, _ = decode_chunk(frame)
    except ProtocolError:
        return
    # What is taken lies within the frame to its last byte, and means the same to protobuf.
    assert bytes(data) == frame[len(frame) - len(data) :]
    chunk = pb.Chunk.FromString(frame)
    assert (chunk.offset, chunk.data) == (offset, bytes(data))


@given(offsets, payloads, st.data())
def test_a_frame_that_was_cut_or_extended_is_refused(offset, data, draw):
    frame = encode_chunk(offset, data)
    cut = draw.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(ProtocolError):
        decode_chunk(frame[:cut])
    with pytest.raises(ProtocolError):
        decode_chunk(frame + b"\0")


@pytest.mark.parametrize("frame", [b"\x08" + b"\x80" * 10 + b"\x00\x12\x01x", b"\x12\x81\x80\x80\x80\x80\x00x"])
def test_a_number_of_more_bytes_than_protobuf_takes_is_refused(frame):
    with pytest.raises(DecodeError):
        pb.Chunk.FromString(frame)
    with pytest.raises(ProtocolError, match="broken number"):
        decode_chunk(frame)


def test_an_empty_chunk_is_refused():
    with pytest.raises(ProtocolError):
        decode_chunk(b"\x08\x00\x12\x00")


LIMIT = 4096


@given(offsets, st.binary(min_size=1, max_size=12), st.integers(1, 300), st.sampled_from([1, 2, 4, 8]))
def test_a_packed_chunk_is_unpacked_to_what_it_was(offset, pattern, times, width):
    data = pattern * times
    frame, carried = pack_chunk(offset, data, width)
    assert decode_chunk(frame, len(data)) == (offset, data, carried)
    assert len(frame) <= carried + MAX_OVERHEAD
    assert carried <= len(data)
    chunk = pb.Chunk.FromString(frame)
    assert (chunk.offset, len(chunk.data or chunk.zstd)) == (offset, carried)


def test_what_does_not_shrink_goes_as_it_is_and_numbers_shrink_by_their_planes():
    noise = np.random.default_rng(0).bytes(LIMIT)
    assert pack_chunk(7, noise, 4) == (encode_chunk(7, noise), LIMIT)
    normal = np.random.default_rng(0).standard_normal(LIMIT).astype("<f4")
    frame, carried = pack_chunk(0, normal.tobytes(), 4)
    assert carried < 0.95 * normal.nbytes
    assert decode_chunk(frame, normal.nbytes).data == normal.tobytes()


def packed(content: bytes, width: int = 1) -> bytes:
    """A frame with any bytes in the place of packed data."""
    return pb.Chunk(offset=1, zstd=content, width=width).SerializeToString()


def test_a_packed_chunk_is_refused_where_none_was_agreed_on():
    with pytest.raises(ProtocolError, match="not agreed"):
        decode_chunk(packed(zstandard.compress(b"a" * 100)))


@pytest.mark.parametrize(
    "content",
    [
        zstandard.compress(bytes(LIMIT + 1)),
        zstandard.compress(bytes(1 << 28)),  # a few KB that would be 256 MiB
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 28)),  # does not say so
        zstandard.compress(b"a" * 100) + zstandard.compress(b"b" * 100),  # a second frame behind the first
        zstandard.compress(b"a" * 100) + b"\0",
        zstandard.compress(b""),
        b"\x50\x2a\x4d\x18\x04\0\0\0abcd",  # a frame that decoders skip
        b"\x28\xb5\x2f\xfd\xa0\xff\xff\xff\xff" + bytes(20),  # announces 4 GiB
        b"no zstd",
    ],
    ids=["too long", "bomb", "silent bomb", "two frames", "tail", "empty", "skippable", "announced", "garbage"],
)
def test_a_decompression_bomb_is_refused_before_memory_is_taken(content):
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="packed chunk"):
            decode_chunk(packed(content), LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("width", [0, 3, 5, 16, 2**32 - 1])
def test_a_width_that_no_number_has_is_refused(width):
    with pytest.raises(ProtocolError, match="packed chunk"):
        decode_chunk(packed(zstandard.compress(b"a" * 100), width), LIMIT)


good = zstandard.compress(bytes(range(256)) * 4)


@given(st.one_of(st.binary(max_size=64), st.tuples(st.integers(0, len(good) - 1), st.binary(min_size=1, max_size=4))))
def test_damaged_packed_data_are_refused_or_unpack_to_the_size_announced(damage):
    content = damage
    if isinstance(damage, tuple):
        place, wrong = damage
        content = good[:place] + wrong + good[place + len(wrong) :]
    try:
        chunk = decode_chunk(packed(content), LIMIT)
    except ProtocolError:
        return
    assert 0 < len(chunk.data) <= LIMIT


def test_the_width_is_that_of_most_of_the_bytes():
    assert width_of(Layout.of([("n", (3,), "I64"), ("w", (100,), "F32"), ("b", (10,), "F16")])) == 4
    assert width_of(Layout.of([("b", (10,), "BF16")])) == 2
    assert width_of(Layout.of([])) == 1

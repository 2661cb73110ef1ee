"""A frame is what protobuf calls a Chunk, and anything else is refused."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.errors import ProtocolError
from gptfl_dist.exchange.grpc import exchange_pb2 as pb
from gptfl_dist.exchange.grpc.frames import MAX_OVERHEAD, decode_chunk, encode_chunk

offsets = st.integers(0, 2**64 - 1)
payloads = st.binary(min_size=1, max_size=300)


@given(offsets, payloads)
def test_protobuf_reads_our_frames(offset, data):
    frame = encode_chunk(offset, data)
    chunk = pb.Chunk.FromString(frame)
    assert (chunk.offset, chunk.data) == (offset, data)
    assert len(frame) <= len(data) + MAX_OVERHEAD
    assert decode_chunk(frame) == (offset, data)


@given(offsets, payloads)
def test_we_read_protobufs_chunks(offset, data):
    assert decode_chunk(pb.Chunk(offset=offset, data=data).SerializeToString()) == (offset, data)


def test_the_largest_frame_stays_within_its_overhead():
    assert len(encode_chunk(2**64 - 1, bytes(1 << 24))) <= (1 << 24) + MAX_OVERHEAD


tags = st.sampled_from([b"\x08", b"\x12", b"\x12\x05", b"\x80", b"\xff" * 9, b"\xff" * 11, b"\x01", b"hello"])


@given(st.one_of(st.binary(max_size=64), st.lists(tags, max_size=6).map(b"".join)))
def test_anything_else_is_a_protocol_error(frame):
    try:
        offset, data = decode_chunk(frame)
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

"""Chunk messages, encoded and decoded by hand: a flat buffer's bytes never pass through protobuf.

A frame is a protobuf encoding of `Chunk{offset, data}` with both fields always present and in field order, so any
protobuf reader understands it. Its numbers are padded to their full length, as protobuf allows, so that the data begins
at byte 16 of every frame: aligned for the arithmetic on it.
"""

from __future__ import annotations

from gptfl_dist.errors import ProtocolError

MAX_OVERHEAD = 32
"""A frame is at most this many bytes longer than its data; ours are 16."""

_OFFSET_TAG = 0x08  # field 1, varint
_DATA_TAG = 0x12  # field 2, length-delimited


def encode_chunk(offset: int, data: bytes) -> bytes:
    """The frame of `data` at byte `offset` of the flat buffer."""
    return b"".join((b"\x08", _varint(offset, 10), b"\x12", _varint(len(data), 4), data))


def decode_chunk(frame: bytes) -> tuple[int, memoryview]:
    """The offset and the data, which is a view into `frame`. Raises ProtocolError."""
    view = memoryview(frame)
    position = 0
    offset = 0
    if position < len(view) and view[position] == _OFFSET_TAG:
        offset, position = _read_varint(view, position + 1, 10)
    if position >= len(view) or view[position] != _DATA_TAG:
        raise ProtocolError("a frame is no chunk: its data field is missing")
    length, position = _read_varint(view, position + 1, 5)
    if length == 0 or position + length != len(view):
        raise ProtocolError(f"a chunk announces {length} bytes and carries {len(view) - position}")
    return offset, view[position:]


def _varint(value: int, length: int) -> bytes:
    """A number in seven bits a byte, the lowest first; all bytes but the last say that another follows."""
    return bytes((value >> 7 * place) & 0x7F | (0x80 if place < length - 1 else 0) for place in range(length))


def _read_varint(view: memoryview, position: int, longest: int) -> tuple[int, int]:
    """A number of at most `longest` bytes, as protobuf takes them, and where it ends."""
    value = 0
    for shift in range(0, 7 * longest, 7):
        if position >= len(view):
            break
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value, position
    raise ProtocolError("a chunk holds a broken number")

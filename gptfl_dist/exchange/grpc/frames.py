"""Chunk messages, encoded and decoded by hand: a flat buffer's bytes never pass through protobuf.

A frame is a protobuf encoding of `Chunk{offset, data}`, or of `Chunk{offset, zstd, width}` where the chunk is packed,
with these fields always present and in this order, so any protobuf reader understands it. Its numbers are padded to
their full length, as protobuf allows, so that the data begins at byte 16 of every frame: aligned for the arithmetic on
it.

Packing is zstd at its quickest level. The bytes of numbers stand in planes first: all first bytes, then all second
bytes, for signs and exponents are alike and mantissas are noise. Of real updates in fp32 that leaves 68 % instead of
81 % of the bytes. Offsets count unpacked bytes, so a broken transfer goes on wherever it stopped.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import NamedTuple

import numpy as np
import zstandard

from gptfl_dist.errors import ProtocolError
from gptfl_dist.weights import ITEM_SIZE, FlatReader, Layout

MAX_OVERHEAD = 32
"""A frame is at most this many bytes longer than its data; ours are 16, or 18 where packed."""

_OFFSET_TAG = 0x08  # field 1, varint
_DATA_TAG = 0x12  # field 2, length-delimited
_ZSTD_TAG = 0x1A  # field 3, length-delimited
_WIDTH_TAG = 0x20  # field 4, varint
_LEVEL = 1  # higher ones take their time for less than a hundredth


class Chunk(NamedTuple):
    """A piece of the flat buffer from `offset` on; `carried` bytes of it travelled."""

    offset: int
    data: memoryview
    carried: int


_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype, _new_bytes.argtypes = ctypes.py_object, (ctypes.c_char_p, ctypes.c_ssize_t)
_address_of = ctypes.pythonapi.PyBytes_AsString
_address_of.restype, _address_of.argtypes = ctypes.c_void_p, (ctypes.py_object,)


def encode_chunk(offset: int, data: bytes) -> bytes:
    """The frame of `data` at byte `offset` of the flat buffer."""
    return _head(offset, len(data)) + data


def read_chunk(source: FlatReader, offset: int, size: int) -> bytes:
    """The frame of the `size` bytes of a flat buffer from byte `offset`. Raises StorageError if they are not there.

    gRPC takes nothing but bytes. They are made as C code makes them, without content and then filled, so that the data
    are copied once, from the file to where gRPC reads them; to put a head before bytes is a second copy.
    """
    head = _head(offset, size)
    frame: bytes = _new_bytes(None, len(head) + size)
    view = memoryview((ctypes.c_char * len(frame)).from_address(_address_of(frame))).cast("B")
    view[: len(head)] = head
    source.read_into(offset, view[len(head) :])
    return frame


def pack_chunk(offset: int, data: bytes, width: int) -> tuple[bytes, int]:
    """The frame of packed data, and how many bytes of content it carries. Data that would not shrink go as they are.

    `width` is the size of the numbers in `data`, in bytes.
    """
    packed = zstandard.ZstdCompressor(_LEVEL).compress(_in_planes(data, width))
    if len(packed) >= len(data):
        return encode_chunk(offset, data), len(data)
    parts = (b"\x08", _varint(offset, 10), b"\x1a", _varint(len(packed), 4), packed, b"\x20", _varint(width, 1))
    return b"".join(parts), len(packed)


def width_of(layout: Layout) -> int:
    """The size of the numbers that make up most of a flat buffer, in bytes."""
    sizes: Counter[int] = Counter()
    for tensor in layout.tensors:
        sizes[ITEM_SIZE[tensor.dtype]] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else 1


def decode_chunk(frame: bytes, largest: int = 0) -> Chunk:
    """The chunk in a frame; data that are not packed are a view into it. Raises ProtocolError.

    Packed data are taken where they unpack to at most `largest` bytes, which is known before memory is.
    """
    view = memoryview(frame)
    position = 0
    offset = 0
    if position < len(view) and view[position] == _OFFSET_TAG:
        offset, position = _read_varint(view, position + 1, 10)
    tag = view[position] if position < len(view) else None
    if tag not in (_DATA_TAG, _ZSTD_TAG):
        raise ProtocolError("a frame is no chunk: its data field is missing")
    length, position = _read_varint(view, position + 1, 5)
    data, rest = view[position : position + length], view[position + length :]
    if length == 0 or length != len(data) or (tag == _DATA_TAG and rest):
        raise ProtocolError(f"a chunk announces {length} bytes and carries {len(view) - position}")
    if tag == _DATA_TAG:
        return Chunk(offset, data, length)
    if not largest:
        raise ProtocolError("a chunk is packed, which was not agreed on")
    if not rest or rest[0] != _WIDTH_TAG:
        raise ProtocolError("a packed chunk does not tell the width of its numbers")
    width, end = _read_varint(rest, 1, 10)
    if end != len(rest) or width not in (1, 2, 4, 8):
        raise ProtocolError(f"a packed chunk of numbers of {width} bytes, or with {len(rest) - end} bytes behind it")
    return Chunk(offset, memoryview(_out_of_planes(_unpack(data, largest), width)), length)


def _unpack(data: memoryview, largest: int) -> bytes:
    try:
        announced = zstandard.get_frame_parameters(data)
        if not 0 < announced.content_size <= largest or announced.window_size > max(largest, 1024):
            raise ProtocolError(f"a packed chunk does not say that it unpacks to at most {largest} bytes")
        unpacked: bytes = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ProtocolError(f"a packed chunk cannot be unpacked: {error}") from None
    if len(unpacked) != announced.content_size:
        raise ProtocolError(f"a packed chunk unpacks to {len(unpacked)} bytes, it says {announced.content_size}")
    return unpacked


def _in_planes(data: bytes, width: int) -> bytes:
    """All first bytes of the numbers, then all second bytes ..., then what is left over."""
    whole = len(data) // width * width
    return np.frombuffer(data, np.uint8, whole).reshape(-1, width).T.tobytes() + data[whole:]


def _out_of_planes(data: bytes, width: int) -> bytes:
    """The inverse of `_in_planes`."""
    whole = len(data) // width * width
    return np.frombuffer(data, np.uint8, whole).reshape(width, -1).T.tobytes() + data[whole:]


def _head(offset: int, size: int) -> bytes:
    """What stands before the data of a chunk that is not packed."""
    return b"".join((b"\x08", _varint(offset, 10), b"\x12", _varint(size, 4)))


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

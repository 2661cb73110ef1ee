"""Codecs: the lossy forms in which updates and weights travel.

The encoded form of a layout is itself a layout of known size, so an encoded update is a weights file like any other and
the wire needs to know nothing of codecs. Each run of one floating dtype becomes one tensor, in records that stand at
known places, so any block is decoded without the rest. Integers and booleans are carried as they are.

    fp16, bf16   each number rounded to 16 bits; tensors that are no larger stay as they are
    int8         per 512 numbers their largest magnitude / 127 (fp32; of F64 tensors F64), then a signed byte for each
    topk         per 65,536 numbers the largest by magnitude: their places in the block (uint16, rising), their values

What is too large for 16 bits becomes the largest number there is. NaN and infinity are never hidden: what a block that
holds one is decoded to holds one too.

What encoding loses can be added to the next update before that is encoded (error feedback: Seide et al. 2014;
Karimireddy et al. 2019, arXiv:1901.09847, algorithm 2; for top-k "memory", Stich et al. 2018, arXiv:1809.07599).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from gptfl_dist.errors import ProtocolError
from gptfl_dist.weights.file import FlatReader, blocks
from gptfl_dist.weights.layout import FLOATS, ITEM_SIZE, Layout, Segment
from gptfl_dist.weights.numbers import Numbers, narrow, numbers

CodecName = Literal["none", "fp16", "bf16", "int8", "topk"]

_STEP = 1 << 18  # elements that are encoded or decoded at a time: a multiple of every form's unit
_LARGEST = {"F16": 65504.0, "BF16": float(np.uint32(0x7F7F0000).view(np.float32))}


class _Form(Protocol):
    """How numbers of one dtype are encoded. `unit` numbers make a record; `dtype` is that of the encoded tensor."""

    unit: int
    dtype: str

    def size(self, count: int) -> int:
        """Bytes of `count` numbers; a record's place is the size of what lies before it."""

    def encode(self, values: Numbers) -> bytes:
        """Numbers that begin with a record."""

    def decode(self, data: bytes, count: int) -> Numbers:
        """What `encode` made of `count` numbers. Raises ProtocolError."""


class _Narrow:
    """Every number rounded to another dtype."""

    unit = 1

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def size(self, count: int) -> int:
        return count * ITEM_SIZE[self.dtype]

    def encode(self, values: Numbers) -> bytes:
        return narrow(values, self.dtype).tobytes()

    def decode(self, data: bytes, count: int) -> Numbers:
        return numbers(data, self.dtype)


class _Int8:
    """Records of a scale and up to 512 signed bytes."""

    unit = 512
    dtype = "U8"

    def __init__(self, source: str) -> None:
        scale = np.dtype("<f8" if source == "F64" else "<f4")
        self._scale_size = scale.itemsize
        self._record = np.dtype([("scale", scale), ("steps", "i1", (self.unit,))])

    def size(self, count: int) -> int:
        return count + self._scale_size * -(-count // self.unit)

    def encode(self, values: Numbers) -> bytes:
        count = len(values)
        records = np.zeros(-(-count // self.unit), self._record)
        blocks = np.zeros((len(records), self.unit), values.dtype)
        blocks.reshape(-1)[:count] = values
        with np.errstate(over="ignore", invalid="ignore"):
            top = np.abs(blocks).max(axis=1)
            scale = top / 127
            # Of the very largest numbers the scale may be rounded up so that 127 times it is infinite.
            scale = np.where(np.isinf(scale * 127) & np.isfinite(top), np.nextafter(scale, 0), scale)
            steps = np.rint(blocks / np.where(scale > 0, scale, 1)[:, None])
        steps[~np.isfinite(scale)] = 0  # the scale alone makes the whole block NaN or infinite
        records["scale"] = scale
        records["steps"] = np.clip(steps, -127, 127)
        return records.tobytes()[: self.size(count)]

    def decode(self, data: bytes, count: int) -> Numbers:
        missing = -len(data) % self._record.itemsize
        records = np.frombuffer(data + bytes(missing), self._record)
        with np.errstate(over="ignore", invalid="ignore"):
            blocks: Numbers = records["scale"][:, None] * records["steps"]
        return blocks.reshape(-1)[:count]


class _TopK:
    """Records of the places of the largest of up to 65,536 numbers, then their values in their own dtype."""

    unit = 65536
    dtype = "U8"

    def __init__(self, source: str, share: float) -> None:
        self._source = source
        self._share = share

    def _kept(self, count: int) -> int:
        """How many of a record's numbers are kept: a share, and at least one."""
        return math.ceil(self._share * count)

    def size(self, count: int) -> int:
        whole, rest = divmod(count, self.unit)
        return (whole * self._kept(self.unit) + self._kept(rest)) * (2 + ITEM_SIZE[self._source])

    def encode(self, values: Numbers) -> bytes:
        return b"".join(self._record(values[at : at + self.unit]) for at in range(0, len(values), self.unit))

    def _record(self, block: Numbers) -> bytes:
        kept = self._kept(len(block))
        magnitude = np.abs(block)
        magnitude[np.isnan(magnitude)] = np.inf
        least = np.partition(magnitude, len(block) - kept)[len(block) - kept]
        above = np.flatnonzero(magnitude > least)
        # Of equals the first, for another machine's partition may choose others.
        places = np.sort(np.concatenate([above, np.flatnonzero(magnitude == least)[: kept - len(above)]]))
        return places.astype("<u2").tobytes() + narrow(block[places], self._source).tobytes()

    def decode(self, data: bytes, count: int) -> Numbers:
        values: Numbers = np.zeros(count, np.float64 if self._source == "F64" else np.float32)
        taken = 0
        for start in range(0, count, self.unit):
            block = values[start : start + self.unit]
            kept = self._kept(len(block))
            places = np.frombuffer(data, "<u2", kept, taken)
            if places[-1] >= len(block) or (places[1:] <= places[:-1]).any():
                raise ProtocolError("a top-k block names places twice, out of order or beyond its end")
            end = taken + kept * (2 + ITEM_SIZE[self._source])
            block[places] = numbers(data[taken + 2 * kept : end], self._source)
            taken = end
        return values


@dataclass(frozen=True, slots=True)
class _Piece:
    """A segment of the plain layout and where its encoded tensor begins; `form` is None where it is carried."""

    segment: Segment
    form: _Form | None
    place: int
    largest: float  # in magnitude, that the form can hold; math.inf where it holds all

    @property
    def count(self) -> int:
        return (self.segment.stop - self.segment.start) // ITEM_SIZE[self.segment.dtype]


@dataclass(frozen=True, slots=True)
class Codec:
    """A codec with its settings; `top_share` is that of `topk`. `none` leaves everything as it is."""

    name: CodecName
    top_share: float = 0.01

    def layout(self, plain: Layout) -> Layout:
        """The layout of the encoded form."""
        return plain if self.name == "none" else self._encoded(plain)[1]

    def lost_layout(self, plain: Layout) -> Layout:
        """The layout of what encoding loses: a tensor for each run of numbers that it changes, F32 (of F64, F64)."""
        changed = [piece for piece in self._encoded(plain)[0] if piece.form is not None]
        return Layout.of((_name(n), (p.count,), _wide(p.segment.dtype)) for n, p in enumerate(changed))

    def encode(self, plain: Layout, source: FlatReader) -> Iterator[bytes | memoryview]:
        """The encoded form of a flat buffer as consecutive blocks."""
        if self.name == "none":
            yield from blocks(source, plain.nbytes)
            return
        for piece, start, stop in _steps(self._encoded(plain)[0]):
            data = _raw(piece.segment, source, start, stop)
            yield data if piece.form is None else piece.form.encode(_held(_widened(data, piece.segment.dtype), piece))

    def encode_with(self, plain: Layout, source: FlatReader, lost: FlatReader | None) -> Iterator[tuple[bytes, bytes]]:
        """The same with error feedback: blocks of the encoded form, and with each what is lost now.

        `lost` is what was lost before (None: nothing), in `lost_layout`, as the second blocks are together.
        """
        place = 0
        for piece, start, stop in _steps(self._encoded(plain)[0]):
            dtype = piece.segment.dtype
            data = _raw(piece.segment, source, start, stop)
            if piece.form is None:
                yield data, b""
                continue
            values = _widened(data, dtype)
            size = values.nbytes
            # What is not finite is told to the coordinator, which refuses it; here it raises no alarm.
            with np.errstate(over="ignore", invalid="ignore"):
                if lost is not None:
                    values = values + np.frombuffer(_read(lost, place, size), values.dtype)
                block = piece.form.encode(_held(values, piece))
                arrived = narrow(piece.form.decode(block, len(values)), dtype).tobytes()
                left = values - _widened(arrived, dtype)
            place += size
            yield block, left.tobytes()

    def decoded(self, plain: Layout, encoded: FlatReader) -> FlatReader:
        """A reader of the plain flat buffer, given one of the encoded."""
        return encoded if self.name == "none" else Decoded(self._encoded(plain)[0], encoded)

    def _encoded(self, plain: Layout) -> tuple[list[_Piece], Layout]:
        """The pieces, in the order in which they lie encoded, and the encoded layout."""
        segments = {_name(number): segment for number, segment in enumerate(plain.segments())}
        forms = {name: self._form(segment.dtype) for name, segment in segments.items()}
        triples = []
        for name, segment in segments.items():
            form, count = forms[name], (segment.stop - segment.start) // ITEM_SIZE[segment.dtype]
            if form is None:
                triples.append((name, (count,), segment.dtype))
            else:
                triples.append((name, (form.size(count) // ITEM_SIZE[form.dtype],), form.dtype))
        layout = Layout.of(triples)
        pieces = []
        for tensor in layout.tensors:
            segment, form = segments[tensor.name], forms[tensor.name]
            pieces.append(_Piece(segment, form, tensor.offset, _limit(segment.dtype, form)))
        return pieces, layout

    def _form(self, dtype: str) -> _Form | None:
        """How a dtype is encoded; None where it is carried as it is."""
        if dtype not in FLOATS:
            return None
        if self.name == "int8":
            return _Int8(dtype)
        if self.name == "topk":
            return _TopK(dtype, self.top_share)
        narrowed = {"fp16": "F16", "bf16": "BF16"}[self.name]
        return _Narrow(narrowed) if ITEM_SIZE[dtype] > ITEM_SIZE[narrowed] else None


class Decoded:
    """Reads the plain flat buffer from the encoded one. Made by `Codec.decoded`."""

    def __init__(self, pieces: list[_Piece], encoded: FlatReader) -> None:
        self._pieces = pieces
        self._encoded = encoded

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with the bytes from `offset`. Raises ProtocolError where what is encoded makes no sense."""
        end = offset + len(buffer)
        for piece in self._pieces:
            segment = piece.segment
            begin, stop = max(offset, segment.start), min(end, segment.stop)
            if begin < stop:
                self._read_piece(piece, begin - segment.start, buffer[begin - offset : stop - offset])

    def _read_piece(self, piece: _Piece, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from byte `offset` of a piece on."""
        if piece.form is None:
            self._encoded.read_into(piece.place + offset, buffer)
            return
        form, item = piece.form, ITEM_SIZE[piece.segment.dtype]
        done = 0
        while done < len(buffer):
            start = (offset + done) // item // form.unit * form.unit
            stop = min(start + _STEP, piece.count, -(-(offset + len(buffer)) // (item * form.unit)) * form.unit)
            first = form.size(start)
            data = _read(self._encoded, piece.place + first, form.size(stop) - first)
            plain = narrow(form.decode(data, stop - start), piece.segment.dtype)
            part = plain.data.cast("B")[offset + done - start * item :][: len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)


def _name(number: int) -> str:
    """Names that sort as their numbers do."""
    return f"{number:06d}"


def _wide(dtype: str) -> str:
    """The dtype that one is computed in."""
    return "F64" if dtype == "F64" else "F32"


def _widened(block: bytes, dtype: str) -> Numbers:
    return numbers(block, dtype).astype(np.float64 if dtype == "F64" else np.float32, copy=False)


def _limit(dtype: str, form: _Form | None) -> float:
    """The largest magnitude that comes through, of numbers of a dtype in a form."""
    target = form.dtype if isinstance(form, _Narrow) else dtype
    return _LARGEST.get(target, math.inf)


def _held(values: Numbers, piece: _Piece) -> Numbers:
    """The values as far as the piece can hold them; what is infinite stays so."""
    if piece.largest == math.inf:
        return values
    return np.where(np.isinf(values), values, np.clip(values, -piece.largest, piece.largest))


def _steps(pieces: list[_Piece]) -> Iterator[tuple[_Piece, int, int]]:
    """What is encoded at a time: elements from `start` to `stop` of a piece."""
    for piece in pieces:
        for start in range(0, piece.count, _STEP):
            yield piece, start, min(start + _STEP, piece.count)


def _raw(segment: Segment, source: FlatReader, start: int, stop: int) -> bytes:
    """The bytes of elements `start` to `stop` of a segment."""
    item = ITEM_SIZE[segment.dtype]
    return _read(source, segment.start + start * item, (stop - start) * item)


def _read(reader: FlatReader, offset: int, size: int) -> bytes:
    buffer = bytearray(size)
    reader.read_into(offset, memoryview(buffer))
    return bytes(buffer)

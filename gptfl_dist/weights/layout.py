"""The layout of a model's weights: which tensor lies where in one flat buffer.

Tensors are ordered by element size, largest first, then by name. So every tensor is aligned without padding, the
buffer has no holes, and it is byte for byte the data section of a safetensors file. Two models exchange weights only
if their layouts have the same digest.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from gptfl_dist.errors import ModelError

ITEM_SIZE = {"I64": 8, "F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of one element, by the dtype names of safetensors."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Dtypes that are averaged. The others are counters and flags: see `aggregation.mean`."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: `offset` and `nbytes` are its place in the flat buffer, in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of the flat buffer, from byte `start` to byte `stop`, whose elements share one dtype."""

    dtype: str
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """The ordered tensors of one flat buffer."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> Layout:
        """The layout of (name, shape, dtype) triples in any order. Raises ModelError for an unknown dtype or a
        name given twice."""
        triples = list(tensors)
        for name, shape, dtype in triples:
            if dtype not in ITEM_SIZE:
                raise ModelError(f"tensor {name} has dtype {dtype}, expected one of {', '.join(ITEM_SIZE)}")
            if any(side < 0 for side in shape):
                raise ModelError(f"tensor {name} has shape {shape}, expected no negative side")
        if len({name for name, _, _ in triples}) != len(triples):
            raise ModelError("a layout names a tensor twice")
        specs, offset = [], 0
        for name, shape, dtype in sorted(triples, key=lambda t: (-ITEM_SIZE[t[2]], t[0])):
            nbytes = math.prod(shape) * ITEM_SIZE[dtype]
            specs.append(TensorSpec(name, tuple(shape), dtype, offset, nbytes))
            offset += nbytes
        return cls(tuple(specs))

    @classmethod
    def from_json(cls, text: str | bytes) -> Layout:
        """Reads what `to_json` wrote. Offsets are computed anew, never believed. Raises ModelError."""
        try:
            rows = json.loads(text)
            return cls.of((str(name), tuple(int(side) for side in shape), str(dtype)) for name, shape, dtype in rows)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ModelError(f"not a layout: {error}") from None

    def to_json(self) -> str:
        """[[name, shape, dtype], ...] in layout order."""
        return json.dumps([[t.name, list(t.shape), t.dtype] for t in self.tensors], separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `to_json`, in hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @cached_property
    def nbytes(self) -> int:
        """Size of the flat buffer in bytes."""
        return sum(t.nbytes for t in self.tensors)

    @cached_property
    def parameters(self) -> int:
        """Number of floating-point elements."""
        return sum(t.nbytes // ITEM_SIZE[t.dtype] for t in self.tensors if t.dtype in FLOATS)

    def segments(self, names: Collection[str] | None = None) -> Iterator[Segment]:
        """The flat buffer as runs of one dtype, in order; where `names` are given, what these tensors take of it."""
        start, dtype, stop = 0, "", 0
        for tensor in self.tensors:
            if names is not None and tensor.name not in names:
                continue
            if tensor.dtype != dtype or tensor.offset != stop:
                if stop > start:
                    yield Segment(dtype, start, stop)
                start = tensor.offset
            dtype, stop = tensor.dtype, tensor.offset + tensor.nbytes
        if stop > start:
            yield Segment(dtype, start, stop)

    def difference(self, other: Layout) -> str:
        """One sentence naming the first tensor in which the two layouts differ, or ""."""
        mine = {t.name: (t.shape, t.dtype) for t in self.tensors}
        theirs = {t.name: (t.shape, t.dtype) for t in other.tensors}
        for name in mine | theirs:
            if name not in theirs:
                return f"tensor {name} {mine[name]} is missing"
            if name not in mine:
                return f"tensor {name} {theirs[name]} is not expected"
            if mine[name] != theirs[name]:
                return f"tensor {name} is {theirs[name]}, expected {mine[name]}"
        return ""

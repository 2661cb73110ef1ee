"""Blocks of a flat buffer as NumPy numbers, and back. NumPy has no bfloat16: its bits are a float32's upper half."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

NUMPY = {"I64": "<i8", "F64": "<f8", "F32": "<f4", "I32": "<i4", "F16": "<f2", "I16": "<i2", "I8": "i1", "U8": "u1"}
"""NumPy's names of the dtypes that it has; BOOL is left to whoever gives it a meaning."""

Numbers = NDArray[np.floating[Any]]


def numbers(block: bytes | memoryview, dtype: str) -> Numbers:
    """A block of a floating dtype as numbers of that dtype, BF16 as float32."""
    if dtype == "BF16":
        return (np.frombuffer(block, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(block, NUMPY[dtype])


def narrow(values: Numbers, dtype: str) -> NDArray[np.generic]:
    """Numbers as those of a floating dtype (the bits of a BF16), rounded to nearest even; too large ones infinite."""
    with np.errstate(over="ignore"):
        if dtype == "BF16":
            bits = values.astype(np.float32).view(np.uint32)
            rounded = bits + 0x7FFF + ((bits >> 16) & 1)
            # Rounding the bits of a NaN could carry it into another number.
            return np.where(np.isnan(values), 0x7FC0, rounded >> 16).astype("<u2")
        return values.astype(NUMPY[dtype])

"""Durations, sizes and rates as people write them: "30s", "10m", "1.5h", "64MiB", "2GB", "50MB/s".

`Duration` is a float of seconds, `Size` an int of bytes and `Rate` one of bytes a second once validated; a bare number
is refused, because a reader of the file could not tell its unit.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_RATES = {f"{unit}/s": size for unit, size in _BYTES.items()}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+(?:/s)?)\s*")


def _parse(value: object, units: dict[str, float] | dict[str, int], example: str) -> float:
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in units:
        raise ValueError(f"expected a number with a unit ({', '.join(units)}) such as {example}")
    quantity = float(match[1]) * units[match[2]]
    if not math.isfinite(quantity):
        raise ValueError(f"expected a number with a unit that is not beyond all bounds, such as {example}")
    return quantity


def parse_duration(value: object) -> float:
    """Seconds of a text such as "90s", "10m" or "1.5h". Raises ValueError."""
    return _parse(value, _SECONDS, '"30s"')


def parse_size(value: object) -> int:
    """Bytes of a text such as "64MiB" or "2GB". Raises ValueError."""
    return int(_parse(value, _BYTES, '"64MiB"'))


def parse_rate(value: object) -> int:
    """Bytes a second of a text such as "50MB/s". Raises ValueError."""
    return int(_parse(value, _RATES, '"50MB/s"'))


def format_duration(seconds: float) -> str:
    """The text that `parse_duration` reads back, in seconds."""
    return f"{Decimal(repr(float(seconds))):f}s"


def format_size(size: int) -> str:
    """The text that `parse_size` reads back, in bytes."""
    return f"{size}B"


def format_rate(rate: int) -> str:
    """The text that `parse_rate` reads back, in bytes a second."""
    return f"{rate}B/s"


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration),
    WithJsonSchema({"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*(ms|s|m|h|d)\s*$", "examples": ["30s", "10m"]}),
]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(format_size),
    WithJsonSchema(
        {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*([kMGT]?B|[KMGT]iB)\s*$", "examples": ["64MiB", "2GB"]}
    ),
]
Rate = Annotated[
    int,
    BeforeValidator(parse_rate),
    PlainSerializer(format_rate),
    WithJsonSchema(
        {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*([kMGT]?B|[KMGT]iB)/s\s*$", "examples": ["50MB/s", "1GiB/s"]}
    ),
]

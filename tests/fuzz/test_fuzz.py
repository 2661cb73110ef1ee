"""A sample of what `make fuzz` does, without its guidance by coverage: seeded mutations of real messages."""

from __future__ import annotations

import contextlib
import random

import pytest
from targets import TARGETS

_INPUTS = 3000
_SPECIAL = (
    b"\0",
    b"\xff",
    b"\x80",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\n",
    b'"',
    b"[",
    b"{",
    b"-1",
    b"1e999",
    b"null",
    b"NaN",
)


def _mutated(draw: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.randint(0, 4)):
        at = draw.randint(0, len(data))
        kind = draw.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + draw.randint(1, 8)]
        elif kind == 3:
            data[at:at] = draw.choice(_SPECIAL)
        elif kind == 4:
            data[at : at + draw.randint(0, 8)] = draw.randbytes(draw.randint(1, 8))
        else:
            other = draw.choice(seeds)
            data[at:] = other[draw.randint(0, len(other)) :]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_malformed_input_raises_nothing_that_its_reader_is_not_prepared_for(name: str) -> None:
    target, draw = TARGETS[name], random.Random(name)
    seeds = list(target.seeds())
    for seed in seeds:
        with contextlib.suppress(*target.allowed):
            target.read(seed)
    for _ in range(_INPUTS):
        data = _mutated(draw, seeds)
        try:
            with contextlib.suppress(*target.allowed):
                target.read(data)
        except Exception as error:
            error.add_note(f"input: {data!r}")
            raise

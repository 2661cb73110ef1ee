"""The norm is that of the closed form, in whatever pieces the bytes come; what is not finite is found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from flat_buffers import Flat, flat_of
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.aggregation.norm import RunningNorm, norm
from gptfl_dist.weights import BLOCK, FLOATS, ITEM_SIZE, Layout


@pytest.mark.parametrize("dtype", sorted(FLOATS))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["first", "border", "last"])
def test_one_bad_number_is_found_anywhere(dtype, value, place):
    border = BLOCK // ITEM_SIZE[dtype]
    count = border + 3
    layout = Layout.of([("a", (2,), "F64"), ("b", (2,), "F32"), ("c", (2,), "BF16"), ("d", (count,), dtype)])
    good, tensors = flat_of(layout, 0)
    assert not math.isnan(norm(layout, good))
    spec = next(s for s in layout.tensors if s.name == "d")
    index = {"first": 0, "border": border - 1, "last": count - 1}[place]
    tensors["d"][index] = value
    raw = bytearray(good.data)
    raw[spec.offset : spec.offset + spec.nbytes] = tensors["d"].view(torch.uint8).numpy().tobytes()
    assert math.isnan(norm(layout, Flat(bytes(raw))))


def test_a_signalling_nan_is_found_without_a_warning():
    layout = Layout.of([("a", (1,), "BF16")])
    assert math.isnan(norm(layout, Flat(b"\x81\x7f")))


@given(st.sampled_from(sorted(FLOATS)), st.integers(0, 2**32), st.sampled_from([1e-3, 1.0, 1e4]))
def test_the_norm_is_that_of_all_floating_elements(dtype, seed, scale):
    layout = Layout.of([("a", (3, 5), dtype), ("b", (1025,), "F32"), ("c", (9,), "I32")])
    flat, tensors = flat_of(layout, seed, scale)
    expected = math.hypot(*(float(tensors[name].to(torch.float64).norm()) for name in "ab"))
    assert norm(layout, flat) == pytest.approx(expected, rel=1e-5)


def test_a_finite_number_whose_square_is_not_still_counts():
    layout = Layout.of([("a", (2,), "F32")])
    assert norm(layout, Flat(np.array([3e30, 4e30], "<f4").tobytes())) == pytest.approx(5e30)


def test_integers_and_booleans_are_never_called_infinite():
    layout = Layout.of([("a", (64,), "I64"), ("b", (64,), "U8"), ("c", (64,), "BOOL")])
    assert norm(layout, Flat(b"\xff" * layout.nbytes)) == 0


@given(st.integers(0, 2**32), st.lists(st.integers(1, 40), max_size=30))
def test_pieces_of_any_size_give_the_norm_of_the_whole(seed, sizes):
    layout = Layout.of(
        [("a", (7,), "F64"), ("b", (3,), "I32"), ("c", (9,), "F32"), ("d", (5,), "BF16"), ("e", (3,), "BOOL")]
    )
    flat, _ = flat_of(layout, seed)
    running, place = RunningNorm(layout), 0
    for size in [*sizes, len(flat.data)]:
        running.add(memoryview(flat.data)[place : place + size])
        place += size
    assert running.value == pytest.approx(norm(layout, flat))

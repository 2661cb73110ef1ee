"""The weighted mean is the closed form, whatever the dtype and whatever the order; what is not finite is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flat_buffers import TORCH, Flat, flat_of
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.aggregation.factors import clipping, freshness
from gptfl_dist.aggregation.mean import BLOCK_ELEMENTS, narrow, numbers, weighted_mean
from gptfl_dist.weights import FLOATS, ITEM_SIZE, Layout

MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}


def fresh(samples):
    """The shares of updates that all started from the newest weights."""
    return {silo: count / sum(samples.values()) for silo, count in samples.items()}


def times(rate: float):
    """The step of a server that multiplies the mean update."""
    return lambda place, weights, mean: weights + rate * mean


layouts = st.lists(
    st.tuples(st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from(sorted(ITEM_SIZE))), max_size=8
).map(lambda tensors: Layout.of((f"t{i}", shape, dtype) for i, (shape, dtype) in enumerate(tensors)))


@given(
    layouts,
    st.lists(st.integers(1, 1_000_000), min_size=1, max_size=4),
    st.sampled_from([1.0, 0.5, 1.3]),
    st.integers(0, 2**32),
)
def test_the_mean_is_the_closed_form(layout, counts, rate, seed):
    base, weights = flat_of(layout, seed)
    silos = [f"s{i}" for i in range(len(counts))]
    updates = {silo: flat_of(layout, seed + 1 + i, 0.01) for i, silo in enumerate(silos)}
    samples = dict(zip(silos, counts, strict=True))
    result = b"".join(weighted_mean(layout, base, {s: u for s, (u, _) in updates.items()}, fresh(samples), times(rate)))
    assert len(result) == layout.nbytes
    for spec in layout.tensors:
        part = bytearray(result[spec.offset : spec.offset + spec.nbytes])
        if not part:
            continue
        got = torch.frombuffer(part, dtype=TORCH[spec.dtype]).reshape(spec.shape)
        before = weights[spec.name]
        given_ = [updates[s][1][spec.name] for s in silos]
        if spec.dtype == "BOOL":
            assert torch.equal(got, before)
        elif spec.dtype in FLOATS:
            stacked = np.stack([t.to(torch.float64).numpy() for t in given_])
            expected = before.to(torch.float64).numpy() + rate * np.average(stacked, axis=0, weights=counts)
            # Half a unit in the last place of the dtype, and what sums of updates of a hundredth lose in float32 or 64.
            lost = {"F64": 1e-14, "F16": 2.0**-25}.get(spec.dtype, 1e-8)
            np.testing.assert_allclose(
                got.to(torch.float64).numpy(), expected, rtol=2.0 ** -(MANTISSA[spec.dtype] + 1) * 1.01 + 1e-15,
                atol=lost,
            )  # fmt: skip
        else:
            assert torch.equal(got, before + torch.stack(given_).amax(0))


@given(layouts, st.permutations(range(5)), st.integers(0, 2**32))
def test_the_result_is_bitwise_the_same_whatever_the_order(layout, order, seed):
    base, _ = flat_of(layout, seed)
    updates = {f"s{i}": flat_of(layout, seed + 1 + i)[0] for i in range(5)}
    samples = {f"s{i}": 3**i for i in range(5)}
    straight = b"".join(weighted_mean(layout, base, updates, fresh(samples), times(1.0)))
    shuffled = {f"s{i}": updates[f"s{i}"] for i in order}
    assert b"".join(weighted_mean(layout, base, shuffled, fresh(samples), times(1.0))) == straight


def test_a_silo_counts_by_its_share_of_the_samples():
    layout = Layout.of([("w", (2,), "F32")])
    base = Flat(np.array([1, 1], "<f4").tobytes())
    updates = {"a": Flat(np.array([8, 0], "<f4").tobytes()), "b": Flat(np.array([0, 8], "<f4").tobytes())}
    result = b"".join(weighted_mean(layout, base, updates, fresh({"a": 3, "b": 1}), times(0.5)))
    assert np.frombuffer(result, "<f4").tolist() == [1 + 0.5 * 0.75 * 8, 1 + 0.5 * 0.25 * 8]


def test_a_buffer_of_several_blocks_and_dtypes_is_taken_block_by_block():
    layout = Layout.of(
        [("a", (3 * BLOCK_ELEMENTS + 5,), "F64"), ("b", (BLOCK_ELEMENTS + 7,), "BF16"), ("c", (9,), "I8")]
    )
    base, weights = flat_of(layout, 1)
    update, delta = flat_of(layout, 2)
    blocks = [bytes(block) for block in weighted_mean(layout, base, {"s": update}, {"s": 1.0}, times(1.0))]
    assert max(map(len, blocks)) <= 8 * BLOCK_ELEMENTS
    result = b"".join(blocks)
    for spec in layout.tensors:
        got = torch.frombuffer(bytearray(result[spec.offset : spec.offset + spec.nbytes]), dtype=TORCH[spec.dtype])
        wide = torch.float64 if spec.dtype in FLOATS else TORCH[spec.dtype]
        expected = (weights[spec.name].to(wide) + delta[spec.name].to(wide)).to(TORCH[spec.dtype])
        assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@given(st.lists(st.floats(width=64), min_size=1, max_size=50))
def test_bfloat16_is_rounded_as_torch_rounds(values):
    expected = torch.tensor(values, dtype=torch.float64).to(torch.bfloat16)
    got = torch.frombuffer(bytearray(narrow(np.array(values), "BF16").tobytes()), dtype=torch.bfloat16)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_number_survives_the_round_trip(dtype):
    bits = np.arange(2**16, dtype="<u2")
    wide = numbers(memoryview(bits).cast("B"), dtype).astype(np.float64)
    expected = torch.from_numpy(bits.view("<i2").copy()).view(TORCH[dtype]).to(torch.float64).numpy()
    np.testing.assert_array_equal(wide, expected)
    back = narrow(wide, dtype).view("<u2")
    told = ~np.isnan(wide)
    np.testing.assert_array_equal(back[told], bits[told])
    assert np.isnan(numbers(memoryview(back[~told]).cast("B"), dtype)).all()


def test_the_step_is_told_how_many_floating_elements_lie_before_its_block():
    layout = Layout.of(
        [("a", (BLOCK_ELEMENTS + 5,), "F64"), ("b", (7,), "I32"), ("c", (9,), "F32"), ("d", (3,), "F16")]
    )
    base, _ = flat_of(layout, 1)
    seen = []

    def step(place, weights, mean):
        seen.append((place, len(mean)))
        return weights

    b"".join(weighted_mean(layout, base, {"s": base}, {"s": 1.0}, step))
    seen.sort()  # threads come to them in any order
    assert [place for place, _ in seen] == [sum(count for _, count in seen[:n]) for n in range(len(seen))]
    assert sum(count for _, count in seen) == layout.parameters


def test_a_stale_update_weighs_less_and_the_others_no_more():
    assert freshness({"a": 0, "b": 0}, 0.5) == {"a": 1, "b": 1}
    assert freshness({"a": 3, "b": 0}, 0.5) == {"a": 1 / 2, "b": 1}
    assert freshness({"a": 3, "b": 1}, 1.0) == {"a": 1 / 4, "b": 1 / 2}
    assert freshness({"a": 9, "b": 1}, 0.0) == {"a": 1, "b": 1}


def test_an_update_that_is_too_long_is_scaled_down_to_the_limit_and_no_other_is():
    layout = Layout.of([("w", (2,), "F32"), ("seen", (1,), "I64")])
    updates = {
        name: Flat(np.array([9], "<i8").tobytes() + np.array(values, "<f4").tobytes())
        for name, values in {"long": [3, 4], "short": [0.3, 0.4], "none": [0, 0]}.items()
    }
    assert clipping(layout, updates, 2.0) == {"long": 2 / 5, "short": 1, "none": 1}
    assert clipping(layout, updates, None) == {"long": 1, "short": 1, "none": 1}

"""What a codec makes of a flat buffer: its size, its error, any range of it, and what it does with damaged bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gptfl_dist.errors import ProtocolError
from gptfl_dist.weights import FLOATS, ITEM_SIZE, Codec, Layout
from gptfl_dist.weights.numbers import narrow, numbers

NAMES = ("fp16", "bf16", "int8", "topk")
EPSILON = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24, "F64": 2.0**-53}
LARGEST = {"F16": 65504.0, "BF16": 3.3895313892515355e38}

triples = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.tuples(st.lists(st.integers(0, 30), max_size=3).map(tuple), st.sampled_from(sorted(ITEM_SIZE))),
    max_size=6,
).map(lambda d: Layout.of((name, shape, dtype) for name, (shape, dtype) in d.items()))
codecs = st.builds(Codec, st.sampled_from(NAMES), st.floats(0.001, 0.999))


class Flat:
    """A flat buffer in memory, read as a spool is."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert 0 <= offset <= offset + len(buffer) <= len(self.content)
        buffer[:] = self.content[offset : offset + len(buffer)]


def floats_of(layout: Layout, flat: bytes) -> list[tuple[str, np.ndarray]]:
    """The numbers of each floating segment, with its dtype."""
    return [
        (s.dtype, numbers(flat[s.start : s.stop], s.dtype).astype(np.float64))
        for s in layout.segments()
        if s.dtype in FLOATS
    ]


def random_flat(layout: Layout, seed: int, scale: float = 1.0) -> bytes:
    """Normal numbers in floating tensors, any bytes in the others."""
    random = np.random.default_rng(seed)
    parts = []
    for s in layout.segments():
        count = (s.stop - s.start) // ITEM_SIZE[s.dtype]
        if s.dtype in FLOATS:
            parts.append(narrow(scale * random.standard_normal(count), s.dtype).tobytes())
        else:
            parts.append(random.bytes(s.stop - s.start))
    return b"".join(parts)


def encoded(codec: Codec, layout: Layout, flat: bytes) -> bytes:
    return b"".join(codec.encode(layout, Flat(flat)))


def decoded(codec: Codec, layout: Layout, content: bytes, start: int = 0, stop: int | None = None) -> bytes:
    buffer = bytearray((layout.nbytes if stop is None else stop) - start)
    codec.decoded(layout, Flat(content)).read_into(start, memoryview(buffer))
    return bytes(buffer)


def bound(codec: Codec, dtype: str, values: np.ndarray) -> np.ndarray:
    """The largest error of each number that the codec may make."""
    if codec.name == "topk":
        magnitude = np.abs(values)
        kept = math.ceil(codec.top_share * len(values))
        # What is kept comes exactly; what is not is no larger than the least that is.
        return np.where(magnitude > np.sort(magnitude)[-kept], 0.0, magnitude)
    if codec.name == "int8":
        blocks = np.zeros(-(-len(values) // 512) * 512)
        blocks[: len(values)] = np.abs(values)
        top = np.repeat(blocks.reshape(-1, 512).max(axis=1), 512)[: len(values)]
        smallest = 64 * (2.0**-1074 if dtype == "F64" else 2.0**-149)  # the last bits of the smallest scales
        return top / 254 * (1 + 1e-5) + 2 * EPSILON[dtype] * top + max(smallest, 2.0**-25 if dtype == "F16" else 0.0)
    target = {"fp16": "F16", "bf16": "BF16"}[codec.name]
    if ITEM_SIZE[dtype] == ITEM_SIZE[target]:
        return np.zeros(len(values))
    smallest = {"F16": 2.0**-25, "BF16": 2.0**-134}[target]
    excess = np.maximum(np.abs(values) - LARGEST[target], 0)
    return np.abs(values) * EPSILON[target] * (1 + 1e-6) + smallest + excess


@given(codecs, triples, st.integers(0, 2**32), st.sampled_from([1e-40, 1e-6, 1.0, 1e5, 1e37]))
def test_what_is_decoded_is_near_what_was_encoded(codec: Codec, layout: Layout, seed: int, scale: float) -> None:
    flat = random_flat(layout, seed, scale)
    if any(not np.isfinite(values).all() for _, values in floats_of(layout, flat)):
        return  # of F16 at the largest scales
    content = encoded(codec, layout, flat)
    assert len(content) == codec.layout(layout).nbytes
    back = decoded(codec, layout, content)
    for (dtype, values), (_, found) in zip(floats_of(layout, flat), floats_of(layout, back), strict=True):
        assert (np.abs(values - found) <= bound(codec, dtype, values)).all()
    for s in layout.segments():
        if s.dtype not in FLOATS:
            assert back[s.start : s.stop] == flat[s.start : s.stop]


@given(codecs, st.sampled_from(sorted(FLOATS)), st.data())
def test_any_numbers_are_encoded_and_what_is_not_finite_is_never_hidden(codec: Codec, dtype: str, data) -> None:
    bits = data.draw(arrays.arrays(f"<u{ITEM_SIZE[dtype]}", st.integers(1, 1100)))
    layout = Layout.of([("w", (len(bits),), dtype)])
    back = decoded(codec, layout, encoded(codec, layout, bits.tobytes()))
    found, values = numbers(back, dtype), numbers(bits.tobytes(), dtype)
    assert np.isfinite(found).all() == np.isfinite(values).all()


LARGE = Layout.of([("n", (3,), "I64"), ("v", (70_001,), "F32"), ("w", (200_003,), "F32"), ("z", (513,), "BF16")])


@pytest.fixture(scope="module", params=NAMES)
def large(request) -> tuple[Codec, bytes, bytes]:
    """A codec, several records of numbers encoded by it, and the whole decoded at once."""
    codec = Codec(request.param)
    content = encoded(codec, LARGE, random_flat(LARGE, 1))
    return codec, content, decoded(codec, LARGE, content)


@given(st.integers(0, LARGE.nbytes), st.integers(0, LARGE.nbytes))
def test_any_range_is_that_part_of_the_whole(large: tuple[Codec, bytes, bytes], a: int, b: int) -> None:
    codec, content, whole = large
    start, stop = sorted((a, b))
    assert decoded(codec, LARGE, content, start, stop) == whole[start:stop]


@pytest.mark.parametrize(("name", "share"), [("fp16", 0.5), ("bf16", 0.5), ("int8", 0.253), ("topk", 0.0151)])
def test_the_encoded_form_is_as_small_as_it_should_be(name, share: float) -> None:
    layout = Layout.of([("w", (11_200_000,), "F32")])
    assert Codec(name).layout(layout).nbytes <= share * layout.nbytes


def test_no_codec_leaves_everything_as_it_is() -> None:
    flat = Flat(b"1234")
    layout = Layout.of([("w", (1,), "F32")])
    assert Codec("none").layout(layout) is layout
    assert Codec("none").decoded(layout, flat) is flat


@given(codecs, triples, st.integers(0, 2**32), st.integers(1, 5))
def test_with_error_feedback_nothing_is_lost_over_the_rounds(
    codec: Codec, layout: Layout, seed: int, rounds: int
) -> None:
    """What arrived, and what is still owed, sum up to what was given."""
    lost = None
    given_, arrived = [], []
    for round_ in range(rounds):
        flat = random_flat(layout, seed + round_)
        steps = list(codec.encode_with(layout, Flat(flat), lost))
        lost = Flat(b"".join(step[1] for step in steps))
        assert len(lost.content) == codec.lost_layout(layout).nbytes
        given_.append(flat)
        arrived.append(decoded(codec, layout, b"".join(step[0] for step in steps)))
    changed = codec.lost_layout(layout)
    left = [values for _, values in floats_of(changed, lost.content)]
    owed = np.concatenate(left) if left else np.zeros(0)
    exact = {"fp16": {"F16", "BF16"}, "bf16": {"F16", "BF16"}}.get(codec.name, set())
    place = 0
    for segment, (dtype, _) in enumerate(floats_of(layout, given_[0])):
        wanted = sum(floats_of(layout, flat)[segment][1] for flat in given_)
        got = sum(floats_of(layout, flat)[segment][1] for flat in arrived)
        if dtype in exact:
            assert (got == wanted).all()
            continue
        rest = owed[place : place + len(wanted)]
        place += len(wanted)
        assert np.allclose(got + rest, wanted, rtol=0, atol=1e-13 if dtype == "F64" else 2e-5)
    assert place == len(owed)


def test_top_k_keeps_the_largest_and_of_equals_the_first() -> None:
    layout = Layout.of([("w", (10,), "F32")])
    values = np.array([0, 2, -2, 1, -5, 2, 2, 0, 0, 1], "<f4")
    codec = Codec("topk", 0.3)
    found = np.frombuffer(decoded(codec, layout, encoded(codec, layout, values.tobytes())), "<f4")
    assert found.tolist() == [0, 2, -2, 0, -5, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("places", [[3, 3], [4, 3], [0, 10], [65535, 65535], [9, 65535]])
def test_top_k_places_that_make_no_sense_are_refused(places: list[int]) -> None:
    layout = Layout.of([("w", (10,), "F32")])
    content = np.array(places, "<u2").tobytes() + np.ones(2, "<f4").tobytes()
    with pytest.raises(ProtocolError, match="places"):
        decoded(Codec("topk", 0.2), layout, content)


@given(codecs, triples, st.data())
def test_any_bytes_are_decoded_or_refused(codec: Codec, layout: Layout, data) -> None:
    size = codec.layout(layout).nbytes
    content = data.draw(st.binary(min_size=min(size, 64), max_size=min(size, 64)))
    try:
        back = decoded(codec, layout, (content * (size // 64 + 1))[:size])
    except ProtocolError:
        assert codec.name == "topk"
        return
    assert len(back) == layout.nbytes

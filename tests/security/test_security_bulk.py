"""Messages that are sealed beside a TLS session: each opens once, in its turn, as it was sealed, and not otherwise."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfl_dist.errors import ProtocolError
from gptfl_dist.security import bulk
from gptfl_dist.security.bulk import KEY_BYTES, TAG_BYTES, Bulk

KEY = bytes(range(KEY_BYTES))


def line() -> tuple[Bulk, Bulk]:
    return Bulk(KEY, "rank 1"), Bulk(KEY, "rank 0")


def seal(end: Bulk, data: bytes) -> bytearray:
    sealed = bytearray(len(data) + TAG_BYTES)
    end.seal(memoryview(data), memoryview(sealed))
    return sealed


def opened(end: Bulk, sealed: bytes | bytearray) -> bytes:
    data = bytearray(max(0, len(sealed) - TAG_BYTES))
    end.open(memoryview(sealed), memoryview(data))
    return bytes(data)


@given(st.lists(st.binary(max_size=5000), max_size=8))
def test_messages_open_in_their_order_and_are_not_to_be_seen(messages):
    sender, receiver = line()
    sealed = [seal(sender, data) for data in messages]
    for data, each in zip(messages, sealed, strict=True):
        assert len(data) < 16 or data not in each
        assert opened(receiver, each) == data


@given(st.binary(min_size=1, max_size=300), st.data())
def test_a_flipped_bit_anywhere_is_refused(data, draw):
    sender, receiver = line()
    sealed = seal(sender, data)
    place = draw.draw(st.integers(0, 8 * len(sealed) - 1))
    sealed[place // 8] ^= 1 << place % 8
    with pytest.raises(ProtocolError, match="what came from rank 0 is not what it sent"):
        opened(receiver, sealed)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(lambda order: order != list(range(len(order)))))
def test_messages_that_are_dropped_repeated_or_swapped_are_refused(order):
    sender, receiver = line()
    sealed = [seal(sender, b"the same each time") for _ in range(4)]
    right = next((place for place, number in enumerate(order) if place != number))
    for number in order[:right]:
        opened(receiver, sealed[number])
    with pytest.raises(ProtocolError, match="what came from rank 0 is not what it sent"):
        opened(receiver, sealed[order[right]])


@pytest.mark.parametrize("length", [0, 1, TAG_BYTES - 1, TAG_BYTES + 2, TAG_BYTES + 4])
def test_a_message_of_another_length_than_expected_is_refused(length):
    _, receiver = line()
    with pytest.raises(ProtocolError, match=f"rank 0 sent {length} bytes, expected {TAG_BYTES + 3}"):
        receiver.open(memoryview(bytes(length)), memoryview(bytearray(3)))


@given(st.binary(min_size=TAG_BYTES, max_size=200))
def test_noise_is_refused(noise):
    _, receiver = line()
    with pytest.raises(ProtocolError):
        opened(receiver, noise)


def test_what_another_key_sealed_is_refused():
    _, receiver = line()
    with pytest.raises(ProtocolError):
        opened(receiver, seal(Bulk(os.urandom(KEY_BYTES), "rank 1"), b"data"))


@settings(deadline=None)
@given(st.integers(1, 4))
def test_no_nonce_comes_twice_under_a_key_and_both_ends_change_keys_at_the_same_message(life):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "MESSAGES", life)
        sender, receiver = line()
        sealed = [seal(sender, bytes(100)) for _ in range(3 * life + 1)]
        assert len({bytes(each) for each in sealed}) == len(sealed)  # of the same content
        assert all(opened(receiver, each) == bytes(100) for each in sealed)


def test_a_key_is_followed_by_another_one():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "MESSAGES", 1)
        sender, _ = line()
        seal(sender, b"data")
        second = seal(sender, b"data")
    first = seal(Bulk(KEY, "rank 1"), b"data")
    assert second != first  # with the same nonce under the same key they would be equal

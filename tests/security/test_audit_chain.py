"""No byte of an audit log can change, and no line go or move, without being found where it happened."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfl_dist.security.audit import (
    BEGUN,
    CHECKPOINT,
    Head,
    Verification,
    beginning,
    chained,
    checkpoint,
    fingerprint,
    hash_of,
    parsed,
    spelled,
    verify,
)

TIME = "2025-11-03T02:00:00.000+00:00"
KEY, OTHER = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
FINGERPRINT = fingerprint(KEY.public_key())

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
names = st.text(min_size=1, max_size=8).filter(
    lambda name: name not in ("number", "time", "event", "previous", "hash", "key", "fingerprint", "signature")
)
events = st.lists(
    st.tuples(st.sampled_from(["update accepted", "silo connected", "x"]), st.dictionaries(names, values, max_size=4)),
    max_size=12,
)


def lines_of(
    told: Sequence[tuple[str, dict[str, Any]]], key: ec.EllipticCurvePrivateKey = KEY, every: int = 4
) -> list[bytes]:
    """A log that is signed after every fourth event and at its end."""
    line, head = chained(Head(), TIME, BEGUN, beginning(key.public_key()))
    lines = [line]
    for number, (event, fields) in enumerate([*told, ("run ended", {})], start=1):
        line, head = chained(head, TIME, event, fields)
        lines.append(line)
        if number % every == 0 or event == "run ended":
            line, head = chained(head, TIME, CHECKPOINT, checkpoint(head, key))
            lines.append(line)
    return lines


RUN = [
    ("update accepted", {"silo": f"silo-{n % 3}", "round": n // 3, "samples": 100 + n, "updates": {"a": "é", "b": n}})
    for n in range(20)
]
LINES = lines_of(RUN)
LOG = b"".join(LINES)


def line_at(offset: int) -> int:
    return LOG[:offset].count(b"\n") + 1


def faulty(result: Verification) -> list[int]:
    return [fault.line for fault in result.faults]


@given(events)
@settings(max_examples=50)
def test_whatever_happened_is_read_back_from_a_log_that_verifies(told: list[tuple[str, dict[str, Any]]]) -> None:
    lines = lines_of(told)
    result = verify(b"".join(lines), FINGERPRINT)
    assert result.faults == []
    assert (result.head.number, result.signed, result.fingerprint) == (len(lines), len(lines), FINGERPRINT)
    read = [entry for entry in result.entries.values() if entry["event"] not in (BEGUN, CHECKPOINT, "run ended")]
    chain = ("number", "time", "event", "previous", "hash")
    assert [(e["event"], {k: v for k, v in e.items() if k not in chain}) for e in read] == told
    for line in lines:
        assert spelled(parsed(line[:-1])) + b"\n" == line
        assert hash_of(parsed(line[:-1])) == parsed(line[:-1])["hash"]


def test_a_thousand_changes_of_one_byte_are_each_found_at_their_line() -> None:
    draw = random.Random("a thousand changes")
    for _ in range(1000):
        offset = draw.randrange(len(LOG))
        changed = LOG[:offset] + bytes([LOG[offset] ^ draw.randrange(1, 256)]) + LOG[offset + 1 :]
        result = verify(changed)
        assert result.faults, f"byte {offset} is {changed[offset : offset + 1]!r}"
        assert min(faulty(result)) == line_at(offset)
        assert not result.half_written


def test_each_byte_of_an_end_of_line_and_of_the_last_line_counts() -> None:
    ends = [offset for offset, byte in enumerate(LOG) if byte == ord("\n")]
    for offset in [*ends, *range(len(LOG) - len(LINES[-1]), len(LOG), 3)]:
        for byte in (0, 10, 32, 34, 255):
            if LOG[offset] != byte:
                assert min(faulty(verify(LOG[:offset] + bytes([byte]) + LOG[offset + 1 :]))) == line_at(offset)


@given(st.data())
def test_a_line_that_is_missing_moved_or_doubled_is_found(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(LINES) - 2))
    to = data.draw(st.integers(0, len(LINES) - 1).filter(lambda to: to != at))
    rest = LINES[:at] + LINES[at + 1 :]
    moved = [*rest[:to], LINES[at], *rest[to:]]
    doubled = LINES[: at + 1] + LINES[at:]
    swapped = list(LINES)
    swapped[at], swapped[to] = swapped[to], swapped[at]
    for lines, first in ((rest, at), (moved, min(at, to)), (doubled, at + 1), (swapped, min(at, to))):
        assert min(faulty(verify(b"".join(lines)))) == first + 1


@given(st.integers(1, len(LOG) - 1))
@settings(max_examples=200)
def test_a_log_that_is_cut_says_how_far_it_is_whole_and_how_far_signed(size: int) -> None:
    result = verify(LOG[:size])
    whole = LOG[:size].count(b"\n")
    assert result.faults == []
    assert result.half_written in (0, len(LOG[:size].rpartition(b"\n")[2]))
    assert result.head.number in (whole, whole + 1)  # a line may lack nothing but its end
    assert result.signed == max(
        (n for n, line in enumerate(LINES[: result.head.number], 1) if b'"checkpoint"' in line), default=0
    )


@pytest.mark.parametrize("junk", [b"x", b"{", b'{"number":7', b"\0" * 9, b"[]", LINES[0][:-1], b'{"number":"1"}'])
def test_what_is_no_entry_at_the_end_is_a_fault(junk: bytes) -> None:
    result = verify(LOG + junk)
    if f'{{"number":{len(LINES) + 1},'.encode().startswith(junk):
        assert (result.faults, result.half_written) == ([], len(junk))
    else:
        assert faulty(result)[0] == len(LINES) + 1
        assert not result.half_written


def test_a_chain_that_was_written_anew_after_a_change_is_found_at_the_next_signature() -> None:
    lines, head = LINES[:5], Head(5, parsed(LINES[4][:-1])["hash"])
    for line in LINES[5:]:
        entry = parsed(line[:-1])
        fields = {k: v for k, v in entry.items() if k not in ("number", "time", "event", "previous", "hash")}
        if entry["number"] == 7:
            fields["samples"] = 1
        new, head = chained(head, entry["time"], entry["event"], fields)
        lines.append(new)
    following = next(n for n, line in enumerate(LINES, 1) if n > 7 and b'"checkpoint"' in line)
    result = verify(b"".join(lines))
    assert faulty(result)[0] == following
    assert "a signature by another key" in result.faults[0].found


def test_a_signature_by_another_key_is_found_and_a_whole_log_by_another_key_where_the_key_is_pinned() -> None:
    foreign = lines_of(RUN, OTHER)
    assert verify(b"".join(foreign)).faults == []
    result = verify(b"".join(foreign), FINGERPRINT)
    assert faulty(result) == [1]
    assert FINGERPRINT in result.faults[0].expected

    line, head = chained(Head(), TIME, BEGUN, beginning(KEY.public_key()))
    signed, _ = chained(head, TIME, CHECKPOINT, checkpoint(head, OTHER))
    assert faulty(verify(line + signed)) == [2]


@given(st.binary(max_size=300))
def test_any_bytes_are_looked_at_without_an_error(content: bytes) -> None:
    verify(content)
    verify(LOG + content)
    verify(LINES[0] + content + b"\n")
    verify(b"[" * 100_000 + content)

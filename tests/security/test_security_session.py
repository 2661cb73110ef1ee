"""A TLS session without a wire: what is sealed arrives, and nothing else is taken for it."""

from __future__ import annotations

import contextlib
import copy
import ssl
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfl_dist.errors import IdentityError, ProtocolError
from gptfl_dist.security.authority import Authority, Credentials
from gptfl_dist.security.credentials import tls_context
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.session import LONGEST, LONGEST_SEALED, Session

AUTHORITY = Authority.new("fed", valid=timedelta(days=1))
COORDINATOR = Identity("fed", "coordinator", "coordinator")
ALICE = Identity("fed", "silo", "alice")
OURS = AUTHORITY.issue_coordinator(["localhost"])
HERS = AUTHORITY.issue_silo("alice")
EXPIRED = copy.copy(AUTHORITY)
EXPIRED._valid = timedelta(seconds=-10)
OTHER = Authority.new("fed", valid=timedelta(days=1))


def ends(ours: Credentials = OURS, hers: Credentials = HERS) -> tuple[Session, Session]:
    """The coordinator's end and that of a silo, who should be alice, before the handshake."""
    return Session(ours, ALICE, "rank 1"), Session(hers, COORDINATOR, "rank 0")


def shake_hands(coordinator: Session, silo: Session) -> None:
    flight = silo.step()
    while flight:
        flight = coordinator.step(flight)
        if flight:
            flight = silo.step(flight)


def established() -> tuple[Session, Session]:
    coordinator, silo = ends()
    shake_hands(coordinator, silo)
    assert coordinator.established
    assert silo.established
    return coordinator, silo


def opened(session: Session, records: bytes) -> tuple[int, bytes]:
    kind, content = session.open(records)
    return kind, bytes(content)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 255), st.binary(min_size=1, max_size=40_000)), max_size=6))
@settings(max_examples=30)
def test_messages_arrive_in_both_directions_and_are_not_to_be_seen(messages):
    coordinator, silo = established()
    for down, kind, data in messages:
        sender, receiver = (coordinator, silo) if down else (silo, coordinator)
        records = sender.seal(kind, data)
        assert len(data) < 16 or data not in records
        assert opened(receiver, records) == (kind, data)


@pytest.mark.parametrize("size", [LONGEST - 1, LONGEST])
def test_the_longest_messages_fit_their_bound(size):
    coordinator, silo = established()
    data = bytes(range(256)) * (size // 256 + 1)
    records = coordinator.seal(7, memoryview(data)[:size])
    assert len(records) <= LONGEST_SEALED
    assert opened(silo, records) == (7, data[:size])


def test_messages_that_are_on_their_way_at_once_are_opened_in_turn():
    coordinator, silo = established()
    sealed = [coordinator.seal(number, bytes([number]) * 100_000) for number in range(4)]
    answer = silo.seal(9, b"meanwhile")
    for number, records in enumerate(sealed):
        assert opened(silo, records) == (number, bytes([number]) * 100_000)
    assert opened(coordinator, answer) == (9, b"meanwhile")


def _record_ends(records: bytes) -> list[int]:
    found = [0]
    while found[-1] < len(records):
        found.append(found[-1] + 5 + int.from_bytes(records[found[-1] + 3 : found[-1] + 5]))
    return found


def test_a_message_that_is_cut_short_is_refused_wherever_it_is_cut():
    length = len(established()[0].seal(1, bytes(40_000)))
    for cut in {1, 4, 5, 20, length // 2, length - 1}:
        coordinator, silo = established()
        with pytest.raises(ProtocolError, match=r"rank 0 sent \d+ bytes that are not whole TLS records"):
            opened(silo, coordinator.seal(1, bytes(40_000))[:cut])


def test_a_message_that_is_cut_between_its_records_is_refused():
    """Its head says how long it is; else the rest would be taken for another message."""
    count = len(_record_ends(established()[0].seal(1, bytes(40_000)))) - 1
    assert count > 3
    for kept in range(count):
        coordinator, silo = established()
        records = coordinator.seal(1, bytes(40_000))
        with pytest.raises(ProtocolError, match="less than a whole message"):
            opened(silo, records[: _record_ends(records)[kept]])


def test_two_messages_in_one_are_refused():
    coordinator, silo = established()
    with pytest.raises(ProtocolError, match="more than the message of 3 bytes"):
        opened(silo, coordinator.seal(1, b"one") + coordinator.seal(1, b"two"))


def test_a_repeated_message_is_refused():
    coordinator, silo = established()
    records = coordinator.seal(1, b"pay")
    opened(silo, records)
    with pytest.raises(ProtocolError, match="is not what it sent"):
        opened(silo, records)


@pytest.mark.parametrize("first", [1, 2])
def test_swapped_messages_and_what_follows_a_missing_one_are_refused(first):
    coordinator, silo = established()
    sealed = [coordinator.seal(1, b"same size") for _ in range(3)]
    with pytest.raises(ProtocolError, match="is not what it sent"):
        opened(silo, sealed[first])


def test_a_message_of_another_session_or_of_the_other_direction_is_refused():
    other, _ = established()
    _, silo = established()
    with pytest.raises(ProtocolError, match="is not what it sent"):
        opened(silo, other.seal(1, b"data"))
    _, silo = established()
    with pytest.raises(ProtocolError, match="is not what it sent"):
        opened(silo, silo.seal(1, b"data"))


@given(st.data())
@settings(max_examples=100)
def test_a_message_with_a_flipped_bit_is_refused(data):
    coordinator, silo = established()
    records = bytearray(coordinator.seal(1, bytes(20_000)))
    place = data.draw(st.integers(0, 8 * len(records) - 1))
    records[place // 8] ^= 1 << place % 8
    with pytest.raises(ProtocolError):
        opened(silo, bytes(records))


def test_what_is_too_long_is_refused_before_it_is_read():
    _, silo = established()
    with pytest.raises(ProtocolError, match=f"expected at most {LONGEST_SEALED}"):
        opened(silo, bytes(LONGEST_SEALED + 1))


def test_a_size_out_of_bounds_is_refused():
    for size in (0, LONGEST + 1, 0xFFFFFFFF):
        coordinator, silo = established()
        coordinator._ssl.write(b"\x01" + size.to_bytes(4))
        with pytest.raises(ProtocolError, match=f"a message of {size} bytes"):
            silo.open(coordinator._outgoing.read())


def test_a_session_that_the_peer_ended_is_refused():
    coordinator, silo = established()
    with pytest.raises(ssl.SSLWantReadError):
        coordinator._ssl.unwrap()
    with pytest.raises(ProtocolError, match="rank 0 has ended the TLS session"):
        opened(silo, coordinator._outgoing.read())


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (
            AUTHORITY.issue_silo("bob"),
            r"is that of gptfl://fed/silo/bob, expected a valid one of gptfl://fed/silo/alice",
        ),
        (OTHER.issue_silo("alice"), r"is not one to trust \(.*\), expected .*silo/alice"),
        (EXPIRED.issue_silo("alice"), r"is not one to trust \(certificate has expired\), expected .*silo/alice"),
        (AUTHORITY.issue_coordinator(["localhost"]), r"is not one to trust \(unsuitable certificate purpose\)"),
    ],
)
def test_a_silo_with_the_wrong_certificate_is_refused(theirs, said):
    coordinator, silo = ends(hers=Credentials(AUTHORITY.roots, theirs.certificate, theirs.key))
    with pytest.raises(IdentityError, match=f"the certificate of rank 1 {said}"):
        shake_hands(coordinator, silo)
    assert not coordinator.established


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (AUTHORITY.issue_silo("alice"), r"is not one to trust \(unsuitable certificate purpose\)"),
        (OTHER.issue_coordinator(["localhost"]), r"is not one to trust \(.*\)"),
        (EXPIRED.issue_coordinator(["localhost"]), r"is not one to trust \(certificate has expired\)"),
    ],
)
def test_a_coordinator_with_the_wrong_certificate_is_refused(theirs, said):
    coordinator, silo = ends(ours=Credentials(AUTHORITY.roots, theirs.certificate, theirs.key))
    with pytest.raises(IdentityError, match=rf"the certificate of rank 0 {said}, expected .* gptfl://fed/coordinator"):
        shake_hands(coordinator, silo)
    assert not silo.established


def test_a_coordinator_of_another_federation_under_the_same_authority_is_refused():
    elsewhere = copy.copy(AUTHORITY)
    elsewhere.federation = "elsewhere"
    coordinator, silo = ends(ours=elsewhere.issue_coordinator(["localhost"]))
    with pytest.raises(IdentityError, match="is that of gptfl://elsewhere/coordinator"):
        shake_hands(coordinator, silo)


def test_a_silo_without_a_certificate_is_refused():
    coordinator, _ = ends()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    nobody = context.wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        nobody.do_handshake()
    incoming.write(coordinator.step(outgoing.read()))
    nobody.do_handshake()
    with pytest.raises(ProtocolError, match="rank 1: PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        coordinator.step(outgoing.read())


def test_a_peer_that_speaks_no_tls_1_3_is_refused():
    coordinator, _ = ends()
    outgoing = ssl.MemoryBIO()
    context = tls_context(HERS, server=False)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    old = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        old.do_handshake()
    with pytest.raises(ProtocolError, match=r"no TLS 1\.3 session with rank 1: UNSUPPORTED_PROTOCOL"):
        coordinator.step(outgoing.read())


def test_nothing_is_left_to_send_once_both_are_established():
    """No tickets: a session is not resumed."""
    coordinator, silo = established()
    assert coordinator._outgoing.pending == silo._outgoing.pending == 0
    assert coordinator._ssl.version() == silo._ssl.version() == "TLSv1.3"


@given(st.binary(max_size=2000))
def test_a_handshake_with_noise_ends_in_a_refusal_or_waits(noise):
    coordinator, _ = ends()
    with contextlib.suppress(ProtocolError):
        coordinator.step(noise)
    assert not coordinator.established

"""The enrolment port: what an invitation is good for, and what those without one find there."""

from __future__ import annotations

import ipaddress
import json
import socket
import sqlite3
import ssl
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import timedelta
from typing import get_args

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import assume, given
from hypothesis import strategies as st
from support import free_port, listens, wait_for

from gptfl_dist.errors import ConfigError, ConnectionFailed, IdentityError
from gptfl_dist.security import enrolment as enrolment_module
from gptfl_dist.security import registry as registry_module
from gptfl_dist.security.authority import Authority, new_key
from gptfl_dist.security.enrolment import Desk, Enrolment, counted_as
from gptfl_dist.security.identity import Identity, Invited
from gptfl_dist.security.invitation import InvitationLine, root_fingerprint
from gptfl_dist.security.join import enrol, own_key
from gptfl_dist.security.registry import Registry
from gptfl_dist.security.request import fingerprint_of, make_request
from gptfl_dist.security.vault import Vault

HOUR = timedelta(hours=1)
ALICE = Identity("fed", "silo", "alice")


class Office:
    """An authority with its enrolment port; a context manager."""

    def __init__(self, folder, *, approval=False, host="127.0.0.1"):
        self.vault = Vault(folder / "authority", "fed")
        self.vault.create()
        self.registry = Registry(self.vault.folder)
        self.registry.create()
        self.authority = self.vault.open(timedelta(days=1))
        self.port = free_port()
        self.host = host
        shown = self.authority.issue_coordinator(["localhost", "127.0.0.1"])
        self.desk = Desk(lambda: self.authority, self.registry, lambda: shown, approval, "localhost:8443", self.note)
        self.noted = []
        self._stack = ExitStack()

    def note(self, event, **fields):
        self.noted.append((event, fields))

    def invite(self, name="alice", valid=HOUR, role="silo"):
        who = Identity("fed", role, name)
        fingerprint = root_fingerprint(self.vault.roots()[0])
        return InvitationLine(f"localhost:{self.port}", who, self.registry.invite(who, valid), fingerprint)

    def __enter__(self):
        self._stack.enter_context(Enrolment(f"{self.host}:{self.port}", self.desk))
        return self

    def __exit__(self, *_):
        self._stack.close()

    def connected(self, *, least=ssl.TLSVersion.TLSv1_3, most=ssl.TLSVersion.MAXIMUM_SUPPORTED):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.minimum_version, context.maximum_version = least, most
        return context.wrap_socket(socket.create_connection(("127.0.0.1", self.port), timeout=20))

    def post(self, body: bytes, path="/v1/enrol", length=None):
        """The status and the content of an answer."""
        with self.connected() as line:
            length = len(body) if length is None else length
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
            line.sendall(head.encode() + body)
            answer = b"".join(iter(lambda: line.recv(65536), b""))
        head, _, content = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(content)


@pytest.fixture
def office(tmp_path, monkeypatch):
    monkeypatch.setattr(enrolment_module, "_LOOK_EVERY", 0.05)
    return Office(tmp_path)


@pytest.mark.parametrize("role", get_args(Invited))
def test_an_invitation_brings_a_certificate_for_the_key_that_was_made_here(office, role):
    invitation = office.invite(role=role)
    with office:
        key = new_key()
        enrolled = enrol(InvitationLine.parse(str(invitation)), key)
    assert enrolled.address == "localhost:8443"
    assert enrolled.credentials.authority == office.authority.roots
    (issued,) = office.registry.certificates()
    assert (issued.role, issued.name, issued.key) == (role, "alice", fingerprint_of(key.public_key()))
    ((event, fields),) = office.noted
    assert event == f"{role} enrolled"
    assert (fields[role], fields["serial"]) == ("alice", issued.serial)
    shown = x509.load_pem_x509_certificate(enrolled.credentials.certificate).extensions
    names = shown.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == [f"gptfl://fed/{role}/alice"]
    usage = shown.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_a_token_is_for_one_role(office):
    """Whoever was invited as an observer, or as a silo, does not become an operator by it."""
    invitation = office.invite(role="observer")
    with office:
        for role in ("operator", "silo"):
            with pytest.raises(IdentityError, match="not known, or was used"):
                enrol(replace(invitation, who=Identity("fed", role, "alice")), new_key())
        assert enrol(invitation, new_key())


def test_nobody_enrols_as_the_coordinator_or_in_another_federation(office):
    invitation = office.invite()
    with office:
        for who in (Identity("fed", "coordinator", "coordinator"), Identity("other", "silo", "alice")):
            request = make_request(who, new_key()).decode()
            asked = {"identity": who.uri, "token": invitation.token, "request": request}
            status, answer = office.post(json.dumps(asked).encode())
            assert (status, answer["error"]) == (403, f"nobody is given a certificate of {who.uri} here")
        assert enrol(invitation, new_key())


def test_a_registry_from_when_there_were_silos_alone_is_read_on(tmp_path):
    (tmp_path / "registry.sqlite").touch(0o600)
    with closing(sqlite3.connect(tmp_path / "registry.sqlite")) as old:
        old.executescript(
            "CREATE TABLE invitations(token TEXT PRIMARY KEY, silo TEXT NOT NULL, expires TEXT NOT NULL,"
            " key TEXT, asked TEXT, approved TEXT, used TEXT);"
            "CREATE TABLE certificates(serial TEXT PRIMARY KEY, silo TEXT NOT NULL, issued TEXT NOT NULL,"
            " expires TEXT NOT NULL, key TEXT NOT NULL, issuer TEXT NOT NULL, revoked TEXT, reason TEXT);"
            "INSERT INTO certificates VALUES ('1f', 'alice', '2026-01-01', '2026-02-01', 'k', '1', NULL, NULL);"
        )
    registry = Registry(tmp_path)
    (issued,) = registry.certificates()
    assert (issued.serial, issued.role, issued.name) == ("1f", "silo", "alice")
    registry.invite(Identity("fed", "operator", "alice"), HOUR)
    assert [(each.role, each.name) for each in registry.invitations()] == [("operator", "alice")]
    assert registry.revoke(ALICE, "lost")[0].serial == "1f"
    assert registry.is_open()  # the operator's invitation is another's


def test_the_port_is_open_only_while_somebody_is_invited(office):
    with office:
        assert not listens(office.port)
        invitation = office.invite()
        wait_for(lambda: listens(office.port))
        enrol(invitation, new_key())
        wait_for(lambda: not listens(office.port), seconds=10)
    with office:  # started again
        assert not listens(office.port)
        short = office.invite("bob", timedelta(seconds=1))
        wait_for(lambda: listens(office.port))
        wait_for(lambda: not listens(office.port))
        with pytest.raises(ConnectionFailed, match="does not answer"):
            enrol(short, new_key())


def test_the_port_stays_open_for_who_waits_for_approval(tmp_path, monkeypatch):
    monkeypatch.setattr(enrolment_module, "_LOOK_EVERY", 0.05)
    office, key = Office(tmp_path, approval=True), new_key()
    invitation = office.invite()
    with office:
        assert enrol(invitation, key) is None
        now = registry_module._now
        monkeypatch.setattr(registry_module, "_now", lambda: now() + HOUR / 2)  # long after it asked
        time.sleep(0.3)  # several looks whether the port is needed
        office.registry.approve(ALICE, fingerprint_of(key.public_key()))
        assert enrol(invitation, key)
        monkeypatch.setattr(registry_module, "_now", lambda: now() + HOUR * 0.6)
        wait_for(lambda: not listens(office.port))


def test_a_token_works_once_and_again_only_for_the_key_that_used_it(office):
    invitation, other = office.invite(), office.invite("bob")
    with office:
        key = new_key()
        enrol(invitation, key)
        again = enrol(invitation, key)  # its answer may have been lost
        assert again.credentials.key == enrol(invitation, key).credentials.key
        with pytest.raises(IdentityError, match="not known, or was used"):
            enrol(invitation, new_key())
        assert enrol(other, new_key())


def test_an_answer_that_was_lost_can_be_asked_for_again_though_nobody_else_is_invited(office):
    invitation, key = office.invite(), new_key()
    with office:
        enrol(invitation, key)
        time.sleep(0.3)  # several looks whether the port is needed
        assert enrol(invitation, key)


@pytest.mark.parametrize("by_serial", [False, True])
def test_a_revoked_silo_does_not_come_back_by_the_line_that_it_used(office, by_serial):
    invitation, key = office.invite(), new_key()
    office.invite("bob")  # keeps the port open
    with office:
        enrol(invitation, key)
        (issued,) = office.registry.certificates()
        office.registry.revoke(issued.serial if by_serial else ALICE, "stolen")
        with pytest.raises(IdentityError, match="not known, or was used"):
            enrol(invitation, key)
        assert enrol(office.invite(), new_key())


def test_a_new_invitation_ends_what_the_last_one_was_good_for(office):
    invitation, key = office.invite(), new_key()
    with office:
        enrol(invitation, key)
        office.invite()
        with pytest.raises(IdentityError, match="not known, or was used"):
            enrol(invitation, key)


def test_a_token_is_for_one_name_and_the_last_invitation_counts(office):
    first = office.invite()
    second, bobs = office.invite(), office.invite("bob")
    with office:
        for line in (first, InvitationLine(bobs.address, ALICE, bobs.token, bobs.fingerprint)):
            with pytest.raises(IdentityError, match="not known, or was used"):
                enrol(line, new_key())
        assert enrol(second, new_key())


def test_a_token_that_is_too_old_is_refused(office, monkeypatch):
    invitation, _ = office.invite(), office.invite("bob", timedelta(days=2))
    with office:
        now = registry_module._now
        monkeypatch.setattr(registry_module, "_now", lambda: now() + timedelta(hours=2))
        with pytest.raises(IdentityError, match="the invitation expired at"):
            enrol(invitation, new_key())
    assert office.registry.certificates() == []


def test_a_request_for_another_name_does_not_use_the_token_up(office):
    invitation = office.invite()
    with office:
        asked = {
            "identity": ALICE.uri, "token": invitation.token,
            "request": make_request(Identity("fed", "silo", "bob"), new_key()).decode(),
        }  # fmt: skip
        status, answer = office.post(json.dumps(asked).encode())
        assert status == 403
        assert "gptfl://fed/silo/bob, expected gptfl://fed/silo/alice" in answer["error"]
        assert enrol(invitation, new_key())


def test_who_guesses_is_not_heard_for_a_while(office, monkeypatch):
    invitation = office.invite()
    with office:
        wrong = InvitationLine(invitation.address, ALICE, "x" * 32, invitation.fingerprint)
        for _ in range(5):
            with pytest.raises(IdentityError, match="not known, or was used"):
                enrol(wrong, new_key())
        with pytest.raises(IdentityError, match="too many wrong tries"):
            enrol(invitation, new_key())
        monkeypatch.setattr(enrolment_module, "_FORGOTTEN", 0.0)
        assert enrol(invitation, new_key())


def test_the_silo_tells_nothing_to_another_authority(office, tmp_path):
    """Whoever answers in the coordinator's place gets neither token nor name: the fingerprint is checked first."""
    invitation = office.invite()
    (tmp_path / "other").mkdir()
    other = Office(tmp_path / "other")
    other.invite()
    heard = []
    monkey = enrolment_module._Request.do_POST
    enrolment_module._Request.do_POST = lambda self: heard.append(self.path)
    try:
        with other, pytest.raises(IdentityError, match="is not the authority of the invitation"):
            enrol(InvitationLine(f"localhost:{other.port}", ALICE, invitation.token, invitation.fingerprint), new_key())
    finally:
        enrolment_module._Request.do_POST = monkey
    assert heard == []


def test_an_authority_that_is_real_but_shown_by_somebody_else_is_not_believed(office, tmp_path):
    """The root is public: who passes it on and shows a certificate of another authority gets no token either."""
    invitation = office.invite()
    stranger = Authority.new("fed", valid=HOUR).issue_coordinator(["localhost"])
    office.desk = Desk(lambda: office.authority, office.registry, lambda: stranger, False, "localhost:1", office.note)
    with office, pytest.raises(IdentityError, match="not one to trust"):
        enrol(invitation, new_key())


def test_the_operator_may_have_to_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(enrolment_module, "_LOOK_EVERY", 0.05)
    office = Office(tmp_path, approval=True)
    invitation = office.invite()
    key = new_key()
    with office:
        assert enrol(invitation, key) is None
        assert enrol(invitation, key) is None
        (asks,) = [each for each in office.registry.invitations() if each.key]
        assert asks.key == fingerprint_of(key.public_key())
        with pytest.raises(IdentityError, match="not known, or was used"):
            enrol(invitation, new_key())  # somebody else with the same line
        with pytest.raises(IdentityError, match="nobody asks to be alice with the key"):
            office.registry.approve(ALICE, fingerprint_of(new_key().public_key()))
        office.registry.approve(ALICE, asks.key)
        assert enrol(invitation, key) is not None


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"[" * 16000, b'{"identity": "gptfl://fed/silo/a"}',
     b'{"identity": 1, "token": "x", "request": ""}',
     b'{"identity": "gptfl://fed/silo/a", "token": "x", "request": 5}',
     b'{"identity": "gptfl://fed/silo/a", "token": [], "request": ""}', b"\xff\xfe"],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(office, body):
    office.invite()
    with office:
        status, answer = office.post(body)
        assert status == 403
        assert answer["error"]


@pytest.mark.parametrize("length", ["1000000000", "-1", "abc", "20000"])
def test_no_memory_is_taken_for_what_is_announced(office, length):
    office.invite()
    with office:
        status, answer = office.post(b"", length=length)
        assert status == 403
        assert "expected at most" in answer["error"]


@pytest.mark.parametrize("path", ["/", "/v1/other", "/../../etc/passwd", "/v1/enrol/"])
def test_there_is_nothing_else_behind_the_port(office, path):
    office.invite()
    with office:
        assert office.post(b"{}", path=path)[0] == 404


def test_nothing_below_tls_1_3_is_spoken(office):
    office.invite()
    with office, pytest.raises(ssl.SSLError):
        office.connected(least=ssl.TLSVersion.TLSv1_2, most=ssl.TLSVersion.TLSv1_2)


def test_who_dawdles_or_comes_in_masses_keeps_nobody_else_out(office, monkeypatch):
    monkeypatch.setattr(enrolment_module, "_PATIENCE", 2.0)
    invitation = office.invite()
    with office:
        dawdling = office.connected()
        ended = threading.Event()

        def dawdle():
            try:
                for letter in b"POST /v1/enrol HTTP/1.1\r\nX-A: " + b"a" * 1000:
                    dawdling.send(bytes([letter]))
                    time.sleep(0.1)
            except OSError:
                ended.set()

        thread = threading.Thread(target=dawdle)
        thread.start()
        address, elsewhere = ("127.0.0.1", office.port), ("127.0.0.2", 0)
        masses = [socket.create_connection(address, source_address=elsewhere) for _ in range(1000)]
        assert enrol(invitation, new_key())
        wait_for(lambda: ended.is_set(), 20)
        thread.join()
        for line in (dawdling, *masses):
            line.close()


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(1, 2**64 - 1))
def test_all_addresses_that_one_ipv6_host_can_take_count_as_one(network, host, other):
    address = [
        str(ipaddress.IPv6Address(number)) for number in ((network << 64) + host, (network << 64) + (host ^ other))
    ]
    elsewhere = str(ipaddress.IPv6Address(((network ^ other) << 64) + host))
    assume(not any(one.startswith("::ffff:") for one in (*address, elsewhere)))
    assert counted_as(address[0]) == counted_as(address[1]) != counted_as(elsewhere)


def test_addresses_of_ipv4_count_each_for_itself_over_an_ipv6_socket_too():
    assert counted_as("192.0.2.1") == counted_as("::ffff:192.0.2.1") == "192.0.2.1" != counted_as("192.0.2.2")
    assert counted_as("fe80::1%1") == counted_as("fe80::2%1")


def test_a_key_is_made_once_and_is_its_owners_alone(tmp_path):
    path = tmp_path / "credentials" / "key.pem"
    key = own_key(path)
    assert path.stat().st_mode & 0o077 == 0
    assert own_key(path).public_key() == key.public_key()
    path.write_text("hello")
    with pytest.raises(IdentityError, match="no private key of ours"):
        own_key(path)


@pytest.mark.parametrize(
    "line",
    ["", "hello", "gptfl://a:1/fed/alice/token", "gptfl://a:1/fed/../x/" + "t" * 32 + "/" + "0" * 64,
     "gptfl://a:99999/fed/alice/" + "t" * 32 + "/" + "0" * 64, "gptfl://a:1/fed/al%2Fice/" + "t" * 32 + "/" + "0" * 64,
     "https://a:1/fed/alice/" + "t" * 32 + "/" + "0" * 64, "gptfl://a:1/fed/alice/" + "t" * 32 + "/" + "0" * 63],
)  # fmt: skip
def test_what_is_no_invitation_is_told(line):
    with pytest.raises(ConfigError, match="no invitation") as error:
        InvitationLine.parse(line)
    assert "gptfl invite" in error.value.hint


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_all_addresses_are_those_of_ipv4_and_ipv6_whichever_stands_for_them(tmp_path, host, caplog):
    with Office(tmp_path, host=host) as office:
        office.invite()
        wait_for(lambda: listens(office.port))
        assert office.post(b"{}")[0] == 403
        assert "enrolment: 127.0.0.1 is refused" in caplog.text
        socket.create_connection(("::1", office.port), timeout=20).close()

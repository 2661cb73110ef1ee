"""Two machines whose clocks differ: each side is told by how much, and not in the words of TLS."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import socket
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from support import free_port

from gptfl_dist.errors import IdentityError
from gptfl_dist.security.authority import Authority
from gptfl_dist.security.clocks import out_of_date, require_same_time, span
from gptfl_dist.security.credentials import load_credentials, tls_context
from gptfl_dist.security.enrolment import Desk, Enrolment
from gptfl_dist.security.handshake import shake_hands
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.invitation import InvitationLine, root_fingerprint
from gptfl_dist.security.join import enrol, own_key
from gptfl_dist.security.registry import Registry
from gptfl_dist.security.vault import Vault

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@contextlib.contextmanager
def coordinators_clock(monkeypatch: pytest.MonkeyPatch, ahead: timedelta):
    """In the block certificates are made, and HTTP answers dated, by a clock that is ahead of this machine's."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + ahead

    dated = BaseHTTPRequestHandler.date_time_string
    with monkeypatch.context() as patched:
        patched.setattr("gptfl_dist.security.authority.datetime", Clock)
        patched.setattr(
            BaseHTTPRequestHandler,
            "date_time_string",
            lambda self, timestamp=None: dated(self, (datetime.now(UTC) + ahead).timestamp()),
        )
        yield


def coordinator(monkeypatch, ahead):
    """An authority, and a coordinator's certificate that it made by its own clock."""
    authority = Authority.new("fed", valid=7 * DAY)
    with coordinators_clock(monkeypatch, ahead):
        return authority, authority.issue_coordinator(["127.0.0.1"])


def dialled(shown, silo, *, answers=2) -> IdentityError:
    """The error of a silo that dials a server which shows a certificate, and asks for one; so often it answers."""

    def serve(listener):
        for _ in range(answers):
            line, _ = listener.accept()
            with line, contextlib.suppress(OSError):
                tls_context(shown, server=True).wrap_socket(line, server_side=True).recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        with pytest.raises(IdentityError) as error:
            asyncio.run(shake_hands(f"127.0.0.1:{port}", silo))
    return error.value


@pytest.mark.parametrize(
    ("ahead", "said"),
    [
        (3 * HOUR, "certificate is not yet valid: valid .*: 2 h 5[45] min.* too early"),
        (-9 * DAY, "certificate has expired: valid .*: 2 days too late"),
    ],
)
def test_a_silo_that_dials_reads_by_how_much_its_clock_is_off(monkeypatch, ahead, said):
    authority, shown = coordinator(monkeypatch, ahead)
    error = dialled(shown, authority.issue_silo("alice"))
    assert error.message.startswith("the certificate of 127.0.0.1:")
    with pytest.raises(IdentityError, match=said):
        raise error
    assert "set this machine's clock" in error.hint


def test_a_silo_whose_certificate_is_over_by_the_coordinators_clock_reads_both(monkeypatch):
    authority = Authority.new("fed", valid=7 * DAY)
    late = copy.copy(authority)
    late._valid = timedelta(seconds=-1)
    error = dialled(authority.issue_coordinator(["127.0.0.1"]), late.issue_silo("alice"), answers=1)
    assert "does not take this side's certificate: expired, it says; it is valid " in error.message
    assert "by this machine's clock" in error.message
    assert "gptfl invite FEDERATION_FILE alice" in error.hint
    assert "compare the clocks" in error.hint


def test_a_certificate_of_tomorrow_is_refused_with_the_time_between(monkeypatch, tmp_path):
    authority = Authority.new("fed", valid=7 * DAY)
    with coordinators_clock(monkeypatch, 3 * HOUR):
        authority.issue_silo("alice").save(tmp_path)
    with pytest.raises(IdentityError, match=r"by this machine's clock: 2 h 5[45] min too early") as error:
        load_credentials(*(tmp_path / f"{name}.pem" for name in ("authority", "certificate", "key")))
    assert "set this machine's clock" in error.value.hint


@pytest.mark.parametrize(
    ("ahead", "said"),
    [(3 * HOUR, "it is (3 h|2 h 59 min) behind"), (-HOUR / 2, "it is 30 min.* ahead"), (HOUR / 15, "")],
)
def test_a_silo_that_joins_reads_both_clocks_and_keeps_its_invitation(monkeypatch, tmp_path, ahead, said):
    vault, registry = Vault(tmp_path / "authority", "fed"), Registry(tmp_path / "authority")
    vault.create()
    registry.create()
    authority, alice, port = vault.open(7 * DAY), Identity("fed", "silo", "alice"), free_port()
    fingerprint = root_fingerprint(vault.roots()[0])
    line = InvitationLine(f"localhost:{port}", alice, registry.invite(alice, HOUR), fingerprint)
    with coordinators_clock(monkeypatch, ahead):
        shown = authority.issue_coordinator(["localhost"])
        desk = Desk(lambda: authority, registry, lambda: shown, False, "localhost:1", lambda event, **fields: None)
        with Enrolment(f"127.0.0.1:{port}", desk):
            key = own_key(tmp_path / "key.pem")
            if not said:
                assert enrol(line, key) is not None
                return
            with pytest.raises(IdentityError, match=said) as error:
                enrol(line, key)
    assert "this machine's clock says" in error.value.message
    assert "the coordinator's" in error.value.message
    assert "clock" in error.value.hint
    assert registry.invitations()[0].key is None


@pytest.mark.parametrize("told", ["", "tomorrow", "Thu, 99 Nov 9999 25:00:00 GMT", "Fri, 31 Dec 9999 23:59:59 -2300"])
def test_a_clock_that_tells_no_time_is_not_compared(told):
    require_same_time(told, "the coordinator")


@given(st.timedeltas(min_value=-timedelta(days=4000), max_value=timedelta(days=4000)))
def test_a_span_is_told_in_two_units_and_never_off_by_more_than_the_smaller(time):
    units = {"day": 86400, "days": 86400, "h": 3600, "min": 60, "s": 1}
    words = span(time).split()
    told = [(int(count), units[unit]) for count, unit in zip(words[::2], words[1::2], strict=True)]
    assert len(told) in (1, 2)
    assert [unit for _, unit in told] == sorted((unit for _, unit in told), reverse=True)
    seconds = sum(count * unit for count, unit in told)
    assert 0 <= round(abs(time.total_seconds())) - seconds < 60 * told[-1][1]


def test_a_certificate_that_holds_is_not_out_of_date():
    made = Authority.new("fed", valid=DAY).issue_silo("alice").certificate
    assert out_of_date(x509.load_pem_x509_certificate(made)) == ""

"""The way into a federation of a silo, an operator or an observer: from an invitation to a certificate of their own.

This side makes its key, which never leaves it. It asks for the root certificate, over a connection that it has no way
to trust yet, and compares it with the fingerprint in its invitation; over a second one, which that root vouches for, it
sends the token and a certificate request.
"""

from __future__ import annotations

import http.client
import json
import ssl
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gptfl_dist.config.base import host_of, port_of
from gptfl_dist.errors import ConnectionFailed, IdentityError, ProtocolError
from gptfl_dist.files import write_file
from gptfl_dist.security.authority import Credentials, key_bytes, new_key
from gptfl_dist.security.clocks import require_same_time
from gptfl_dist.security.credentials import identity_in
from gptfl_dist.security.enrolment import AUTHORITY, ENROL
from gptfl_dist.security.handshake import proxy_for
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.invitation import InvitationLine, root_fingerprint
from gptfl_dist.security.request import make_request

_PATIENCE = 10.0  # seconds
_LONGEST_ANSWER = 256 << 10


class Enrolled(NamedTuple):
    """The credentials of who enrolled, and the address at which to dial the coordinator."""

    credentials: Credentials
    address: str


def own_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key in a file, 0600; where there is none it is made. Raises IdentityError, StorageError."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(path, key_bytes(new_key()))
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path}: no private key of ours", hint="move it away, then join again")
    return key


def enrol(invitation: InvitationLine, key: ec.EllipticCurvePrivateKey) -> Enrolled | None:
    """Enrols with this key; None where the coordinator's operator has yet to approve: then call again.

    Raises ConnectionFailed where nobody answers, IdentityError where the coordinator is another or refuses, or the
    clocks differ by too much.
    """
    root = _trusted_root(invitation)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=root.decode())
    asked = {
        "identity": invitation.who.uri,
        "token": invitation.token,
        "request": make_request(invitation.who, key).decode(),
    }
    status, answer, _ = _ask(invitation, context, "POST", ENROL, json.dumps(asked))
    if status == 202:
        return None
    if status != 200:
        raise IdentityError(f"the coordinator refuses: {_text(answer, 'error')}", hint=_text(answer, "hint"))
    certificate, authority = (_text(answer, name).encode() for name in ("certificate", "authority"))
    made = x509.load_pem_x509_certificate(certificate)
    if made.public_key() != key.public_key() or identity_in(certificate, "the new certificate") != invitation.who:
        raise ProtocolError("the coordinator made a certificate for somebody else")
    return Enrolled(Credentials(authority, certificate, key_bytes(key)), _text(answer, "address"))


def _trusted_root(invitation: InvitationLine) -> bytes:
    """The root certificate whose fingerprint stands in the invitation, PEM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # what it answers is public, and checked by its fingerprint
    _, answer, time = _ask(invitation, context, "GET", AUTHORITY, None)
    try:
        roots = x509.load_pem_x509_certificates(_text(answer, "authority").encode())
    except ValueError:
        roots = []
    for root in roots:
        if root_fingerprint(root) == invitation.fingerprint:
            require_same_time(time, "the coordinator")
            return root.public_bytes(serialization.Encoding.PEM)
    raise IdentityError(
        f"what answers at {invitation.address} is not the authority of the invitation",
        hint="somebody may be in between: compare the fingerprint that gptfl authority show prints on the other side, "
        "or ask for a new invitation",
    )


def _ask(
    invitation: InvitationLine, context: ssl.SSLContext, method: str, path: str, body: str | None
) -> tuple[int, Any, str]:
    """Status, content and time of an answer. Raises ConnectionFailed, IdentityError, ProtocolError."""
    address = invitation.address
    host, port = host_of(address), port_of(address)
    proxy = proxy_for(address)
    first = (host, port) if proxy is None else (proxy.host, proxy.port)
    connection = http.client.HTTPSConnection(*first, timeout=_PATIENCE, context=context)
    try:
        if proxy is not None:
            connection.set_tunnel(host, port, proxy.headers)
        connection.connect()
        if context.verify_mode is ssl.CERT_REQUIRED:
            _require_coordinator(connection, invitation)
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        content = response.read(_LONGEST_ANSWER)
        return response.status, json.loads(content), response.headers.get("Date", "")
    except ssl.SSLCertVerificationError as error:
        raise IdentityError(
            f"the certificate of {address} is not one to trust: {error.verify_message}",
            hint="ask the coordinator's operator whether enrolment.hosts names this host",
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionFailed(
            f"{address} does not answer: {error}",
            hint="check that the coordinator runs and that this machine may dial out to that port; the port is closed "
            "where no invitation is open: if yours was used and its answer lost, ask for a new one",
        ) from None
    except (ValueError, RecursionError):
        raise ProtocolError(f"{address} answers what is no answer", hint="check the address") from None
    finally:
        connection.close()


def _require_coordinator(connection: http.client.HTTPSConnection, invitation: InvitationLine) -> None:
    """A silo's certificate cannot serve; still the one that answers must be the coordinator's own."""
    assert isinstance(connection.sock, ssl.SSLSocket)
    shown = ssl.DER_cert_to_PEM_cert(connection.sock.getpeercert(binary_form=True) or b"").encode()
    expected = Identity(invitation.who.federation, "coordinator", "coordinator")
    found = identity_in(shown, f"the certificate of {invitation.address}")
    if found != expected:
        raise IdentityError(f"{invitation.address} is {found.uri}, expected {expected.uri}")


def _text(answer: Any, name: str) -> str:
    value = answer.get(name, "") if isinstance(answer, dict) else ""
    return value if isinstance(value, str) else ""

"""Who a peer is: read from its certificate alone, never from what it says.

A certificate of a federation carries exactly one URI among its alternative names: `gptfl://FEDERATION/coordinator`, or
`gptfl://FEDERATION/ROLE/NAME` of a silo, an operator or an observer. What each may do: `security/authorisation.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Self, get_args
from urllib.parse import quote, unquote, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from gptfl_dist.errors import IdentityError

Invited = Literal["silo", "operator", "observer"]
"""The roles that there may be many of, each under a name. They dial; only the coordinator serves."""

Role = Literal["coordinator", "silo", "operator", "observer"]


@dataclass(frozen=True, slots=True)
class Identity:
    """A role in a federation; `name` is the silo's, operator's or observer's, or "coordinator"."""

    federation: str
    role: Role
    name: str

    @property
    def uri(self) -> str:
        """The URI that stands in the certificate."""
        path = "coordinator" if self.role == "coordinator" else f"{self.role}/{quote(self.name, safe='')}"
        return f"gptfl://{quote(self.federation, safe='')}/{path}"

    @classmethod
    def from_uri(cls, uri: str) -> Self:
        """Raises IdentityError where the URI is no identity of ours."""
        try:
            parts = urlsplit(uri)
        except ValueError:
            parts = urlsplit("")
        steps = parts.path.split("/")
        # netloc, not hostname: the latter is folded to lower case.
        identity: Self | None = None
        if parts.path == "/coordinator":
            identity = cls(unquote(parts.netloc), "coordinator", "coordinator")
        elif len(steps) == 3 and (role := next((each for each in get_args(Invited) if each == steps[1]), None)):
            identity = cls(unquote(parts.netloc), role, unquote(steps[2]))
        # Only the one spelling that `uri` gives is taken, so that no two texts mean the same peer.
        if identity is None or not identity.federation or not identity.name or identity.uri != uri:
            raise IdentityError(f"the certificate names {uri!r}, expected gptfl://FEDERATION/ROLE/NAME")
        return identity


def called(role: Role, name: str) -> str:
    """What people call somebody: a silo by its name alone, others with their role before it."""
    return name if role in ("silo", "coordinator") else f"{role} {name}"


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection: who it is, and which certificate says so.

    The `certificate` is PEM, and told by its serial number and its SHA-256 in hex; it `expires` at a time as of
    time.time.
    """

    identity: Identity
    certificate: bytes
    serial: int
    fingerprint: str
    expires: float


def peer_of(auth_context: Mapping[str, Iterable[bytes]]) -> Peer:
    """The peer of a gRPC call, from its `auth_context()`. Raises IdentityError as `peer_identity`."""
    identity = peer_identity(auth_context)
    pem = b"".join(auth_context["x509_pem_cert"])
    read = x509.load_pem_x509_certificate(pem)
    fingerprint = read.fingerprint(hashes.SHA256()).hex()
    return Peer(identity, pem, read.serial_number, fingerprint, read.not_valid_after_utc.timestamp())


def peer_identity(auth_context: Mapping[str, Iterable[bytes]]) -> Identity:
    """The identity of the peer of a gRPC call, from its `auth_context()`.

    Raises IdentityError where the connection is older than TLS 1.3 or the certificate names not exactly one identity.
    """
    version = b"".join(auth_context.get("ssl_tls_version", ()))
    if version != b"TLSv1.3":
        raise IdentityError(f"the connection speaks {version.decode(errors='replace') or 'no TLS'}, expected TLSv1.3")
    uris = list(auth_context.get("peer_uri", ()))
    if len(uris) != 1:
        raise IdentityError(f"the certificate carries {len(uris)} URIs, expected exactly one")
    return Identity.from_uri(uris[0].decode(errors="replace"))

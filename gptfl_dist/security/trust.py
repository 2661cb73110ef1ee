"""Whom a coordinator lets in, and with which certificate it shows itself.

gRPC asks for certificates of the authority and for nothing else: whether one was revoked, or expired while its
connection was open, is asked here, with every message. `FixedTrust` goes by an authority that was made for one run,
`FileTrust` by files that somebody else renews; `KeptTrust` has an authority in a folder, which renews what is about to
expire and knows what was revoked.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from gptfl_dist.errors import GptflError, IdentityError, StorageError
from gptfl_dist.files import stamp_of
from gptfl_dist.security.authority import SKEW, Authority, Credentials
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.registry import Registry, serial_text
from gptfl_dist.security.request import fingerprint_of, key_in
from gptfl_dist.security.vault import Vault

RENEW_AT = 2 / 3
"""The share of a certificate's life after which it is renewed."""

_LOOK_EVERY = 0.2  # seconds between two looks at the registry: a revocation counts within so long


class Trust(Protocol):
    """What the coordinator's exchange asks about certificates."""

    def credentials(self) -> Credentials:
        """The coordinator's own, as they are to be shown now. Called from any thread."""

    def refusal(self, serial: int) -> str:
        """Why a certificate does not count any more, or ""."""

    def barred(self) -> dict[str, str]:
        """The silos that can show no certificate that counts because theirs was revoked, each with the reason."""

    def renew(self, who: Identity, request: bytes) -> tuple[bytes, bytes]:
        """A new certificate for somebody who showed a valid one, with its chain, and the roots to trust, as PEM.

        Raises IdentityError where the request is not one for this identity, or none can be made.
        """


class FixedTrust:
    """Credentials that stay as they are. Nothing is revoked, and renewing is somebody else's business."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def credentials(self) -> Credentials:
        return self._credentials

    def refusal(self, serial: int) -> str:
        return ""

    def barred(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        """Nothing is held."""

    def renew(self, who: Identity, request: bytes) -> tuple[bytes, bytes]:
        raise IdentityError("this coordinator makes no certificates", hint="ask its operator for a new set of files")


class FileTrust(FixedTrust):
    """Credentials in files, read anew where somebody replaced them: the next connection shows the new ones."""

    def __init__(self, certificate: Path, load: Callable[[], Credentials]) -> None:
        """`certificate` is the file that is replaced last. Raises as `load`."""
        super().__init__(load())
        self._certificate = certificate
        self._load = load
        self._seen = stamp_of(certificate)

    def credentials(self) -> Credentials:
        stamp = stamp_of(self._certificate)
        if stamp != self._seen:
            # Files that do not fit yet are looked at again; until they do, the old ones are shown.
            with contextlib.suppress(GptflError):
                self._credentials = self._load()
                self._seen = stamp
        return self._credentials


class KeptTrust:
    """Trust by an authority that is kept."""

    def __init__(
        self, vault: Vault, valid: timedelta, registry: Registry, hosts: tuple[str, ...], note: Callable[..., None]
    ) -> None:
        """`valid` is how long certificates hold, `hosts` are the names and addresses under which silos dial.

        `note` is called with an event and its fields where a certificate is made. Raises IdentityError.
        """
        self._vault = vault
        self._valid = valid
        self._authority = vault.open(valid)
        self._opened = vault.stamp
        self._registry = registry
        self._note = note
        self._hosts = hosts
        self._lock = threading.Lock()
        self._own = self._authority.issue_coordinator(hosts)
        registry.is_open()  # brings the file up to date, where an earlier release made it
        self._seen = sqlite3.connect(f"{registry.path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
        self._version = -1
        self._looked = 0.0
        self._standing: dict[str, str | None] = {}  # of each certificate when it was revoked
        self._barred: dict[str, str] = {}

    def credentials(self) -> Credentials:
        authority = self.authority()
        with self._lock:
            stale = not self._own.certificate.endswith(authority.chain) or self._own.authority != authority.roots
            if stale or due(self._own.certificate) <= datetime.now(UTC):
                # An issuing certificate that is about to end signs no more: the present one is shown to its own end.
                with contextlib.suppress(IdentityError):
                    self._own = authority.issue_coordinator(self._hosts)
            return self._own

    def authority(self) -> Authority:
        """The authority as it is now: its root may be replaced while a coordinator is at work."""
        with self._lock:
            stamp = self._vault.stamp
            if stamp != self._opened:
                self._authority, self._opened = self._vault.open(self._valid), stamp
            return self._authority

    def refusal(self, serial: int) -> str:
        name = serial_text(serial)
        self._look(at_once=name not in self._standing)
        if name not in self._standing:
            return f"the certificate {name} is not in the authority's registry"
        revoked = self._standing[name]
        return f"the certificate {name} was revoked at {revoked}" if revoked else ""

    def barred(self) -> dict[str, str]:
        self._look()
        return self._barred

    def renew(self, who: Identity, request: bytes) -> tuple[bytes, bytes]:
        return certify(self.authority(), self._registry, who, request, self._note, "certificate renewed")

    def close(self) -> None:
        self._seen.close()

    def _look(self, *, at_once: bool = False) -> None:
        if not at_once and time.monotonic() - self._looked < _LOOK_EVERY:
            return
        self._looked = time.monotonic()
        try:
            (version,) = self._seen.execute("PRAGMA data_version").fetchone()
            if version != self._version:
                rows = self._seen.execute("SELECT role, name, serial, revoked, reason FROM certificates ORDER BY rowid")
                latest = {}
                for role, name, serial, revoked, reason in rows.fetchall():
                    self._standing[serial] = revoked
                    if role == "silo":
                        why = revoked and f"its certificate was revoked at {revoked}{reason and f' ({reason})'}"
                        latest[name] = why
                self._barred = {silo: why for silo, why in latest.items() if why}
                self._version = version
        except sqlite3.Error as error:
            raise StorageError(f"{self._registry.path}: {error}") from None


def certify(
    authority: Authority, registry: Registry, who: Identity, request: bytes, note: Callable[..., None], event: str
) -> tuple[bytes, bytes]:
    """Makes the certificate that somebody requests, and returns it with its chain, and the roots, as PEM.

    It stands in the registry, and is noted as this event, before it is handed out. Raises IdentityError where the
    request is for anything else.
    """
    key = requested_key(authority.federation, who, request)
    assert who.role != "coordinator"
    chain = authority.sign(who.role, who.name, key)
    made = x509.load_pem_x509_certificate(chain)
    fingerprint, expires = fingerprint_of(key), made.not_valid_after_utc
    registry.add(serial=made.serial_number, who=who, expires=expires, key=fingerprint, issuer=authority.issuer)
    fields = {who.role: who.name, "serial": serial_text(made.serial_number), "key": fingerprint}
    note(event, **fields, until=expires.isoformat())
    return chain, authority.roots


def requested_key(federation: str, who: Identity, request: bytes) -> ec.EllipticCurvePublicKey:
    """The key for which somebody of this federation requests a certificate. Raises IdentityError."""
    if who.role == "coordinator" or who.federation != federation:
        raise IdentityError(f"nobody is given a certificate of {who.uri} here")
    return key_in(request, who)


def due(certificate: bytes) -> datetime:
    """When a certificate of ours, PEM, is to be renewed: two thirds of the way from when it was made to its end."""
    read = x509.load_pem_x509_certificate(certificate)
    made = read.not_valid_before_utc + SKEW
    return made + RENEW_AT * (read.not_valid_after_utc - made)

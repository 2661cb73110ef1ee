"""The authority of one federation: ECDSA P-256, short-lived certificates, one URI in each.

A root, which all sides trust, signs an issuing certificate; the issuing key signs those of the coordinator and of all
who dial it. So the root's key is needed only to replace the issuing one, and may lie elsewhere in the meantime. A side
shows its own certificate with the issuing one behind it.

`gptfl run` makes an authority for the run and forgets its keys, `gptfl credentials` makes one and hands out a folder a
side, `gptfl authority` keeps one in a folder (`security/vault.py`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gptfl_dist.errors import IdentityError
from gptfl_dist.files import write_file
from gptfl_dist.security.identity import Identity, Invited

SKEW = timedelta(minutes=5)
"""How far the clocks of two institutions may differ: certificates hold from so long ago."""

_ROOT_VALID = timedelta(days=3650)
_ISSUING_VALID = timedelta(days=730)
_LEAST_LEFT = timedelta(minutes=1)  # of the issuing certificate's life: what it signed would be renewed without end


@dataclass(frozen=True)
class Credentials:
    """What one side needs for mutual TLS, as PEM: the roots it trusts, its certificate with its chain, its key."""

    authority: bytes
    certificate: bytes
    key: bytes

    def save(self, folder: Path) -> None:
        """Writes authority.pem, certificate.pem and key.pem, each 0600 in a folder of 0700."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, content in (("authority", self.authority), ("certificate", self.certificate), ("key", self.key)):
            write_file(folder / f"{name}.pem", content)


class Authority:
    """Signs certificates for one federation."""

    def __init__(
        self, federation: str, *, roots: bytes, chain: bytes, key: ec.EllipticCurvePrivateKey, valid: timedelta
    ) -> None:
        """`roots` is what all sides trust, `chain` the issuing certificate and any between it and a root, as PEM;
        `key` is the issuing one. Certificates hold for `valid`.
        """
        self.federation = federation
        self.roots = roots
        self.chain = chain
        self._issuing = x509.load_pem_x509_certificate(chain)
        self._key = key
        self._valid = valid

    @classmethod
    def new(cls, federation: str, *, valid: timedelta) -> Self:
        """One whose keys live in this object only."""
        root_key, key = new_key(), new_key()
        root = make_root(federation, root_key)
        chain = make_issuing(federation, key.public_key(), root, root_key)
        return cls(federation, roots=root, chain=chain, key=key, valid=valid)

    @property
    def own(self) -> Credentials:
        """The issuing certificate itself, with its key: for statements that only the authority may sign."""
        return self._with_key(self.chain, self._key)

    @property
    def issuer(self) -> int:
        """The serial number of the issuing certificate."""
        return self._issuing.serial_number

    def issue_coordinator(self, hosts: Iterable[str]) -> Credentials:
        """Credentials of the coordinator, reachable under these host names and addresses. It can serve only.

        Raises IdentityError, as all that signs here, where the issuing certificate is about to end.
        """
        names: list[x509.GeneralName] = []
        for host in hosts:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        key = new_key()
        identity = Identity(self.federation, "coordinator", "coordinator")
        return self._with_key(self._sign(key.public_key(), identity, names, ExtendedKeyUsageOID.SERVER_AUTH), key)

    def issue_silo(self, name: str) -> Credentials:
        """Credentials of a silo, its key included."""
        return self.issue("silo", name)

    def issue(self, role: Invited, name: str) -> Credentials:
        """Credentials of somebody who dials, the key included. They can dial only."""
        key = new_key()
        return self._with_key(self.sign(role, name, key.public_key()), key)

    def sign(self, role: Invited, name: str, public_key: ec.EllipticCurvePublicKey) -> bytes:
        """The certificate of somebody who dials for a key of their own, with its chain, PEM."""
        return self._sign(public_key, Identity(self.federation, role, name), [], ExtendedKeyUsageOID.CLIENT_AUTH)

    def _sign(
        self,
        public_key: ec.EllipticCurvePublicKey,
        identity: Identity,
        names: list[x509.GeneralName],
        usage: x509.ObjectIdentifier,
    ) -> bytes:
        left = self._issuing.not_valid_after_utc - datetime.now(UTC)
        if left < _LEAST_LEFT:
            raise IdentityError(
                f"the issuing certificate ends at {self._issuing.not_valid_after_utc:%F %T} UTC, and signs no more",
                hint="replace it with gptfl authority rotate",
            )
        subject, valid = _common_name(identity.name), min(self._valid, left)  # none outlives who signed it
        certificate = (
            _builder(subject, self._issuing.subject, public_key, valid)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(sign=True, certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri), *names]), critical=False
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM) + self.chain

    def _with_key(self, certificate: bytes, key: ec.EllipticCurvePrivateKey) -> Credentials:
        return Credentials(self.roots, certificate, key_bytes(key))


def new_key() -> ec.EllipticCurvePrivateKey:
    """A private key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_root(federation: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A root certificate for its own key, PEM."""
    name = _common_name(f"gptfl {federation} root")
    certificate = _authority_builder(name, name, key.public_key(), _ROOT_VALID, below=2).sign(key, hashes.SHA256())
    return certificate.public_bytes(serialization.Encoding.PEM)


def make_issuing(
    federation: str, public_key: ec.EllipticCurvePublicKey, root: bytes, root_key: ec.EllipticCurvePrivateKey
) -> bytes:
    """An issuing certificate below a root, PEM."""
    issuer = x509.load_pem_x509_certificate(root)
    builder = _authority_builder(
        _common_name(f"gptfl {federation} issuing"), issuer.subject, public_key, _ISSUING_VALID, below=0
    ).add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
    return builder.sign(root_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def cross_signed(root: bytes, old: x509.Certificate, old_key: ec.EllipticCurvePrivateKey) -> bytes:
    """The certificate of a root for those who know only the one before it, PEM."""
    read = x509.load_pem_x509_certificate(root)
    public_key = read.public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    builder = _authority_builder(read.subject, old.subject, public_key, _ISSUING_VALID, below=1).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(old_key.public_key()), critical=False
    )
    return builder.sign(old_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _authority_builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, valid: timedelta, *, below: int
) -> x509.CertificateBuilder:
    """Of a certificate that may sign others, with `below` more of its kind beneath it."""
    return (
        _builder(subject, issuer, public_key, valid)
        .add_extension(x509.BasicConstraints(ca=True, path_length=below), critical=True)
        .add_extension(_key_usage(sign=False, certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, valid: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + valid)
    )


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _key_usage(*, sign: bool, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=sign, key_cert_sign=certificates, crl_sign=certificates, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip

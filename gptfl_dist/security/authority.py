"""A certificate authority for one federation: ECDSA P-256, short-lived, one URI a certificate.

`gptfl run` makes one for the run and forgets its key; `gptfl credentials` makes one and hands out a folder a side.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gptfl_dist.files import write_file
from gptfl_dist.security.identity import Identity

_SKEW = timedelta(minutes=5)  # clocks of two institutions differ


@dataclass(frozen=True)
class Credentials:
    """What one side needs for mutual TLS, as PEM: the authority it trusts, its certificate, its private key."""

    authority: bytes
    certificate: bytes
    key: bytes

    def save(self, folder: Path) -> None:
        """Writes authority.pem, certificate.pem and key.pem, each 0600 in a folder of 0700."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, content in (("authority", self.authority), ("certificate", self.certificate), ("key", self.key)):
            write_file(folder / f"{name}.pem", content)


class Authority:
    """Signs certificates for one federation. The key lives in this object only."""

    def __init__(self, federation: str, *, valid: timedelta) -> None:
        self.federation = federation
        self._valid = valid
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"gptfl {federation} authority"[:64])])
        key_usage = _key_usage(sign=False, certificates=True)
        builder = self._builder(name, name, self._key.public_key())
        self._certificate = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(key_usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def certificate(self) -> bytes:
        """The authority's own certificate, PEM."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue_coordinator(self, hosts: Iterable[str]) -> Credentials:
        """Credentials of the coordinator, reachable under these host names and addresses. It can serve only."""
        names: list[x509.GeneralName] = []
        for host in hosts:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        identity = Identity(self.federation, "coordinator", "coordinator")
        return self._issue(identity, names, ExtendedKeyUsageOID.SERVER_AUTH)

    def issue_silo(self, name: str) -> Credentials:
        """Credentials of a silo. They can dial only."""
        return self._issue(Identity(self.federation, "silo", name), [], ExtendedKeyUsageOID.CLIENT_AUTH)

    def _issue(self, identity: Identity, names: list[x509.GeneralName], usage: x509.ObjectIdentifier) -> Credentials:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name[:64])])
        certificate = (
            self._builder(subject, self._certificate.subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(sign=True, certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri), *names]), critical=False
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Credentials(
            authority=self.certificate,
            certificate=certificate.public_bytes(serialization.Encoding.PEM),
            key=key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )

    def _builder(
        self, subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + self._valid)
        )


def _key_usage(*, sign: bool, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=sign, key_cert_sign=certificates, crl_sign=certificates, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip

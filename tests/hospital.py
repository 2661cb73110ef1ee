"""An authority of an institution's own, which stands above a federation's."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from gptfl_dist.security.authority import make_root, new_key

DAY = timedelta(days=1)


class Hospital:
    """It has a root of its own."""

    def __init__(self) -> None:
        self.key = new_key()
        self.root = x509.load_pem_x509_certificate(make_root("hospital", self.key))

    def sign(self, request: bytes, *, ca: bool | None = True, valid: timedelta = DAY, age: timedelta = DAY) -> bytes:
        """The certificate for a request, made `age` ago; `ca` is None where it forgets to say what may sign."""
        asked = x509.load_pem_x509_csr(request)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(asked.subject)
            .issuer_name(self.root.subject)
            .public_key(asked.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - age)
            .not_valid_after(datetime.now(UTC) + valid)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if ca is not None:
            constraints = x509.BasicConstraints(ca=ca, path_length=0 if ca else None)
            certificate = certificate.add_extension(constraints, critical=True)
        return pem(certificate.sign(self.key, hashes.SHA256()))


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)

"""An authority that is kept: a folder with its certificates and keys, 0600 in 0700.

    roots.pem       what all sides trust: the root, and while it is replaced the one before it
    root.key        signs issuing certificates alone; it may lie elsewhere in the meantime
    issuing.pem     the issuing certificate, and what stands between it and a root
    issuing.key     signs the certificates of coordinator and silos
    registry.sqlite invitations, certificates, revocations (`security/registry.py`)

A new root is signed by the old one as well, so sides that know only the old root trust what is below the new one until
they have heard of it, which they do with their next certificate.

An institution's own authority can take the place of the root: `request_issuing` leaves a request for it to sign, and
`install_issuing` takes what it answered.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gptfl_dist.errors import IdentityError, StorageError
from gptfl_dist.files import storage_error, write_file
from gptfl_dist.security.authority import Authority, cross_signed, key_bytes, make_issuing, make_root, new_key
from gptfl_dist.security.credentials import certificates_in, leads_to

_ROOTS, _ROOT_KEY, _CHAIN, _KEY, _REQUEST = "roots.pem", "root.key", "issuing.pem", "issuing.key", "issuing.csr"


class Vault:
    """The folder of one federation's authority."""

    def __init__(self, folder: Path, federation: str) -> None:
        self.folder = folder
        self._federation = federation

    @property
    def exists(self) -> bool:
        return (self.folder / _CHAIN).exists()

    @property
    def has_root_key(self) -> bool:
        return (self.folder / _ROOT_KEY).exists()

    def create(self) -> None:
        """Makes a root and an issuing certificate. Raises StorageError where there is an authority already."""
        self._prepare()
        root_key, key = new_key(), new_key()
        root = make_root(self._federation, root_key)
        self._write(_ROOT_KEY, key_bytes(root_key))
        self._write(_KEY, key_bytes(key))
        self._write(_ROOTS, root)
        self._write(_CHAIN, make_issuing(self._federation, key.public_key(), root, root_key))

    def request_issuing(self) -> Path:
        """Makes an issuing key, and the request for its certificate that another authority is to sign.

        Raises StorageError where there is an authority already.
        """
        self._prepare()
        key = new_key()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"gptfl {self._federation} issuing"[:64])])
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        self._write(_KEY, key_bytes(key))
        self._write(_REQUEST, request.public_bytes(serialization.Encoding.PEM))
        return self.folder / _REQUEST

    def install_issuing(self, chain: Path, roots: Path) -> None:
        """Takes the certificate that another authority made for `request_issuing`. Raises IdentityError."""
        read, trusted = certificates_in(chain), certificates_in(roots)
        if read[0].public_key() != self._key(_KEY).public_key():
            raise IdentityError(
                f"{chain} is no certificate for {self.folder / _KEY}", hint=f"have {self.folder / _REQUEST} signed"
            )
        constraints = read[0].extensions.get_extension_for_class(x509.BasicConstraints).value
        if not constraints.ca:
            raise IdentityError(f"{chain} may not sign certificates", hint="it must be one of an authority (CA:TRUE)")
        if not any(leads_to(read, root) for root in trusted):
            raise IdentityError(f"{chain} was not issued by {roots}", hint="add what stands between them to the chain")
        self._write(_ROOTS, roots.read_bytes())
        self._write(_CHAIN, chain.read_bytes())

    def open(self, valid: timedelta) -> Authority:
        """The authority, whose certificates hold for `valid`. Raises IdentityError where it is not there or damaged."""
        if not self.exists:
            raise IdentityError(f"{self.folder}: there is no authority", hint="make it with gptfl authority init")
        chain = certificates_in(self.folder / _CHAIN)
        if chain[0].not_valid_after_utc < datetime.now(UTC):
            raise IdentityError(
                f"{self.folder / _CHAIN} expired on {chain[0].not_valid_after_utc:%F}",
                hint="replace it with gptfl authority rotate",
            )
        roots, issuing = ((self.folder / name).read_bytes() for name in (_ROOTS, _CHAIN))
        return Authority(self._federation, roots=roots, chain=issuing, key=self._key(_KEY), valid=valid)

    def roots(self) -> list[x509.Certificate]:
        """What all sides trust, the present root first. Raises IdentityError."""
        return certificates_in(self.folder / _ROOTS)

    def issuing(self) -> x509.Certificate:
        """Raises IdentityError."""
        return certificates_in(self.folder / _CHAIN)[0]

    def rotate(self) -> None:
        """Puts a new root and a new issuing certificate in the place of the old. Raises IdentityError, StorageError."""
        old = self.roots()[0]
        old_key = self._key(_ROOT_KEY)
        if old.public_key() != old_key.public_key():
            raise IdentityError(f"{self.folder / _ROOT_KEY} is not the key of the root in {self.folder / _ROOTS}")
        root_key, key = new_key(), new_key()
        root = make_root(self._federation, root_key)
        issuing = make_issuing(self._federation, key.public_key(), root, root_key)
        chain = issuing + cross_signed(root, old, old_key)
        # In this order: a crash between two of them leaves an authority whose parts fit, or is told by `open`.
        self._write(_ROOTS, root + old.public_bytes(serialization.Encoding.PEM))
        self._write(_KEY, key_bytes(key))
        self._write(_CHAIN, chain)
        self._write(_ROOT_KEY, key_bytes(root_key))

    def drop_old_root(self) -> None:
        """Ends the overlap: only the present root is trusted from now on. Raises IdentityError, StorageError."""
        root, issuing = (each[0].public_bytes(serialization.Encoding.PEM) for each in (self.roots(), [self.issuing()]))
        self._write(_CHAIN, issuing)
        self._write(_ROOTS, root)

    def _prepare(self) -> None:
        if self.exists or (self.folder / _KEY).exists():
            raise StorageError(
                f"{self.folder}: there is an authority already",
                hint="go on with it, replace its root with gptfl authority rotate, or name another folder",
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise storage_error(error, self.folder) from None

    def _key(self, name: str) -> ec.EllipticCurvePrivateKey:
        path = self.folder / name
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            raise IdentityError(f"{path}: {error.strerror}", hint="bring it back from where it is kept") from None
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise IdentityError(f"{path}: not an unencrypted PEM private key") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise IdentityError(f"{path}: not an ECDSA key")
        return key

    def _write(self, name: str, content: bytes) -> None:
        write_file(self.folder / name, content)

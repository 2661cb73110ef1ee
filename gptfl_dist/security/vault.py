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
from gptfl_dist.files import stamp_of, storage_error, write_file
from gptfl_dist.security.authority import (
    Authority,
    Credentials,
    cross_signed,
    key_bytes,
    make_issuing,
    make_root,
    new_key,
)
from gptfl_dist.security.credentials import (
    certificates_in,
    completed_key,
    finish_replacing,
    leads_to,
    next_of,
    replace_credentials,
    require_private,
)

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

    @property
    def stamp(self) -> object:
        """Changes where the issuing certificate is replaced, which is written last."""
        return stamp_of(self.folder / _CHAIN)

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
        try:
            signs = read[0].extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except (x509.ExtensionNotFound, ValueError):
            signs = False
        if not signs:
            raise IdentityError(
                f"{chain} may not sign certificates",
                hint="sign the request with its extensions (CA:TRUE); openssl x509 needs -copy_extensions copyall",
            )
        if not any(leads_to(read, root) for root in trusted):
            raise IdentityError(f"{chain} was not issued by {roots}", hint="add what stands between them to the chain")
        self._write(_ROOTS, roots.read_bytes())
        self._write(_CHAIN, chain.read_bytes())

    def open(self, valid: timedelta) -> Authority:
        """The authority, whose certificates hold for `valid`. Raises IdentityError where it is not there or damaged."""
        self._require()
        chain = certificates_in(self.folder / _CHAIN)
        if chain[0].not_valid_after_utc < datetime.now(UTC):
            raise IdentityError(
                f"{self.folder / _CHAIN} expired on {chain[0].not_valid_after_utc:%F}",
                hint="replace it with gptfl authority rotate",
            )
        roots, issuing = ((self.folder / name).read_bytes() for name in (_ROOTS, _CHAIN))
        return Authority(self._federation, roots=roots, chain=issuing, key=self._key(_KEY, chain[0]), valid=valid)

    def roots(self) -> list[x509.Certificate]:
        """What all sides trust, the present root first. Raises IdentityError."""
        self._require()
        return certificates_in(self.folder / _ROOTS)

    def issuing(self) -> x509.Certificate:
        """Raises IdentityError."""
        self._require()
        return certificates_in(self.folder / _CHAIN)[0]

    def rotate(self) -> None:
        """Puts a new root and a new issuing certificate in the place of the old. Raises IdentityError, StorageError."""
        roots, chain = self.roots(), certificates_in(self.folder / _CHAIN)
        old = next((root for root in roots if leads_to(chain, root)), roots[0])
        if old is roots[0] and len(roots) > 1:
            raise IdentityError(
                f"{self.folder}: the root was replaced before, and the one before it is still trusted",
                hint="first end that with gptfl authority rotate --finish",
            )
        old_key = self._key(_ROOT_KEY, old)
        root_key, key = new_key(), new_key()
        root = make_root(self._federation, root_key)
        issuing = make_issuing(self._federation, key.public_key(), root, root_key)
        both = root + old.public_bytes(serialization.Encoding.PEM)
        self._write(next_of(self.folder / _ROOT_KEY).name, key_bytes(root_key))
        new = Credentials(both, issuing + cross_signed(root, old, old_key), key_bytes(key))
        replace_credentials(new, *(self.folder / name for name in (_ROOTS, _CHAIN, _KEY)))
        finish_replacing(self.folder / _ROOT_KEY)

    def drop_old_root(self) -> None:
        """Ends the overlap: only the present root is trusted from now on. Raises IdentityError, StorageError."""
        if len(self.roots()) == 1 or not leads_to([self.issuing()], self.roots()[0]):
            raise IdentityError(
                f"{self.folder}: no root was replaced, or a crash cut that short", hint="gptfl authority rotate does it"
            )
        root, issuing = (each.public_bytes(serialization.Encoding.PEM) for each in (self.roots()[0], self.issuing()))
        self._write(_ROOTS, root)
        self._write(_CHAIN, issuing)

    def _require(self) -> None:
        if self.exists:
            return
        if (self.folder / _REQUEST).exists():
            raise IdentityError(
                f"{self.folder}: the authority waits for its certificate",
                hint=f"have {self.folder / _REQUEST} signed, then: gptfl authority install",
            )
        raise IdentityError(
            f"{self.folder}: there is no authority",
            hint="make it with gptfl authority init, or bring it back from a backup",
        )

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

    def _key(self, name: str, certificate: x509.Certificate | None = None) -> ec.EllipticCurvePrivateKey:
        """A key of the folder, which must be that of `certificate` where one is given. Raises IdentityError."""
        path = self.folder / name
        try:
            require_private(path)
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
            if certificate is not None and key.public_key() != certificate.public_key():
                key = serialization.load_pem_private_key(completed_key(path, certificate.public_key()), password=None)
        except OSError as error:
            raise IdentityError(f"{path}: {error.strerror}", hint="bring it back from where it is kept") from None
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise IdentityError(f"{path}: not the private key that belongs to the certificate beside it") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise IdentityError(f"{path}: not an ECDSA key")
        return key

    def _write(self, name: str, content: bytes) -> None:
        write_file(self.folder / name, content)

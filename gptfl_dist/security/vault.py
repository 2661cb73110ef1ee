"""An authority that is kept: a folder with its certificates and keys, 0600 in 0700.

    roots.pem       what all sides trust: the root, and while it is replaced the one before it
    root.key        signs issuing certificates alone; it may lie elsewhere in the meantime
    issuing.pem     the issuing certificate, and what stands between it and a root
    issuing.key     signs the certificates of coordinator and silos
    issuing.csr     the request for the issuing certificate, where another authority signs it
    registry.sqlite invitations, certificates, revocations (`security/registry.py`)

A new root is signed by the old one as well, so sides that know only the old root trust what is below the new one until
they have heard of it, which they do with their next certificate.

An institution's own authority can take the place of the root: `request_issuing` leaves a request for it to sign, and
`install_issuing` takes what it answered. So it goes with the next issuing certificate too, whose key waits beside the
present one until then.
"""

from __future__ import annotations

from datetime import timedelta
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
from gptfl_dist.security.clocks import require_current
from gptfl_dist.security.credentials import (
    certificates_in,
    completed_key,
    finish_replacing,
    leads_to,
    next_of,
    replace_credentials,
    require_private,
)
from gptfl_dist.security.expiry import authority_ending

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
    def is_external(self) -> bool:
        """Whether an authority of somebody else's stands above the issuing certificate."""
        return (self.folder / _REQUEST).exists()

    @property
    def request(self) -> Path | None:
        """The request that waits for its certificate, where there is one."""
        if self.is_external and (not self.exists or next_of(self.folder / _KEY).exists()):
            return self.folder / _REQUEST
        return None

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
        self._write(_KEY, key_bytes(key))
        return self._request(key)

    def request_next(self) -> Path:
        """As `request_issuing`, beside the issuing certificate in use. A request that waits already is kept.

        Raises IdentityError, StorageError.
        """
        self._require()
        waiting = next_of(self.folder / _KEY)
        if not waiting.exists():
            self._write(waiting.name, key_bytes(new_key()))
        return self._request(self._key(waiting.name))

    def install_issuing(self, chain: Path, roots: Path) -> None:
        """Takes the certificate that another authority made for `request_issuing` or `request_next`.

        What was trusted before stays so, behind the new roots, until `drop_old_root`. Raises IdentityError where the
        certificate is not what was asked for, or silos that know only the roots of today would not take it.
        """
        read, trusted = certificates_in(chain), certificates_in(roots)
        names = [name for name in (_KEY, next_of(self.folder / _KEY).name) if (self.folder / name).exists()]
        key = next((key for key in map(self._key, names or [_KEY]) if key.public_key() == read[0].public_key()), None)
        if key is None:
            raise IdentityError(
                f"{chain} is no certificate for {' or '.join(str(self.folder / name) for name in names)}",
                hint=f"have {self.folder / _REQUEST} signed",
            )
        if self.request is not None and self.exists and key.public_key() != self._key(names[-1]).public_key():
            raise IdentityError(
                f"{chain} is for the issuing key in use, and {self.request} asks for a certificate of the next one",
                hint=f"have {self.request} signed and install what comes of it; the present one is used until then",
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
        for certificate in read:
            require_current(certificate, str(chain))
        old = self.roots() if self.exists else []
        if old and not any(leads_to(read, root) for root in old):
            raise IdentityError(
                f"{chain} leads to none of the roots that silos trust today ({self.folder / _ROOTS})",
                hint="add to the chain the new root's certificate that the old root signed, else all silos are cut off",
            )
        kept = b"".join(_pem(root) for root in [*trusted, *(root for root in old if root not in trusted)])
        new = Credentials(kept, chain.read_bytes(), key_bytes(key))
        replace_credentials(new, *(self.folder / name for name in (_ROOTS, _CHAIN, _KEY)))

    def open(self, valid: timedelta) -> Authority:
        """The authority, whose certificates hold for `valid`. Raises IdentityError where it is not there or damaged."""
        self._require()
        chain = certificates_in(self.folder / _CHAIN)
        require_current(chain[0], str(self.folder / _CHAIN), hint="replace it with gptfl authority rotate")
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

    def warnings(self) -> list[str]:
        """Which of its certificates end soon. Raises IdentityError."""
        self._require()
        chain, roots = (certificates_in(self.folder / name) for name in (_CHAIN, _ROOTS))
        return authority_ending(chain, roots)

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
        both = root + _pem(old)
        self._write(next_of(self.folder / _ROOT_KEY).name, key_bytes(root_key))
        new = Credentials(both, issuing + cross_signed(root, old, old_key), key_bytes(key))
        replace_credentials(new, *(self.folder / name for name in (_ROOTS, _CHAIN, _KEY)))
        finish_replacing(self.folder / _ROOT_KEY)

    def drop_old_root(self) -> None:
        """Ends the overlap: only the present root is trusted from now on. Raises IdentityError, StorageError."""
        roots, chain = self.roots(), certificates_in(self.folder / _CHAIN)
        if len(roots) == 1 or not leads_to(chain, roots[0]):
            raise IdentityError(
                f"{self.folder}: no root was replaced, or a crash cut that short", hint="gptfl authority rotate does it"
            )
        # Behind what the root signed itself stand its bridges to older ones.
        needed = next(number for number in range(1, len(chain) + 1) if leads_to(chain[:number], roots[0]))
        self._write(_ROOTS, _pem(roots[0]))
        self._write(_CHAIN, b"".join(map(_pem, chain[:needed])))

    def _request(self, key: ec.EllipticCurvePrivateKey) -> Path:
        """Writes the request for the issuing certificate of a key."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"gptfl {self._federation} issuing"[:64])])
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        self._write(_REQUEST, request.public_bytes(serialization.Encoding.PEM))
        return self.folder / _REQUEST

    def _require(self) -> None:
        if self.exists:
            return
        if self.is_external:
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


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)

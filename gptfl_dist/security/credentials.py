"""Reads the three PEM files of one side and says what is wrong with them before a handshake fails without a word."""

from __future__ import annotations

import os
import ssl
import stat
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from gptfl_dist.errors import IdentityError, ProtocolError
from gptfl_dist.files import storage_error, write_file
from gptfl_dist.security.authority import Credentials, key_bytes
from gptfl_dist.security.clocks import require_current
from gptfl_dist.security.identity import Identity

_UNREADABLE = (ValueError, x509.InvalidVersion)
_HINT = "an invited silo gets its files by `gptfl join`; `gptfl credentials` makes a set for every side"

ONE_AUTHORITY = "each side needs files of one authority: by `gptfl join`, or by one call of `gptfl credentials`"
"""What to do where one side refuses the other's certificate."""


def load_credentials(
    authority: Path, certificate: Path, key: Path, *, section: str | None = None
) -> tuple[Credentials, Identity]:
    """The credentials in these files and the identity in the certificate.

    `section` is that of the federation or silo file which names them, None where they were found another way.

    Raises IdentityError where a file is missing, unreadable or open to others, where key and certificate do not
    belong together, where no root of the authority signed the certificate, through those that stand behind it in its
    file, or where one of them is not valid now.
    """
    named = {"authority": authority, "certificate": certificate, "key": key}
    pem = {path: _read(path, f"{section}.{name}: " if section else "") for name, path in named.items()}
    require_private(key)
    chain, roots = certificates_in(certificate), certificates_in(authority)
    try:
        private = serialization.load_pem_private_key(pem[key], password=None)
        own_key = chain[0].public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise IdentityError(f"{key}: not an unencrypted PEM private key", hint=_HINT) from None
    if private.public_key() != own_key:
        pem[key] = completed_key(key, own_key)
    if not pem[key]:
        raise IdentityError(f"{key} is not the key of {certificate}", hint="name the pair that was issued together")
    root = next((root for root in roots if leads_to(chain, root)), None)
    if root is None:
        raise IdentityError(
            f"{certificate} was not issued by {authority}", hint="ask the coordinator's operator for a matching set"
        )
    identity = require_own_current(pem[certificate], str(certificate))
    for each, path in (*((each, certificate) for each in chain[1:]), (root, authority)):
        require_current(each, str(path), hint="have the coordinator's operator replace it: gptfl authority rotate")
    return Credentials(pem[authority], pem[certificate], pem[key]), identity


def require_own_current(certificate: bytes, name: str) -> Identity:
    """The identity in this side's own PEM certificate. Raises IdentityError where it does not hold now."""
    identity = identity_in(certificate, name)
    require_current(x509.load_pem_x509_certificate(certificate), name, hint=how_to_replace(identity))
    return identity


def how_to_replace(identity: Identity) -> str:
    """What is to be done where somebody's certificate is over, for it renews itself only while it holds."""
    if identity.role == "coordinator":
        return "make new sets: gptfl credentials FEDERATION_FILE --host NAME"
    role = "" if identity.role == "silo" else f" --role {identity.role}"
    return (
        f"be invited anew: at the coordinator gptfl invite FEDERATION_FILE {identity.name}{role}; here move the folder "
        "of the old credentials away, then gptfl join LINE (a set of gptfl credentials is made and brought anew)"
    )


def credentials_for(key: ec.EllipticCurvePrivateKey, certificate: bytes, authority: bytes) -> Credentials:
    """Those that a coordinator made for a key of this side's. Raises ProtocolError, IdentityError."""
    try:
        made = x509.load_pem_x509_certificate(certificate)
        x509.load_pem_x509_certificates(authority)
    except ValueError:
        raise ProtocolError("the coordinator sent what is no certificate") from None
    if made.public_key() != key.public_key():
        raise IdentityError("the coordinator made a certificate for another key")
    return Credentials(authority, certificate, key_bytes(key))


def replace_credentials(credentials: Credentials, authority: Path, certificate: Path, key: Path) -> None:
    """Writes new credentials over the old ones. After a crash at any point `load_credentials` finds a pair that fits.

    Raises StorageError.
    """
    write_file(authority, credentials.authority)
    write_file(next_of(key), credentials.key)
    write_file(certificate, credentials.certificate)
    finish_replacing(key)


def finish_replacing(key: Path) -> None:
    """Puts the next key into its place, unless somebody who met the two has done so. Raises StorageError."""
    try:
        next_of(key).replace(key)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise storage_error(error, key) from None


def completed_key(key: Path, wanted: PublicKeyTypes) -> bytes:
    """The key that a crash kept from taking the place of the one before it, where it is the one that is wanted."""
    try:
        content = next_of(key).read_bytes()
        if serialization.load_pem_private_key(content, password=None).public_key() != wanted:
            return b""
        finish_replacing(key)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        return b""
    return content


def next_of(key: Path) -> Path:
    """Where a key lies until its certificate is in place."""
    return key.with_name(key.name + ".next")


def require_private(key: Path) -> None:
    """Raises IdentityError where others than the owner may read the file of a private key."""
    mode = stat.S_IMODE(key.stat().st_mode)
    if mode & 0o077:
        raise IdentityError(f"{key}: others may read this private key (mode {mode:04o})", hint=f"chmod 600 {key}")


def identity_in(certificate: bytes, name: str) -> Identity:
    """The identity in a PEM certificate; `name` is what the message of an IdentityError calls it."""
    try:
        extensions = x509.load_pem_x509_certificate(certificate).extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, *_UNREADABLE):
        uris = []
    if len(uris) != 1:
        raise IdentityError(f"{name}: carries {len(uris)} URIs, expected exactly one", hint=_HINT)
    return Identity.from_uri(uris[0])


def tls_context(credentials: Credentials, *, server: bool) -> ssl.SSLContext:
    """TLS 1.3 alone, both sides with certificates of the authority. Who exactly the peer is, its user checks."""
    context = serving_context(credentials) if server else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=credentials.authority.decode())
    if not server:
        _show(context, credentials)
    return context


def serving_context(credentials: Credentials) -> ssl.SSLContext:
    """TLS 1.3 alone for a server that asks its clients for no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # no session is resumed
    _show(context, credentials)
    return context


def _show(context: ssl.SSLContext, credentials: Credentials) -> None:
    """Has a context show a certificate."""
    # ssl takes a key from a file alone: here one in memory, so that no copy of the key comes onto a disk.
    with os.fdopen(os.memfd_create("credentials"), "wb") as file:
        file.write(credentials.certificate + credentials.key)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")


def certificates_in(path: Path) -> list[x509.Certificate]:
    """The certificates in a PEM file, at least one. Raises IdentityError."""
    try:
        return x509.load_pem_x509_certificates(_read(path, ""))
    except _UNREADABLE:
        raise IdentityError(f"{path}: not a PEM certificate", hint=_HINT) from None


def leads_to(chain: list[x509.Certificate], root: x509.Certificate) -> bool:
    """Whether the root signed the first certificate of a chain, or one behind it that each before it was signed by."""
    for certificate, issuer in pairwise([*chain, root]):
        if _signed(certificate, root):
            return True
        if not _signed(certificate, issuer):
            return False
    return False


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
        return False
    return True


def _read(path: Path, setting: str) -> bytes:
    try:
        if path.stat().st_size > 1 << 20:
            raise IdentityError(f"{setting}{path}: too large for a PEM file", hint=_HINT)
        return path.read_bytes()
    except OSError as error:
        raise IdentityError(f"{setting}{path}: {error.strerror}", hint=_HINT) from None

"""Certificate signing requests: how a silo asks for a certificate without showing its private key.

A request names the identity that it is for, in one URI, and proves by its signature that who asks holds the key.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gptfl_dist.errors import IdentityError
from gptfl_dist.security.identity import Identity

LONGEST = 8 << 10
"""Bytes of a request, at most; ours have about 500."""


def make_request(identity: Identity, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A request for a certificate of this identity, PEM."""
    name = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)])
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(name, critical=True)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def key_in(request: bytes, identity: Identity) -> ec.EllipticCurvePublicKey:
    """The public key that a request asks a certificate for. Raises IdentityError.

    Nothing else of a request is taken over: what the certificate says is for the authority to decide.
    """
    if len(request) > LONGEST:
        raise IdentityError(f"a certificate request of {len(request)} bytes, expected at most {LONGEST}")
    try:
        read = x509.load_pem_x509_csr(request)
        names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = [name.value for name in names if isinstance(name, x509.UniformResourceIdentifier)]
        key, signed = read.public_key(), read.is_signature_valid
    except (
        ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion, x509.ExtensionNotFound,
        x509.DuplicateExtension, x509.UnsupportedGeneralNameType,
    ):  # fmt: skip
        raise IdentityError("the certificate request cannot be read") from None
    if not signed:
        raise IdentityError("the certificate request is not signed by its own key")
    if len(list(names)) != 1 or uris != [identity.uri]:
        raise IdentityError(f"the certificate request is for {', '.join(uris) or 'nobody'}, expected {identity.uri}")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError("the certificate request is for a key of another kind, expected ECDSA on P-256")
    return key


def fingerprint_of(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key, as people compare it: groups of four hex digits."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
    text = digest.finalize().hex()
    return " ".join(text[start : start + 4] for start in range(0, 32, 4))

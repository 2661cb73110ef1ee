"""Statements that are signed: a silo says what it delivers, and nobody can say later that it did not, or in its name.

A statement is a JSON object on one line, its keys sorted, with a word that tells what kind it is. It is signed with the
key of the silo's certificate: ECDSA with SHA-256, or with RSA keys of an institution's own authority PKCS #1 v1.5.
"""

from __future__ import annotations

import json
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from gptfl_dist.errors import IdentityError


def statement(kind: str, **fields: Any) -> str:
    """The text that is signed. The same fields give the same text."""
    return json.dumps({"statement": kind, **fields}, sort_keys=True, separators=(",", ":"))


def sign(text: str, key: bytes) -> bytes:
    """The signature over a statement, with a private key as PEM. Raises IdentityError for another kind of key."""
    private = serialization.load_pem_private_key(key, password=None)
    if isinstance(private, ec.EllipticCurvePrivateKey):
        return private.sign(text.encode(), ec.ECDSA(hashes.SHA256()))
    if isinstance(private, rsa.RSAPrivateKey):
        return private.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
    raise IdentityError("updates cannot be signed with this kind of key", hint="use an ECDSA or an RSA key")


def require_signed(text: str, signature: bytes, certificate: bytes) -> None:
    """Raises IdentityError where the key of a certificate, PEM, did not sign a statement."""
    try:
        public = x509.load_pem_x509_certificate(certificate).public_key()
        if isinstance(public, ec.EllipticCurvePublicKey):
            public.verify(signature, text.encode(), ec.ECDSA(hashes.SHA256()))
            return
        if isinstance(public, rsa.RSAPublicKey):
            public.verify(signature, text.encode(), padding.PKCS1v15(), hashes.SHA256())
            return
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        pass
    raise IdentityError("is not signed with the key of the certificate that was shown")

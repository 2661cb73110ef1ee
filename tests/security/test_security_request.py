"""Certificate requests: what is taken from one, and what is refused."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.errors import IdentityError
from gptfl_dist.security.authority import new_key
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.request import LONGEST, fingerprint_of, key_in, make_request

ALICE = Identity("fed", "silo", "alice")
PEM = serialization.Encoding.PEM


def test_a_request_carries_the_public_key_and_nothing_of_the_private_one():
    key = new_key()
    request = make_request(ALICE, key)
    assert key_in(request, ALICE) == key.public_key()
    assert b"PRIVATE" not in request
    secret = key.private_numbers().private_value.to_bytes(32, "big")
    assert secret not in x509.load_pem_x509_csr(request).public_bytes(serialization.Encoding.DER)


@pytest.mark.parametrize(
    "other",
    [
        Identity("fed", "silo", "bob"),
        Identity("other", "silo", "alice"),
        Identity("fed", "coordinator", "coordinator"),
    ],
)
def test_a_request_for_another_name_is_refused(other):
    with pytest.raises(IdentityError, match="is for gptfl://") as error:
        key_in(make_request(other, new_key()), ALICE)
    assert other.uri in error.value.message


def named(*names: x509.GeneralName) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(list(names)), critical=True)
    return builder.sign(new_key(), hashes.SHA256()).public_bytes(PEM)


@pytest.mark.parametrize(
    "request_",
    [
        named(),
        named(x509.DNSName("alice")),
        named(x509.UniformResourceIdentifier(ALICE.uri), x509.DNSName("coordinator.example.org")),
        named(x509.UniformResourceIdentifier(ALICE.uri), x509.UniformResourceIdentifier("gptfl://fed/silo/bob")),
    ],
)
def test_a_request_that_names_more_or_less_than_one_silo_is_refused(request_):
    with pytest.raises(IdentityError):
        key_in(request_, ALICE)


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()])
def test_a_key_of_another_kind_is_refused(key):
    name = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(ALICE.uri)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(name, critical=True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    with pytest.raises(IdentityError, match="another kind"):
        key_in(builder.sign(key, algorithm).public_bytes(PEM), ALICE)


def test_a_request_that_is_too_long_is_not_read():
    with pytest.raises(IdentityError, match="at most"):
        key_in(make_request(ALICE, new_key()) + b" " * LONGEST, ALICE)


REQUEST = x509.load_pem_x509_csr(make_request(ALICE, new_key())).public_bytes(serialization.Encoding.DER)


@given(st.integers(0, len(REQUEST) - 1), st.integers(1, 255))
def test_no_byte_of_a_request_can_be_changed(place, by):
    """The signature covers all of it: whatever is changed, the request is refused, and never with another error."""
    import base64

    changed = bytearray(REQUEST)
    changed[place] ^= by
    text = base64.encodebytes(bytes(changed))
    with pytest.raises(IdentityError):
        key_in(b"-----BEGIN CERTIFICATE REQUEST-----\n" + text + b"-----END CERTIFICATE REQUEST-----\n", ALICE)


@given(st.binary(max_size=300))
def test_what_is_no_request_is_refused(junk):
    with pytest.raises(IdentityError):
        key_in(junk, ALICE)


def test_fingerprints_tell_keys_apart():
    one, other = new_key().public_key(), new_key().public_key()
    assert fingerprint_of(one) == fingerprint_of(one) != fingerprint_of(other)

"""The search for private keys in what was sent can find them, in any spelling."""

from __future__ import annotations

import json
from base64 import b64encode

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from secrets_on_the_wire import found, scalar

from gptfl_dist.security.authority import key_bytes, new_key

_PLAIN = serialization.NoEncryption()
_SPELLINGS = {
    "PEM": lambda key: key_bytes(key),
    "PEM within JSON": lambda key: json.dumps({"key": key_bytes(key).decode()}).encode(),
    "DER": lambda key: key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, _PLAIN
    ),
    "old PEM": lambda key: key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, _PLAIN
    ),
    "hex": lambda key: scalar(key_bytes(key)).hex().encode(),
}  # fmt: skip


@pytest.mark.parametrize("spelling", _SPELLINGS)
@given(before=st.binary(max_size=7), after=st.binary(max_size=7))
def test_a_key_is_found_in_any_spelling_and_no_other(spelling: str, before: bytes, after: bytes) -> None:
    key, other = new_key(), new_key()
    sent = before + _SPELLINGS[spelling](key) + after
    secrets = [scalar(key_bytes(each)) for each in (key, other)]
    assert found(secrets, [b"something else", sent]) == secrets[:1]
    assert found(secrets, [b64encode(sent)]) == secrets[:1] or spelling != "DER"
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert found(secrets, [public, b64encode(public)]) == []
    assert isinstance(key, ec.EllipticCurvePrivateKey)

"""Who may begin an epoch: the federation's authority, and where it keeps none the coordinator. Nobody else."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from gptfl_dist.errors import IdentityError
from gptfl_dist.security.authority import Authority, Credentials, key_bytes, make_issuing, new_key
from gptfl_dist.security.epoch import FIRST, Epoch, Terms, begun, terms_of
from gptfl_dist.security.signing import sign

DAY = timedelta(days=1)
AUTHORITY = Authority.new("fed", valid=DAY)
COORDINATOR = AUTHORITY.issue_coordinator(["localhost"])


def made(signer: Credentials | None, federation: str = "fed", run: str = "r1", number: int = 2) -> Epoch:
    return begun(number, signer, federation=federation, run=run, rounds={"gptfl": 4}, reason="disk", kept=False)


def terms(epoch: Epoch, *, kept: bool = False) -> Terms:
    return terms_of(epoch, federation="fed", run="r1", roots=AUTHORITY.roots, kept=kept)


@pytest.mark.parametrize("kept", [False, True])
def test_the_authority_may(kept: bool) -> None:
    found = terms(made(AUTHORITY.own), kept=kept)
    assert (found.rounds, found.reason) == ({"gptfl": 4}, "disk")


def test_the_coordinator_may_where_the_federation_keeps_no_authority() -> None:
    assert terms(made(COORDINATOR)).rounds == {"gptfl": 4}
    with pytest.raises(IdentityError, match="the federation's authority did not sign it itself"):
        terms(made(COORDINATOR), kept=True)


def of_a_silo_as_authority() -> Credentials:
    """What a silo could make of its own certificate: one that says it may sign others."""
    silo, key = AUTHORITY.issue_silo("a"), new_key()
    own_key = serialization.load_pem_private_key(silo.key, password=None)
    forged = make_issuing("fed", key.public_key(), silo.certificate, own_key)  # type: ignore[arg-type]  # of ECDSA, as all of ours are
    return Credentials(AUTHORITY.roots, forged + silo.certificate, key_bytes(key))


def with_another_key() -> Credentials:
    return replace(AUTHORITY.own, key=key_bytes(new_key()))


@pytest.mark.parametrize(
    ("signer", "said"),
    [
        (AUTHORITY.issue_silo("a"), "gptfl://fed/silo/a signed it"),
        (of_a_silo_as_authority(), "none of this silo's authority"),
        (Authority.new("fed", valid=DAY).own, "none of this silo's authority"),
        (Authority.new("fed", valid=DAY).issue_coordinator(["localhost"]), "none of this silo's authority"),
        (with_another_key(), "is not signed with the key"),
        (None, "nobody signed it"),
    ],
)
def test_nobody_else_may(signer: Credentials | None, said: str) -> None:
    with pytest.raises(IdentityError, match=said):
        terms(made(signer))


def test_a_signer_whose_certificate_expired_may_not() -> None:
    ended = -timedelta(minutes=1)  # certificates hold from a few minutes ago
    expired = Authority("fed", roots=AUTHORITY.roots, chain=AUTHORITY.chain, key=AUTHORITY._key, valid=ended)
    with pytest.raises(IdentityError, match="the certificate of its signer: valid"):
        terms(made(expired.issue_coordinator(["h"])))


@pytest.mark.parametrize("other", [{"federation": "other"}, {"run": "r2"}, {"number": 3}])
def test_the_statement_of_another_run_or_epoch_does_not_count(other: dict[str, Any]) -> None:
    with pytest.raises(IdentityError, match="the epoch of something else"):
        terms(replace(made(AUTHORITY.own, **other), number=2))


def test_no_word_of_a_statement_can_be_changed() -> None:
    epoch = made(AUTHORITY.own)
    with pytest.raises(IdentityError, match="is not signed with the key"):
        terms(replace(epoch, statement=epoch.statement.replace('"gptfl":4', '"gptfl":1')))
    with pytest.raises(IdentityError, match="nobody signed it"):
        terms(replace(FIRST, number=2))


@pytest.mark.parametrize("text", ["", "[]", '"x"', "{}", '{"rounds": 3}'])
def test_a_signed_text_that_is_no_statement_does_not_count(text: str) -> None:
    signature = b64encode(sign(text, AUTHORITY.own.key)).decode()
    with pytest.raises(IdentityError, match="what was signed is no statement of an epoch"):
        terms(Epoch(2, text, signature, AUTHORITY.own.certificate.decode()))

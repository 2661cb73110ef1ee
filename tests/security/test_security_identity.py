"""Who a peer is follows from the one URI in its certificate, and there is one way to spell it."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.errors import IdentityError
from gptfl_dist.security.identity import Identity, Invited, peer_identity

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
TLS13 = {"ssl_tls_version": [b"TLSv1.3"]}


@given(names, names)
def test_an_identity_is_read_back(federation, name):
    dialling = [Identity(federation, role, name) for role in get_args(Invited)]
    for identity in (*dialling, Identity(federation, "coordinator", "coordinator")):
        assert identity.uri.isascii()
        assert Identity.from_uri(identity.uri) == identity
        assert peer_identity({**TLS13, "peer_uri": [identity.uri.encode()]}) == identity


@given(st.one_of(st.text(max_size=60), st.text("gptfl:/%silocrdna.@#?A2F ", max_size=40).map("gptfl://".__add__)))
def test_what_is_accepted_is_the_one_spelling(uri):
    try:
        identity = Identity.from_uri(uri)
    except IdentityError:
        return
    assert identity.uri == uri


@pytest.mark.parametrize(
    "uri",
    [
        "gptfl://fed/silo/%61lice",  # an escape that is not needed
        "gptfl://fed/silo/a%2fb",  # lower-case escape
        "GPTFL://fed/silo/alice",
        "gptfl://fed/silo/alice/",
        "gptfl://fed/silo/alice?x",
        "gptfl://fed/silo/alice#x",
        "gptfl://fed:1/silo/alice",
        "gptfl://u@fed/silo/alice",
        "gptfl://fed//silo/alice",
        "gptfl:///silo/alice",
        "gptfl://fed/silo/",
        "gptfl://fed/coordinator/",
        "gptfl://fed/silo/ali ce",
        "gptfl://fed/silo/alice\n",
        "https://fed/silo/alice",
        "gptfl://fed/operator",
        "gptfl://fed/operator/",
        "gptfl://fed/Operator/alice",
        "gptfl://fed/operator/silo/alice",
        "gptfl://fed/coordinator/alice",
        "gptfl://fed/auditor/alice",
        "gptfl://[fed/silo/alice",
        "",
    ],
)
def test_another_spelling_is_refused(uri):
    with pytest.raises(IdentityError, match="expected gptfl://"):
        Identity.from_uri(uri)


@pytest.mark.parametrize(
    ("context", "said"),
    [
        ({}, "no TLS"),
        ({"ssl_tls_version": [b"TLSv1.2"], "peer_uri": [b"gptfl://f/silo/a"]}, "TLSv1.2"),
        (TLS13, "0 URIs"),
        ({**TLS13, "peer_uri": [b"gptfl://f/silo/a", b"gptfl://f/silo/b"]}, "2 URIs"),
        ({**TLS13, "peer_uri": [b"\xff"]}, "expected gptfl"),
    ],
)
def test_a_peer_without_tls_1_3_or_without_exactly_one_uri_is_nobody(context, said):
    with pytest.raises(IdentityError, match=said):
        peer_identity(context)

"""The epoch of a run: 1 at its start, one more with each time that its coordinator is set back to an earlier state.

A silo remembers how far a run has come and refuses to go back. Where the coordinator's operator has to, because the run
folder was lost and is restored from a backup, a statement says so: which run begins which epoch, and from which round
of each arm it goes on. It is signed with a key that the silos' own authority vouches for, so nobody who merely holds
old files, or the line to a silo, can set it back.

The key is the issuing one, where the federation keeps an authority of its own. Where it has none it is that of the
coordinator's certificate. A silo that knows its federation to keep an authority takes the issuing key's signature
alone: a coordinator's certificate that was stolen does not do.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509

from gptfl_dist.errors import IdentityError
from gptfl_dist.security.authority import Credentials
from gptfl_dist.security.clocks import require_current
from gptfl_dist.security.credentials import identity_in, leads_to
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.signing import require_signed, sign, statement


@dataclass(frozen=True, slots=True)
class Epoch:
    """The epoch that a run is in. `statement`, `signature` (base64) and `chain` (PEM) began it; the first has none.

    `kept`: the federation keeps an authority of its own, which alone may begin epochs.
    """

    number: int = 1
    statement: str = ""
    signature: str = ""
    chain: str = ""
    kept: bool = False


FIRST = Epoch()


def begun(
    number: int, signer: Credentials | None, *, federation: str, run: str, rounds: Mapping[str, int], reason: str,
    kept: bool,
) -> Epoch:  # fmt: skip
    """Begins an epoch, in which each of these arms goes on from its round, and every other from its first.

    Without a signer it counts only for silos that remember nothing of the run, as those that a run starts itself.
    """
    at = datetime.now(UTC).isoformat(timespec="seconds")
    text = statement("epoch", federation=federation, run=run, epoch=number, rounds=dict(rounds), at=at, reason=reason)
    if signer is None:
        return Epoch(number, text, kept=kept)
    return Epoch(number, text, b64encode(sign(text, signer.key)).decode(), signer.certificate.decode(), kept)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a statement says: from which round each arm goes on, when it was begun, and why."""

    rounds: dict[str, int]
    at: str
    reason: str


def terms_of(epoch: Epoch, *, federation: str, run: str, roots: bytes, kept: bool) -> Terms:
    """What an epoch's statement says, where this federation's authority vouches for it.

    `roots` is what the silo trusts, PEM; `kept`: it takes the authority's own signature alone. Raises IdentityError.
    """
    try:
        chain = x509.load_pem_x509_certificates(epoch.chain.encode())
        signature = b64decode(epoch.signature, validate=True)
    except ValueError:
        raise IdentityError("nobody signed it") from None
    _require_vouched_for(chain, roots)
    leaf = epoch.chain.encode()
    if not _signs_others(chain[0]):
        if kept:
            raise IdentityError("the federation's authority did not sign it itself")
        found, expected = identity_in(leaf, "its signer"), Identity(federation, "coordinator", "coordinator")
        if found != expected:
            raise IdentityError(f"{found.uri} signed it, expected {expected.uri}")
    require_signed(epoch.statement, signature, leaf)
    meant = {"statement": "epoch", "federation": federation, "run": run, "epoch": epoch.number}
    try:
        said = json.loads(epoch.statement)
        if {name: said[name] for name in meant} != meant:
            raise IdentityError("what was signed is the epoch of something else")
        return Terms({str(arm): int(round_) for arm, round_ in said["rounds"].items()}, said["at"], said["reason"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise IdentityError("what was signed is no statement of an epoch") from None


def _require_vouched_for(chain: list[x509.Certificate], roots: bytes) -> None:
    """Raises IdentityError where the chain does not lead to a root by certificates that may sign others, all valid."""
    trusted = x509.load_pem_x509_certificates(roots)
    if not all(map(_signs_others, chain[1:])) or not any(leads_to(chain, root) for root in trusted):
        raise IdentityError("its signer is none of this silo's authority")
    for certificate in chain:
        require_current(certificate, "the certificate of its signer")


def _signs_others(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False

"""Which certificates end soon, said early enough to replace them in peace.

A side's own certificate is told of seven days before its end; where it renews itself, not before the last sixth of its
life, for renewal is under way until then. What issued it is told of sixty days before, however short its life: to
replace it takes more people.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cryptography import x509

from gptfl_dist.security.authority import Credentials
from gptfl_dist.security.clocks import span
from gptfl_dist.security.credentials import leads_to

_SHARE_LEFT = 1 / 6
_OWN, _ISSUERS = timedelta(days=7), timedelta(days=60)


def ending(credentials: Credentials, *, renewed: bool) -> list[str]:
    """What of one side's certificates ends soon, a sentence each.

    A certificate that is `renewed` by itself may have a short life: its last sixth alone is told of.
    """
    own, *chain = x509.load_pem_x509_certificates(credentials.certificate)
    early = min(_OWN, _SHARE_LEFT * (own.not_valid_after_utc - own.not_valid_before_utc)) if renewed else _OWN
    advice = "a silo that was invited renews it while it is connected; else make new sets: gptfl credentials"
    roots = x509.load_pem_x509_certificates(credentials.authority)
    return [*_told("the certificate", own, early, advice), *authority_ending(chain, roots)]


def authority_ending(chain: list[x509.Certificate], roots: list[x509.Certificate]) -> list[str]:
    """What of an authority's certificates ends soon: the issuing one with those above it, and the root of these."""
    root = next((root for root in roots if leads_to(chain, root)), None)
    named = [("the issuing certificate", each) for each in chain]
    named += [] if root is None else [("the root certificate", root)]
    advice = "the coordinator's operator replaces it: gptfl authority rotate"
    return [told for name, each in named for told in _told(name, each, _ISSUERS, advice)]


def _told(name: str, certificate: x509.Certificate, early: timedelta, advice: str) -> list[str]:
    end = certificate.not_valid_after_utc
    left = end - datetime.now(UTC)
    if left >= early:
        return []
    when = f"ends in {span(left)}" if left > timedelta() else f"ended {span(left)} ago"
    return [f"{name} {when} ({end:%F %T} UTC); {advice}"]

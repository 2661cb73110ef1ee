"""What clocks that differ do to certificates, told by how much they differ.

TLS says "not yet valid" or "expired" and no more. A coordinator makes a silo's certificate by its own clock, so where
one of the two is wrong both sides are right in their own eyes: who reads the message has to see both times.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from cryptography import x509

from gptfl_dist.errors import IdentityError
from gptfl_dist.security.authority import SKEW

_UNITS = (("day", 86400), ("h", 3600), ("min", 60), ("s", 1))


def span(time: timedelta) -> str:
    """How long, in its two largest units: "3 h 12 min", "9 days 1 h", "40 s"."""
    left, parts = round(abs(time.total_seconds())), []
    for unit, seconds in _UNITS:
        count, left = divmod(left, seconds)
        if count:
            parts.append(f"{count} {unit}{'s' if unit == 'day' and count > 1 else ''}")
        elif parts:
            break
    return " ".join(parts[:2]) or "0 s"


def life(certificate: x509.Certificate) -> str:
    """From when to when a certificate holds, and what time it is."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return f"valid {start:%F %T} to {end:%F %T} UTC, and now it is {datetime.now(UTC):%F %T} by this machine's clock"


def out_of_date(certificate: x509.Certificate) -> str:
    """Why a certificate does not hold by this machine's clock, or ""."""
    start, end, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, datetime.now(UTC)
    if start <= now <= end:
        return ""
    off = f"{span(start - now)} too early" if now < start else f"{span(now - end)} too late"
    return f"{life(certificate)}: {off}"


def require_current(certificate: x509.Certificate, name: str, *, hint: str = "renew the certificate") -> None:
    """Raises IdentityError where a certificate does not hold now; `name` is what the message calls it."""
    if wrong := out_of_date(certificate):
        raise IdentityError(f"{name}: {wrong}", hint=f"{hint}; set this machine's clock if it is wrong")


def require_same_time(told: str, who: str) -> None:
    """Raises IdentityError where another machine's clock, as an HTTP header `Date` told it, is not ours.

    It proves nothing, and is asked only so that a certificate which would be refused for it is refused with a reason.
    """
    try:
        theirs = parsedate_to_datetime(told).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        return
    ours = datetime.now(UTC)
    if abs(theirs - ours) > SKEW:
        which = "behind" if ours < theirs else "ahead"
        raise IdentityError(
            f"this machine's clock says {ours:%F %T} UTC and {who}'s {theirs:%F %T}: "
            f"it is {span(theirs - ours)} {which}, and certificates allow for {span(SKEW)}",
            hint="set the clock that is wrong, then do the same again",
        )

"""The line that brings somebody into a federation: where to enrol, as whom, with which token, and whom to trust.

    gptfl://HOST:PORT/FEDERATION/SILO/TOKEN/FINGERPRINT
    gptfl://HOST:PORT/FEDERATION/operator/NAME/TOKEN/FINGERPRINT      or observer

The fingerprint is SHA-256 of the root certificate. So the other side knows the coordinator before it tells the token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self, get_args

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from pydantic import TypeAdapter, ValidationError

from gptfl_dist.config.base import Address, Name
from gptfl_dist.errors import ConfigError
from gptfl_dist.security.identity import Identity, Invited

_FORM = "gptfl://HOST:PORT/FEDERATION/[ROLE/]NAME/TOKEN/FINGERPRINT"
_LINE = re.compile(
    r"gptfl://([^/\s]+)/([^/\s]+)/(?:(operator|observer)/)?([^/\s]+)/([\w-]{16,128})/([0-9a-f]{64})", re.ASCII
)
_NAME: TypeAdapter[str] = TypeAdapter(Name)  # safe in paths too
_ADDRESS: TypeAdapter[str] = TypeAdapter(Address)


@dataclass(frozen=True, slots=True)
class InvitationLine:
    """What an invitation says; `address` is HOST:PORT of the enrolment listener."""

    address: str
    who: Identity
    token: str
    fingerprint: str

    def __str__(self) -> str:
        who = self.who.name if self.who.role == "silo" else f"{self.who.role}/{self.who.name}"
        return f"gptfl://{self.address}/{self.who.federation}/{who}/{self.token}/{self.fingerprint}"

    @classmethod
    def parse(cls, line: str) -> Self:
        """Raises ConfigError where the line is no invitation."""
        found = _LINE.fullmatch(line.strip().removeprefix("gptfl join").strip())
        try:
            address, federation, role, name, token, fingerprint = found.groups() if found else ("",) * 6
            federation, name = _NAME.validate_python(federation), _NAME.validate_python(name)
            invited: Invited = next((each for each in get_args(Invited) if each == role), "silo")
            identity = Identity(federation, invited, name)
            return cls(_ADDRESS.validate_python(address), identity, token, fingerprint)
        except ValidationError:
            raise ConfigError(
                "this is no invitation",
                hint=f"give the whole line that gptfl invite printed: {_FORM}",
            ) from None


def root_fingerprint(root: x509.Certificate) -> str:
    """SHA-256 of a root certificate, in hex."""
    return root.fingerprint(hashes.SHA256()).hex()

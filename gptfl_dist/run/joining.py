"""The first steps of who was invited: from an invitation to a certificate, a file of their own and the pre-flight."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from cryptography.hazmat.primitives.asymmetric import ec

from gptfl_dist.errors import ConfigError, ConnectionFailed
from gptfl_dist.files import write_file
from gptfl_dist.run.check import Finding, check_file
from gptfl_dist.security.identity import Identity, Role
from gptfl_dist.security.invitation import InvitationLine
from gptfl_dist.security.join import Enrolled, enrol, own_key
from gptfl_dist.security.request import fingerprint_of

CREDENTIALS = "credentials"
_ASK_EVERY = 5.0  # seconds between two questions whether the operator has approved
_TRIES, _PAUSE = 4, 1.0  # to reach the coordinator, and the seconds between them


@dataclass(frozen=True, slots=True)
class Joined:
    """What somebody has now. `written` is False where their file was there already."""

    role: Role
    name: str
    file: Path
    written: bool
    findings: list[Finding]


def join(line: str, folder: Path, data: Path | None, say: Callable[[str], None]) -> Joined:
    """Enrols by an invitation. What was done before an interruption is not done again: the same call goes on."""
    invitation = InvitationLine.parse(line)
    who = invitation.who
    if data is not None and who.role != "silo":
        raise ConfigError(f"--data is for a silo, and this invitation is for the {who.role} {who.name}")
    home, file = folder / CREDENTIALS, folder / ("silo.yaml" if who.role == "silo" else "operator.yaml")
    if (home / "certificate.pem").exists():
        raise ConfigError(
            f"{home}: there is a certificate already",
            hint="to enrol again, as after a revocation, move that folder away first; the file beside it may stay",
        )
    key = own_key(home / "key.pem")
    enrolled = _enrolled(invitation, key)
    if enrolled is None:
        say(f"waiting for approval; tell the coordinator's operator your key: {fingerprint_of(key.public_key())}")
        enrolled = _approved(invitation, key, say)
    # The certificate last: before it is there, the same call does all of this again.
    written = not file.exists()
    if written:
        write_file(file, _file_of(who, enrolled.address, data))
    enrolled.credentials.save(home)
    return Joined(who.role, who.name, file, written, check_file(file))


def _enrolled(invitation: InvitationLine, key: ec.EllipticCurvePrivateKey) -> Enrolled | None:
    """As `enrol`, with a few tries: the port opens a moment after the invitation was made, and has few places."""
    for tries_left in reversed(range(_TRIES)):
        try:
            return enrol(invitation, key)
        except ConnectionFailed as error:
            if type(error) is not ConnectionFailed or not tries_left:  # others are no matter of waiting
                raise
        time.sleep(_PAUSE)
    raise AssertionError


def _approved(invitation: InvitationLine, key: ec.EllipticCurvePrivateKey, say: Callable[[str], None]) -> Enrolled:
    """Asks until the operator has agreed, also over a coordinator that is stopped meanwhile."""
    away = False
    while True:
        time.sleep(_ASK_EVERY)
        try:
            enrolled = _enrolled(invitation, key)
        except ConnectionFailed as error:
            if type(error) is not ConnectionFailed:
                raise
            if not away:
                say(f"{error.message}; trying again until it does")
            away = True
            continue
        away = False
        if enrolled is not None:
            return enrolled


def _file_of(who: Identity, address: str, data: Path | None) -> str:
    files = {each: f"{CREDENTIALS}/{each}.pem" for each in ("authority", "certificate", "key")}
    sections: dict[str, object] = {"name": who.name, "coordinator": {"address": address, **files}}
    if who.role == "silo":
        told = "This silo's own file; `gptfl init silo` prints all that may stand in it, with its defaults."
        sections["data"] = {"path": "data" if data is None else str(data.absolute())}
    else:
        told = f"The file of an {who.role}; gptfl status and the like take it, see `gptfl init operator`."
        sections = {"role": who.role, **sections}
    return f"# {told}\n{yaml.safe_dump(sections, sort_keys=False)}"

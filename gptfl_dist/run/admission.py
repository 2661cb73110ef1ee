"""What the operator of a coordinator does about who takes part: authority, invitations, approval, revocation.

All of it is in the folder of the authority, so it works beside a coordinator at work, which sees it within a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

from pydantic import TypeAdapter, ValidationError

from gptfl_dist.config.base import Name, port_of
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_federation
from gptfl_dist.config.wire import Enrolment
from gptfl_dist.errors import ConfigError, GptflError
from gptfl_dist.run.folder import PRIVATE, make_folder
from gptfl_dist.run.status import status_of
from gptfl_dist.security.audit_log import AuditLog
from gptfl_dist.security.identity import Identity, Role, called
from gptfl_dist.security.identity import Invited as InvitedRole
from gptfl_dist.security.invitation import InvitationLine, root_fingerprint
from gptfl_dist.security.registry import Invitation, Issued, Registry, serial_text
from gptfl_dist.security.trust import RENEW_AT
from gptfl_dist.security.vault import Vault


@dataclass(frozen=True, slots=True)
class AuthorityShown:
    """An authority as its operator sees it: SHA-256 of each root that is trusted, and when certificates end.

    `request` is the file that waits to be signed by an authority above it; `warnings` tell what ends soon.
    """

    folder: str
    fingerprints: list[str]
    root_expires: str
    issuing_expires: str
    root_key_here: bool
    request: str | None
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class Invited:
    """An invitation that was made: the line for the other side, and until when it holds."""

    role: Role
    name: str
    line: str
    expires: str


@dataclass(frozen=True, slots=True)
class SiloListed:
    """A silo of the federation: how it stands with the authority, and with the run where there is one.

    `standing` is one of: not invited, invited, asks, approved, enrolled, expires soon, expired, revoked.
    """

    silo: str
    standing: str
    until: str | None
    serial: str | None
    reason: str | None
    connected: bool | None
    behind: int | None


@dataclass(frozen=True, slots=True)
class OperatorListed:
    """An operator or observer, and how they stand with the authority, as in `SiloListed`."""

    role: Role
    name: str
    standing: str
    until: str | None
    serial: str | None
    reason: str | None


def init_authority(path: Path, *, external: bool) -> Path:
    """Makes the authority of the federation file at `path`; returns its folder, or for an external one its request."""
    file, enrolment = _settings(path)
    vault = Vault(enrolment.authority, file.name)
    made = enrolment.authority
    if external:
        made = vault.request_issuing()
    else:
        vault.create()
    Registry(enrolment.authority).create()
    return made


def install_issuing(path: Path, chain: Path, roots: Path) -> AuthorityShown:
    """Takes what another authority signed."""
    file, enrolment = _settings(path)
    vault = Vault(enrolment.authority, file.name)
    vault.install_issuing(chain, roots)
    _note(file, "issuing certificate installed", fingerprint=root_fingerprint(vault.roots()[0]))
    return show_authority(path)


def show_authority(path: Path) -> AuthorityShown:
    file, enrolment = _settings(path)
    vault = Vault(enrolment.authority, file.name)
    roots = vault.roots()
    return AuthorityShown(
        str(enrolment.authority),
        [root_fingerprint(root) for root in roots],
        roots[0].not_valid_after_utc.isoformat(),
        vault.issuing().not_valid_after_utc.isoformat(),
        vault.has_root_key,
        None if vault.request is None else str(vault.request),
        vault.warnings(),
    )


def rotate_authority(path: Path, *, finish: bool) -> AuthorityShown:
    """Replaces root and issuing certificate; `finish` ends the time in which the old root is trusted as well.

    Below an authority of somebody else's it makes a request for the next issuing certificate, and nothing changes yet.

    Raises ConfigError for `finish` where somebody would be cut off, as their certificate hangs on the old root.
    """
    file, enrolment = _settings(path)
    vault = Vault(enrolment.authority, file.name)
    if finish:
        now, issuer = datetime.now(UTC), serial_text(vault.issuing().serial_number)
        late = [
            called(*who)
            for who, issued in _latest(Registry(enrolment.authority)).items()
            if not issued.revoked and datetime.fromisoformat(issued.expires) > now and issued.issuer != issuer
        ]
        if late:
            raise ConfigError(
                f"{', '.join(sorted(late))} still show certificates of the old root",
                hint="silos renew them while they are connected, operators as they use a command; wait, or revoke them",
            )
        vault.drop_old_root()
    elif vault.is_external:
        vault.request_next()
        return show_authority(path)
    else:
        vault.rotate()
    event = "old root dropped" if finish else "root replaced"
    _note(file, event, fingerprint=root_fingerprint(vault.roots()[0]))
    return show_authority(path)


def invite(path: Path, role: str, name: str, valid: timedelta) -> Invited:
    """Invites a silo of the federation file at `path`, or an operator or observer of any name."""
    file, enrolment = _settings(path)
    who = _identity(file, role, name)
    if who.role == "silo" and name not in {entry.name for entry in file.silos}:
        raise ConfigError(
            f"{path} has no silo {name}", hint=f"add it under silos; there are {', '.join(s.name for s in file.silos)}"
        )
    vault, registry = Vault(enrolment.authority, file.name), Registry(enrolment.authority)
    fingerprint = root_fingerprint(vault.roots()[0])
    token = registry.invite(who, valid)
    expires = (datetime.now(UTC) + valid).isoformat(timespec="seconds")
    _note(file, f"{who.role} invited", who, until=expires)
    address = f"{enrolment.hosts[0]}:{port_of(enrolment.listen)}"
    return Invited(who.role, name, str(InvitationLine(address, who, token, fingerprint)), expires)


def requests(path: Path) -> list[Invitation]:
    """Who asks to enrol and waits for approval."""
    _, enrolment = _settings(path)
    asked = Registry(enrolment.authority).invitations()
    return [each for each in asked if each.key is not None and each.approved is None and each.used is None]


def approve(path: Path, role: str, name: str, key: str) -> None:
    """Agrees to one of `requests`."""
    file, enrolment = _settings(path)
    who = _identity(file, role, name)
    Registry(enrolment.authority).approve(who, " ".join(key.split()))
    _note(file, "enrolment approved", who, key=key)


def revoke(path: Path, *, role: str, name: str, serial: str, reason: str) -> list[Issued]:
    """Revokes the certificates of somebody, or the one with this serial number; returns those that it met."""
    file, enrolment = _settings(path)
    if bool(name) == bool(serial):
        raise ConfigError("give a name or --serial", hint="gptfl silos and gptfl operators show both")
    which = _identity(file, role, name) if name else serial
    met = Registry(enrolment.authority).revoke(which, reason)
    for issued in met:
        whose = Identity(file.name, issued.role, issued.name)
        _note(file, "certificate revoked", whose, serial=issued.serial, reason=reason)
    if not met and isinstance(which, Identity):
        _note(file, "invitation revoked", which, reason=reason)
    return met


def authority_warnings(path: Path) -> list[str]:
    """What of the authority's own certificates ends soon, where it has any yet."""
    file, enrolment = _settings(path)
    vault = Vault(enrolment.authority, file.name)
    return vault.warnings() if vault.exists else []


def list_silos(path: Path) -> list[SiloListed]:
    """Every silo of the federation file at `path`, and every other that has a certificate."""
    file, enrolment = _settings(path)
    registry = Registry(enrolment.authority)
    latest, invited = _latest(registry), _invited(registry)
    try:
        run = {silo.name: (silo.connected, silo.behind) for silo in status_of(path).silos}
    except GptflError:  # a run that cannot be read is no reason to tell nothing
        run = {}
    listed = []
    for silo in sorted({entry.name for entry in file.silos} | {name for role, name in latest if role == "silo"}):
        issued = latest.get(("silo", silo))
        standing, until, reason = _standing(issued, invited.get(("silo", silo)))
        serial = None if issued is None else issued.serial
        connected, behind = run.get(silo, (None, None))
        listed.append(SiloListed(silo, standing, until, serial, reason, connected, behind))
    return listed


def list_operators(path: Path) -> list[OperatorListed]:
    """Every operator and observer who was invited by the federation file at `path`."""
    registry = Registry(_settings(path)[1].authority)
    latest, invited = _latest(registry), _invited(registry)
    listed = []
    for role, name in sorted(latest.keys() | invited.keys()):
        if role != "silo":
            issued = latest.get((role, name))
            standing, until, reason = _standing(issued, invited.get((role, name)))
            serial = None if issued is None else issued.serial
            listed.append(OperatorListed(role, name, standing, until, serial, reason))
    return listed


def _standing(issued: Issued | None, invitation: Invitation | None) -> tuple[str, str | None, str | None]:
    """Standing, until when, and why."""
    now = datetime.now(UTC)
    if issued is not None and issued.revoked is None:
        end, made = datetime.fromisoformat(issued.expires), datetime.fromisoformat(issued.issued)
        if end > now:
            # What renews itself is past two thirds of its life for a moment alone.
            soon = now > made + (1 + RENEW_AT) / 2 * (end - made)
            return ("expires soon" if soon else "enrolled"), issued.expires, None
    if invitation is not None and datetime.fromisoformat(invitation.expires) > now:
        asked = "asks" if invitation.approved is None else "approved"
        return ("invited" if invitation.key is None else asked), invitation.expires, None
    if issued is None:
        return "not invited", None, None
    return ("revoked", issued.revoked, issued.reason) if issued.revoked else ("expired", issued.expires, None)


def _latest(registry: Registry) -> dict[tuple[Role, str], Issued]:
    """The newest certificate of each, by role and name."""
    latest: dict[tuple[Role, str], Issued] = {}
    for issued in registry.certificates():
        latest.setdefault((issued.role, issued.name), issued)
    return latest


def _invited(registry: Registry) -> dict[tuple[Role, str], Invitation]:
    """The invitations that nobody used, by role and name."""
    return {(each.role, each.name): each for each in registry.invitations() if each.used is None}


def _identity(file: FederationFile, role: str, name: str) -> Identity:
    """Somebody of the federation, by what a command was given. Raises ConfigError."""
    known = next((each for each in get_args(InvitedRole) if each == role), None)
    if known is None:
        raise ConfigError(f"--role is {role}", hint=f"give {', '.join(get_args(InvitedRole))}")
    try:
        return Identity(file.name, known, TypeAdapter(Name).validate_python(name))
    except ValidationError:
        raise ConfigError(f"{name!r} is no name", hint="give letters, digits, '.', '_' and '-', at most 63") from None


def _note(file: FederationFile, event: str, who: Identity | None = None, **fields: str) -> None:
    """Notes what an operator did, and to whom, in the audit log of the run."""
    make_folder(file.run_folder, PRIVATE)
    AuditLog(file.run_folder).append(event, **({} if who is None else {who.role: who.name}), **fields)


def _settings(path: Path) -> tuple[FederationFile, Enrolment]:
    file = load_federation(path)
    if file.enrolment is None:
        raise ConfigError(
            f"{path} has no section enrolment", hint="add one, as gptfl init shows it: enrolment: {hosts: [NAME]}"
        )
    if port_of(file.exchange.listen) == 0:
        raise ConfigError(
            f"{path}: exchange.listen is {file.exchange.listen}, and silos that are invited must know the port",
            hint="set exchange.listen to 0.0.0.0:8443, say",
        )
    return file, file.enrolment

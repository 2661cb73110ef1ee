"""What the operator of a coordinator does about who takes part: authority, invitations, approval, revocation.

All of it is in the folder of the authority, so it works beside a coordinator at work, which sees it within a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from gptfl_dist.config.base import port_of
from gptfl_dist.config.federation import Enrolment, FederationFile
from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import ConfigError, GptflError
from gptfl_dist.run.folder import PRIVATE, make_folder
from gptfl_dist.run.status import status_of
from gptfl_dist.security.audit_log import AuditLog
from gptfl_dist.security.identity import Identity
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

    silo: str
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

    Raises ConfigError for `finish` where a silo would be cut off, as its certificate hangs on the old root.
    """
    file, enrolment = _settings(path)
    vault = Vault(enrolment.authority, file.name)
    if finish:
        now, issuer = datetime.now(UTC), serial_text(vault.issuing().serial_number)
        late = [
            silo
            for silo, issued in _latest(Registry(enrolment.authority)).items()
            if not issued.revoked and datetime.fromisoformat(issued.expires) > now and issued.issuer != issuer
        ]
        if late:
            raise ConfigError(
                f"{', '.join(sorted(late))} still show certificates of the old root",
                hint="they renew them by themselves while they are connected; wait, or revoke them",
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


def invite(path: Path, silo: str, valid: timedelta) -> Invited:
    """Invites a silo of the federation file at `path`."""
    file, enrolment = _settings(path)
    if silo not in {entry.name for entry in file.silos}:
        raise ConfigError(
            f"{path} has no silo {silo}", hint=f"add it under silos; there are {', '.join(s.name for s in file.silos)}"
        )
    vault, registry = Vault(enrolment.authority, file.name), Registry(enrolment.authority)
    fingerprint = root_fingerprint(vault.roots()[0])
    token = registry.invite(silo, valid)
    expires = (datetime.now(UTC) + valid).isoformat(timespec="seconds")
    _note(file, "silo invited", silo=silo, until=expires)
    address = f"{enrolment.hosts[0]}:{port_of(enrolment.listen)}"
    line = InvitationLine(address, Identity(file.name, "silo", silo), token, fingerprint)
    return Invited(silo, str(line), expires)


def requests(path: Path) -> list[Invitation]:
    """Who asks to enrol and waits for approval."""
    _, enrolment = _settings(path)
    asked = Registry(enrolment.authority).invitations()
    return [each for each in asked if each.key is not None and each.approved is None and each.used is None]


def approve(path: Path, silo: str, key: str) -> None:
    """Agrees to one of `requests`."""
    file, enrolment = _settings(path)
    Registry(enrolment.authority).approve(silo, " ".join(key.split()))
    _note(file, "enrolment approved", silo=silo, key=key)


def revoke(path: Path, *, silo: str | None, serial: str | None, reason: str) -> list[Issued]:
    """Revokes the certificates of a silo, or one; returns those that it met."""
    file, enrolment = _settings(path)
    met = Registry(enrolment.authority).revoke(silo=silo, serial=serial, reason=reason)
    for issued in met:
        _note(file, "certificate revoked", silo=issued.silo, serial=issued.serial, reason=reason)
    if not met and silo is not None:
        _note(file, "invitation revoked", silo=silo, reason=reason)
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
    latest = _latest(registry)
    invited = {each.silo: each for each in registry.invitations() if each.used is None}
    try:
        run = {silo.name: (silo.connected, silo.behind) for silo in status_of(path).silos}
    except GptflError:  # a run that cannot be read is no reason to tell nothing
        run = {}
    listed = []
    for silo in sorted({entry.name for entry in file.silos} | set(latest)):
        standing, until, reason = _standing(latest.get(silo), invited.get(silo))
        serial = latest[silo].serial if silo in latest else None
        connected, behind = run.get(silo, (None, None))
        listed.append(SiloListed(silo, standing, until, serial, reason, connected, behind))
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


def _latest(registry: Registry) -> dict[str, Issued]:
    """The newest certificate of each silo."""
    latest: dict[str, Issued] = {}
    for issued in registry.certificates():
        latest.setdefault(issued.silo, issued)
    return latest


def _note(file: FederationFile, event: str, **fields: str) -> None:
    """Notes what an operator did in the audit log of the run."""
    make_folder(file.run_folder, PRIVATE)
    AuditLog(file.run_folder).append(event, **fields)


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

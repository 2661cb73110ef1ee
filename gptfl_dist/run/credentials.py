"""The certificates that a side shows: from the files which its federation or silo file names, or from the authority
that the federation file names.
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.silo import SiloFile
from gptfl_dist.config.wire import Enrolment
from gptfl_dist.errors import ConfigError, IdentityError
from gptfl_dist.security.audit_log import AuditLog
from gptfl_dist.security.authority import Authority, Credentials
from gptfl_dist.security.credentials import load_credentials
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.registry import Registry
from gptfl_dist.security.trust import FileTrust, KeptTrust
from gptfl_dist.security.vault import Vault


def coordinator_trust(path: Path, file: FederationFile) -> FileTrust | KeptTrust:
    """What the coordinator of the federation file at `path` goes by. Raises ConfigError, IdentityError."""
    if file.enrolment is None:
        return FileTrust(file.exchange.certificate or path, partial(coordinator_credentials, path, file))
    enrolment = file.enrolment
    registry = Registry(enrolment.authority)
    vault, valid = Vault(enrolment.authority, file.name), timedelta(seconds=enrolment.certificates)
    return KeptTrust(vault, valid, registry, tuple(enrolment.hosts), AuditLog(file.run_folder).append)


def coordinator_credentials(path: Path, file: FederationFile) -> Credentials:
    """Those of the coordinator of the federation file at `path`. Raises ConfigError, IdentityError."""
    settings = file.exchange
    if file.enrolment is not None:
        return kept_authority(file, file.enrolment).issue_coordinator(file.enrolment.hosts)
    if settings.authority is None or settings.certificate is None or settings.key is None:
        raise ConfigError(
            f"{path}: exchange.authority, certificate and key are missing",
            hint="make them with: gptfl credentials FEDERATION_FILE --host NAME, and name them in the file; or invite "
            "the silos: see enrolment in gptfl init",
        )
    credentials, identity = load_credentials(settings.authority, settings.certificate, settings.key, section="exchange")
    if identity.role != "coordinator":
        raise IdentityError(
            f"{settings.certificate} is the certificate of {identity.uri}, expected the coordinator's",
            hint="use the set that was made for the coordinator",
        )
    return credentials


def kept_authority(file: FederationFile, enrolment: Enrolment) -> Authority:
    """The authority in the folder that the federation file names. Raises IdentityError."""
    return Vault(enrolment.authority, file.name).open(timedelta(seconds=enrolment.certificates))


def credential_files(path: Path, silo: SiloFile, folder: Path | None) -> tuple[Path, Path, Path]:
    """Authority, certificate and key of the silo of the silo file at `path`, out of `folder` where that is given.

    Raises ConfigError.
    """
    side = silo.coordinator
    if folder is not None:
        return folder / "authority.pem", folder / "certificate.pem", folder / "key.pem"
    if side is None:
        raise ConfigError(f"{path}: coordinator is missing", hint="name its address, authority, certificate and key")
    return side.authority, side.certificate, side.key


def silo_credentials(path: Path, silo: SiloFile, folder: Path | None = None) -> tuple[Credentials, Identity]:
    """Those in `credential_files`. Raises ConfigError, IdentityError."""
    files = credential_files(path, silo, folder)
    credentials, identity = load_credentials(*files, section="coordinator" if folder is None else None)
    if identity.role != "silo" or identity.name != silo.name:
        raise IdentityError(
            f"{files[1]} is the certificate of {identity.uri}, but {path} is the file of the silo {silo.name}",
            hint="use the set that was made for this silo",
        )
    return credentials, identity

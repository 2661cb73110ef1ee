"""The certificates that a side shows, from the files which its federation or silo file names."""

from __future__ import annotations

from pathlib import Path

from gptfl_dist.config.federation import Exchange
from gptfl_dist.config.silo import SiloFile
from gptfl_dist.errors import ConfigError, IdentityError
from gptfl_dist.security.authority import Credentials
from gptfl_dist.security.credentials import load_credentials
from gptfl_dist.security.identity import Identity


def coordinator_credentials(path: Path, settings: Exchange) -> Credentials:
    """Those of the coordinator of the federation file at `path`. Raises ConfigError, IdentityError."""
    if settings.authority is None or settings.certificate is None or settings.key is None:
        raise ConfigError(
            f"{path}: exchange.authority, certificate and key are missing",
            hint="make them with: gptfl credentials FEDERATION_FILE --host NAME, and name them in the file",
        )
    credentials, identity = load_credentials(settings.authority, settings.certificate, settings.key, section="exchange")
    if identity.role != "coordinator":
        raise IdentityError(f"{settings.certificate} is the certificate of {identity.uri}, expected the coordinator's")
    return credentials


def silo_credentials(path: Path, silo: SiloFile, folder: Path | None = None) -> tuple[Credentials, Identity]:
    """Those of the silo of the silo file at `path`, out of `folder` where that is given. Raises ConfigError,
    IdentityError.
    """
    side = silo.coordinator
    if folder is not None:
        files = [folder / f"{name}.pem" for name in ("authority", "certificate", "key")]
    elif side is not None:
        files = [side.authority, side.certificate, side.key]
    else:
        raise ConfigError(f"{path}: coordinator is missing", hint="name its address, authority, certificate and key")
    credentials, identity = load_credentials(*files, section="coordinator" if folder is None else None)
    if identity.role != "silo" or identity.name != silo.name:
        raise IdentityError(
            f"{files[1]} is the certificate of {identity.uri}, but {path} is the file of the silo {silo.name}",
            hint="use the set that was made for this silo",
        )
    return credentials, identity

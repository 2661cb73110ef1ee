"""Serves a run's metrics beside it, from what `gptfl status` reads: it disturbs nobody and tells of killed runs too."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from cryptography import x509
from prometheus_client import generate_latest, start_http_server
from pydantic import TypeAdapter, ValidationError

from gptfl_dist.config.base import Address, host_to_bind, port_of
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import ConfigError, GptflError, LaunchError
from gptfl_dist.ledger.lock import at_work
from gptfl_dist.observe.metrics import Expiries, registry_of
from gptfl_dist.run.health import shown_certificate
from gptfl_dist.run.status import status_of
from gptfl_dist.security.credentials import certificates_in
from gptfl_dist.security.registry import Registry
from gptfl_dist.security.vault import Vault


def metrics_text(path: Path) -> str:
    """The metrics of the run whose federation file, or run folder, is at `path`. Raises ConfigError, StorageError."""
    status_of(path)  # whose errors are the operator's, while those below would be the scraper's
    return generate_latest(registry_of(lambda: status_of(path), lambda: _expiries(path))).decode()


def serve_metrics(path: Path, listen: str, say: Callable[[str], None]) -> None:
    """Serves them at HOST:PORT until it is interrupted. Raises as `metrics_text`, and LaunchError for the port."""
    try:
        TypeAdapter(Address).validate_python(listen)
    except ValidationError:
        raise ConfigError(f"--listen is {listen}", hint="give a host and a port, such as 127.0.0.1:9464") from None
    metrics_text(path)
    registry = registry_of(lambda: status_of(path), lambda: _expiries(path))
    try:
        server, thread = start_http_server(port_of(listen), host_to_bind(listen), registry)
    except OSError as error:
        raise LaunchError(
            f"cannot listen on {listen}: {error.strerror or error}", hint="name a free port with --listen"
        ) from None
    say(f"http://{listen}/metrics")
    try:
        threading.Event().wait()
    finally:
        server.shutdown()
        thread.join()


def _expiries(path: Path) -> Expiries:
    if path.is_dir():
        return Expiries()
    file = load_federation(path)
    return Expiries(_of_silos(file), _of_coordinator(file))


def _of_silos(file: FederationFile) -> dict[str, datetime]:
    """The newest certificate of each silo, where an authority is kept and it is not revoked."""
    newest: dict[str, datetime] = {}
    if file.enrolment is not None:
        for issued in Registry(file.enrolment.authority).certificates():
            if issued.revoked is None and issued.role == "silo":
                newest.setdefault(issued.name, datetime.fromisoformat(issued.expires))
    return newest


def _of_coordinator(file: FederationFile) -> dict[str, datetime]:
    """What a coordinator at work shows, and what stands above it, as far as they can be read."""
    found: dict[str, x509.Certificate] = {}
    with contextlib.suppress(GptflError):
        if file.enrolment is not None:
            vault = Vault(file.enrolment.authority, file.name)
            found = {"issuing": vault.issuing(), "root": vault.roots()[0]}
        elif file.exchange.authority is not None and file.exchange.certificate is not None:
            found = dict(zip(("coordinator", "issuing"), certificates_in(file.exchange.certificate), strict=False))
            found["root"] = certificates_in(file.exchange.authority)[0]
        if at_work(file.run_folder) is not None and (shown := shown_certificate(file)) is not None:
            found["coordinator"] = x509.load_pem_x509_certificate(shown)
    return {name: certificate.not_valid_after_utc for name, certificate in found.items()}

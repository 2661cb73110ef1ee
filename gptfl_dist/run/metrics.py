"""Serves a run's metrics beside it, from what `gptfl status` reads: it disturbs nobody and tells of killed runs too."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from prometheus_client import generate_latest, start_http_server
from pydantic import TypeAdapter, ValidationError

from gptfl_dist.config.base import Address, host_to_bind, port_of
from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import ConfigError, LaunchError
from gptfl_dist.observe.metrics import registry_of
from gptfl_dist.run.status import status_of
from gptfl_dist.security.registry import Registry


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


def _expiries(path: Path) -> dict[str, datetime]:
    """Until when the newest certificate of each silo holds, where an authority is kept and it is not revoked."""
    if path.is_dir():
        return {}
    enrolment = load_federation(path).enrolment
    if enrolment is None:
        return {}
    newest: dict[str, datetime] = {}
    for issued in Registry(enrolment.authority).certificates():
        if issued.revoked is None and issued.role == "silo":
            newest.setdefault(issued.name, datetime.fromisoformat(issued.expires))
    return newest

"""Whether a coordinator takes silos now, or a silo is connected, for whoever asks often: Docker, a kubelet, a monitor.

A probe on the machine itself can show no certificate: the coordinator's own cannot dial, and one more key beside it
would serve nothing but probes. So there the files of the run tell, and hands are shaken with the port as far as that
needs no certificate: it must show the coordinator's. From afar an operator file asks the health service of gRPC.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from gptfl_dist.config.base import host_of, port_of
from gptfl_dist.config.document import read_document
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import kind_of, load_federation, load_operator, load_silo
from gptfl_dist.config.operator import OperatorFile
from gptfl_dist.errors import ConfigError, GptflError, IdentityError
from gptfl_dist.ledger.lock import at_work
from gptfl_dist.observe.live import read_live
from gptfl_dist.run.status import status_of
from gptfl_dist.security.credentials import certificates_in, identity_in
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.vault import Vault

Parse = Callable[[str, list[str]], dict[str, Any]]
"""The parameters of a command, from its name and the words behind it."""

PROC = Path("/proc")
_ROLES = ("coordinator", "silo")
_SLACK = timedelta(seconds=2)  # the clock of a process's start is coarse
_PATIENCE = 5.0  # seconds for a handshake
_HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True)
class Health:
    """`why` is a line for a person."""

    well: bool
    why: str


@dataclass(frozen=True, slots=True)
class _Process:
    """A coordinator or silo that runs on this machine, as its command line has it, and when it began."""

    role: str
    file: Path
    work_folder: Path | None
    started: datetime


def health_of(path: Path | None, parse: Parse, *, alive: bool = False) -> Health:
    """The health of what is meant by a federation, silo or operator file; without one, of what runs here.

    `alive`: a coordinator is well also while it prepares the model.
    """
    try:
        if path is not None:
            return _of_file(path, parse, alive)
        for process in _processes(parse):
            return _silo(process) if process.role == "silo" else _coordinator(process.file, alive)
        return Health(False, "no gptfl coordinator or silo runs here")
    except GptflError as error:
        return Health(False, error.message)


def _of_file(path: Path, parse: Parse, alive: bool) -> Health:
    kind = kind_of(read_document(path).value)
    if kind is FederationFile:
        return _coordinator(path, alive)
    if kind is OperatorFile:
        return asyncio.run(_from_afar(path))
    if kind is None:
        raise ConfigError(f"{path} is no federation, silo or operator file")
    for process in _processes(parse):
        if process.role == "silo" and process.file.resolve() == path.resolve():
            return _silo(process)
    return Health(False, f"no gptfl silo runs here with {path}")


async def _from_afar(path: Path) -> Health:
    from gptfl_dist.run.afar import connected

    async with connected(path, load_operator(path)) as client:
        takes = await client.takes_silos()
    return Health(takes, "the coordinator takes silos" if takes else "the coordinator answers, and takes no silos now")


def _coordinator(path: Path, alive: bool) -> Health:
    file = load_federation(path)
    state, live = status_of(path).state, read_live(file.run_folder)
    life = at_work(file.run_folder)
    if life is None or live is None or live.life != life:
        return Health(alive and state == "finished", state)
    doing = f"{state}, {live.stage or 'starting'}"
    if alive:
        return Health(True, doing)
    if not live.serving or state == "aborting":
        return Health(False, f"{doing}: it takes no silos now")
    shown_certificate(file)
    return Health(True, f"{doing}: it takes silos")


def shown_certificate(file: FederationFile) -> bytes | None:
    """The coordinator's certificate as its port shows it to whoever dials, as PEM; None where the file cannot tell.

    Raises IdentityError where the port does not show it.
    """
    listen = file.exchange.listen
    if port_of(listen) == 0:
        return None  # a run on this machine alone, whose port nobody is told
    if file.enrolment is not None:
        roots = Vault(file.enrolment.authority, file.name).roots()
    elif file.exchange.authority is not None:
        roots = certificates_in(file.exchange.authority)
    else:
        return None  # whose authority is its own
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(cadata=b"".join(root.public_bytes(Encoding.DER) for root in roots))
        host = host_of(listen)
        with (
            socket.create_connection((_HERE.get(host, host), port_of(listen)), timeout=_PATIENCE) as line,
            context.wrap_socket(line) as secured,
        ):
            shown = ssl.DER_cert_to_PEM_cert(secured.getpeercert(binary_form=True) or b"").encode()
    except OSError as error:
        raise IdentityError(f"{listen} does not answer as a coordinator does: {error}") from None
    found = identity_in(shown, f"the certificate of {listen}")
    if found != Identity(file.name, "coordinator", "coordinator"):
        raise IdentityError(f"{listen} is {found.uri}, expected the coordinator of {file.name}")
    return shown


def _silo(process: _Process) -> Health:
    """What its log says last of the connection, in this life of the agent."""
    settings = load_silo(process.file)
    folder = process.work_folder or settings.work_folder or process.file.parent / f"{settings.name}-work"
    last = None
    try:
        with (folder / "agent.jsonl").open(encoding="utf-8") as log:
            for text in log:
                if '"message": "connected' in text or '"message": "not connected' in text:
                    last = text
    except OSError as error:
        return Health(False, f"{folder}: {error.strerror}")
    line = None if last is None else json.loads(last)
    if line is None or datetime.fromisoformat(line["time"]) < process.started - _SLACK:
        return Health(False, "not connected yet")
    return Health(line["message"].startswith("connected"), line["message"])


def _processes(parse: Parse) -> Iterator[_Process]:
    """The coordinators and silos that run on this machine and may be looked at, by their command lines."""
    for folder in PROC.glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")[:-1]
            cwd = (folder / "cwd").readlink()
            started = _started(folder)
        except (OSError, ValueError):  # it ended meanwhile, or is another user's
            continue
        for at, word in enumerate(words[:-1]):
            if Path(word).name in ("gptfl", "gptfl_dist") and words[at + 1] in _ROLES:
                given = parse(words[at + 1], words[at + 2 :])
                work = given.get("work_folder")
                yield _Process(words[at + 1], cwd / given["file"], work and cwd / work, started)
                break


def _started(folder: Path) -> datetime:
    """When a process began, by how long it has run."""
    ticks = int((folder / "stat").read_text().rpartition(")")[2].split()[19])
    up = float((PROC / "uptime").read_text().split()[0])
    return datetime.now(UTC) - timedelta(seconds=up - ticks / os.sysconf("SC_CLK_TCK"))

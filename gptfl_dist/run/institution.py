"""One side each, between institutions: the coordinator at its address, a silo that dials out to it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gptfl_dist.config.base import HOST, port_of
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_federation, load_silo
from gptfl_dist.config.wire import Enrolment as EnrolmentSettings
from gptfl_dist.errors import ConfigError, GptflError, StorageError
from gptfl_dist.exchange.base import CoordinatorExchange, Goodbye
from gptfl_dist.exchange.inbox import Inbox
from gptfl_dist.launch.start import open_trainer
from gptfl_dist.lock import held
from gptfl_dist.observe.logs import PRINTED, configure
from gptfl_dist.observe.summary import Summary
from gptfl_dist.run.actions import answer_of
from gptfl_dist.run.addresses import try_listening
from gptfl_dist.run.at_rest import use_at_rest
from gptfl_dist.run.coordinator import Surroundings, coordinate
from gptfl_dist.run.credentials import coordinator_trust, credential_files, silo_credentials
from gptfl_dist.run.expiry import warn
from gptfl_dist.run.folder import PRIVATE, make_folder
from gptfl_dist.run.freshness import Freshness
from gptfl_dist.run.renewal import keep_valid
from gptfl_dist.run.requirements import require_data
from gptfl_dist.run.runner import ProcessRunner
from gptfl_dist.run.silo import Silo
from gptfl_dist.security.audit_log import AuditLog
from gptfl_dist.security.authority import Authority
from gptfl_dist.security.enrolment import Desk, Enrolment
from gptfl_dist.security.registry import Registry
from gptfl_dist.security.trust import KeptTrust, Trust

if TYPE_CHECKING:
    from gptfl_dist.exchange.grpc.port import Port

_log = logging.getLogger(__name__)
_KEEPALIVE = 30.0  # seconds; a silent connection through a firewall is kept open by it


async def run_coordinator(path: Path, say: Callable[[str], None]) -> Summary:
    """Runs the coordinator of the federation file at `path`. Raises what stops it."""
    federation = load_federation(path)
    settings, enrolment = federation.exchange, federation.enrolment
    use_at_rest(federation.at_rest, federation.run_folder)
    trust = coordinator_trust(path, federation)
    port = _port(path, federation, trust)

    def make_exchange(file: FederationFile, inbox: Inbox) -> CoordinatorExchange:
        from gptfl_dist.exchange.grpc.server import GrpcCoordinatorExchange

        return GrpcCoordinatorExchange(port=port, inbox=inbox, chunk=settings.chunk)

    async def opened(exchange: CoordinatorExchange, fail: Callable[[BaseException], None]) -> None:
        say(f"taking silos at {settings.listen}, gRPC with mutual TLS")

    @asynccontextmanager
    async def serving() -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try_listening(settings.listen, "exchange.listen")  # gRPC would not say why it cannot
            stack.push_async_callback(port.close)
            await port.open()
            say(f"answering operators at {settings.listen}, gRPC with mutual TLS")
            stack.callback(asyncio.create_task(warn(trust.credentials, renewed=enrolment is not None)).cancel)
            if enrolment is not None and isinstance(trust, KeptTrust):
                stack.enter_context(Enrolment(enrolment.listen, _desk(federation, enrolment, trust)))
                say(f"enrolling invited silos at {enrolment.listen}, while there are invitations")
            yield

    with closing(trust):
        return await coordinate(
            path, Surroundings(make_exchange=make_exchange, opened=opened, say=say, serving=serving)
        )


def _port(path: Path, file: FederationFile, trust: Trust) -> Port:
    """The coordinator's port, with what answers operators behind it."""
    from gptfl_dist.exchange.grpc.health import OPERATOR
    from gptfl_dist.exchange.grpc.operators import OperatorService
    from gptfl_dist.exchange.grpc.port import Port

    make_folder(file.run_folder, PRIVATE)
    port = Port(
        listen=file.exchange.listen,
        trust=trust,
        federation=file.name,
        silos=tuple(sorted(entry.name for entry in file.silos)),
        limits=file.exchange.limits,
        keepalive=file.exchange.keepalive,
        note=AuditLog(file.run_folder).append,
    )
    port.serve(OPERATOR, OperatorService(port.callers, trust, partial(answer_of, path)).methods)
    return port


def _desk(file: FederationFile, enrolment: EnrolmentSettings, trust: KeptTrust) -> Desk:
    return Desk(
        trust.authority,
        Registry(enrolment.authority),
        trust.credentials,
        enrolment.approval,
        f"{enrolment.hosts[0]}:{port_of(file.exchange.listen)}",
        AuditLog(file.run_folder).append,
    )


async def run_silo(
    path: Path, coordinator: str | None, credentials_folder: Path | None, work_folder: Path | None
) -> Goodbye:
    """Runs the silo of the silo file at `path`; the other arguments replace what the file says."""
    from gptfl_dist.exchange.grpc.client import GrpcSiloExchange

    silo = load_silo(path)
    require_data(silo)
    side = silo.coordinator
    if side is None and coordinator is None:
        raise ConfigError(f"{path}: coordinator is missing", hint="name its address, authority, certificate and key")
    if side is None and credentials_folder is None:
        raise ConfigError("--coordinator without --credentials", hint="give both, or name them in the silo file")
    credentials, own = silo_credentials(path, silo, credentials_folder)
    folder = work_folder or silo.work_folder or path.parent / f"{silo.name}-work"
    make_folder(folder, PRIVATE)
    refusal = StorageError(
        f"{folder}: another process is at work there for a silo",
        hint="stop it, or give each silo a work folder of its own, with work_folder in its silo file",
    )
    with held(folder / "silo.lock", refusal):
        use_at_rest(silo.at_rest, folder)
        configure(folder / "agent.jsonl", shown=logging.INFO)  # all that the silo's operator sees of it
        address = coordinator if coordinator is not None else side.address if side is not None else ""
        exchange = GrpcSiloExchange(address=address, credentials=credentials, keepalive=_KEEPALIVE)
        runner = ProcessRunner(silo, path.parent, await open_trainer(silo, path.parent, folder))
        beside = [
            asyncio.create_task(keep_valid(exchange, own, credential_files(path, silo, credentials_folder))),
            asyncio.create_task(warn(lambda: exchange.credentials, renewed=True)),
        ]
        try:
            fresh = Freshness(folder, own.federation, lambda: exchange.credentials.authority)
            return await Silo(silo=silo, exchange=exchange, runner=runner, folder=folder, fresh=fresh).run()
        except GptflError as error:
            _log.error("this silo ends: %s", error.message, extra=PRINTED)
            raise
        finally:
            for task in beside:
                task.cancel()


def make_credentials(path: Path, hosts: list[str], out: Path, days: int) -> list[str]:
    """Writes a set a side below `out`; returns what to do with each.

    Raises ConfigError where a host is none, StorageError where `out` is not empty.
    """
    for host in hosts:
        if re.fullmatch(HOST, host) is None:
            raise ConfigError(
                f"--host is {host!r}, expected a host name or an IP address", hint="such as coordinator.example.org"
            )
    file = load_federation(path)
    if out.exists() and any(out.iterdir()):
        raise StorageError(f"{out} is not empty", hint="name another folder with --out, or move the old sets away")
    authority = Authority.new(file.name, valid=timedelta(days=days))
    authority.issue_coordinator(hosts).save(out / "coordinator")
    for silo in file.silos:
        authority.issue_silo(silo.name).save(out / silo.name)
    return [
        f"{out / 'coordinator'}: name its three files under exchange in {path}",
        *(f"{out / silo.name}: bring it to {silo.name}, for coordinator in its silo file" for silo in file.silos),
    ]

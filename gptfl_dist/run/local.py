"""A whole federation on this machine: the coordinator here, every silo's agent and trainer as processes of their own.

They speak what institutions would: gRPC with mutual TLS, from an authority made for the run whose key is never
written. Used by `gptfl run` without an MPI.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import RunAborted, SiloFailed
from gptfl_dist.exchange.base import CoordinatorExchange
from gptfl_dist.exchange.inbox import Inbox
from gptfl_dist.launch.lifeline import Child
from gptfl_dist.launch.trainer import TIME_TO_END
from gptfl_dist.observe.summary import Summary
from gptfl_dist.run.coordinator import Surroundings, coordinate
from gptfl_dist.run.folder import PRIVATE, delete, make_folder
from gptfl_dist.run.freshness import SEEN
from gptfl_dist.run.inputs import load_silos
from gptfl_dist.security.audit_log import AuditLog
from gptfl_dist.security.authority import Authority
from gptfl_dist.security.trust import FixedTrust

_HOST = "127.0.0.1"
_VALID = timedelta(days=30)  # longer than any run on one machine
_MARGIN = 5.0  # seconds that an agent has beyond its trainer's time
_LAST_LINES = 1500  # characters of a failed silo's log that are shown


async def run_locally(path: Path, say: Callable[[str], None]) -> Summary:
    """Runs the federation file at `path` with all its silos on this machine. Raises what stops it."""
    file = load_federation(path)
    files = {name: silo_path for name, (silo_path, _) in load_silos(path, file).items()}
    authority = Authority.new(file.name, valid=_VALID)
    with ExitStack() as stops:
        children: list[Child] = []
        watchers: list[asyncio.Task[None]] = []

        def make_exchange(file: FederationFile, inbox: Inbox) -> CoordinatorExchange:
            from gptfl_dist.exchange.grpc.port import Port
            from gptfl_dist.exchange.grpc.server import GrpcCoordinatorExchange

            port = Port(
                listen=f"{_HOST}:0",
                trust=FixedTrust(authority.issue_coordinator([_HOST, "localhost"])),
                federation=file.name,
                silos=tuple(files),
                limits=file.exchange.limits,
                keepalive=file.exchange.keepalive,
                note=AuditLog(file.run_folder).append,
            )
            return GrpcCoordinatorExchange(port=port, inbox=inbox, chunk=file.exchange.chunk)

        async def start_silos(exchange: CoordinatorExchange, fail: Callable[[BaseException], None]) -> None:
            from gptfl_dist.exchange.grpc.server import GrpcCoordinatorExchange

            assert isinstance(exchange, GrpcCoordinatorExchange)
            for place, (name, silo_file) in enumerate(files.items()):
                home = file.run_folder / "silos" / name
                make_folder(home, PRIVATE)
                delete(home / SEEN)  # they believe their own run, though a power cut may have set its ledger back
                credentials = home / "credentials"
                shutil.rmtree(credentials, ignore_errors=True)  # with what a killed run had not finished writing
                authority.issue_silo(name).save(credentials)
                log = home / "agent.log"
                with log.open("wb") as output:
                    child = Child(
                        [
                            *(sys.executable, "-m", "gptfl_dist", "silo", str(silo_file)),
                            *("--coordinator", f"{_HOST}:{exchange.port}"),
                            *("--credentials", str(credentials)),
                            *("--work-folder", str(home)),
                        ],
                        output=output,
                        place=place,
                    )
                children.append(child)
                stops.callback(child.stop)
                watchers.append(asyncio.create_task(_watch(name, child, log, fail)))
            say(f"{len(files)} silos started, gRPC with mutual TLS on {_HOST}:{exchange.port}")

        around = Surroundings(
            make_exchange=make_exchange,
            opened=start_silos,
            say=say,
            spare_core=len(os.sched_getaffinity(0)) > len(files) + 1,  # else the silos are at work on all of them
        )
        try:
            summary = await coordinate(path, around)
        except RunAborted:  # silos that were connected were told so, and end by themselves
            await _all_ended(children, _MARGIN)
            raise
        finally:
            for watcher in watchers:
                watcher.cancel()
        await _all_ended(children, TIME_TO_END + _MARGIN)
        return summary


async def _all_ended(children: list[Child], seconds: float) -> None:
    """Lets the agents end by themselves, which takes as long as a trainer may take after the federation."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while any(child.process.poll() is None for child in children):
                await asyncio.sleep(0.05)


async def _watch(name: str, child: Child, log: Path, fail: Callable[[BaseException], None]) -> None:
    """Ends the run if a silo's agent ends with an error: on one machine nobody will start it again."""
    while (code := child.process.poll()) is None:
        await asyncio.sleep(0.2)
    if code != 0:
        last = log.read_text(errors="replace")[-_LAST_LINES:].strip() if log.exists() else ""
        failure = SiloFailed(f"silo {name} ended with exit code {code}:\n{last}", hint=f"its log is {log}")
        failure.exit_code = code if code > 0 else 1
        fail(failure)

"""The same federation file under `mpiexec`: rank 0 is the coordinator, rank k the k-th silo by name."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_federation, load_silo
from gptfl_dist.config.silo import SiloFile
from gptfl_dist.errors import GptflError, Interrupted, LaunchError
from gptfl_dist.exchange.base import CoordinatorExchange
from gptfl_dist.exchange.inbox import Inbox
from gptfl_dist.observe.summary import Summary
from gptfl_dist.run.coordinator import coordinate, silo_files
from gptfl_dist.run.credentials import coordinator_credentials, silo_credentials
from gptfl_dist.run.folder import PRIVATE, make_folder, open_run_folder
from gptfl_dist.run.signals import run_until_done
from gptfl_dist.run.silo import ProcessRunner, Silo, require_data
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.session import Session

if TYPE_CHECKING:
    from mpi4py import MPI

    from gptfl_dist.exchange.collective.wire import Wire

_LAUNCHERS = {
    "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MPI_LOCALNRANKS": "MPI_LOCALRANKID",
}
"""Environment variables of MPI launchers: number of ranks, own rank. Slurm's own alone say nothing of an MPI."""


def launched() -> tuple[str, int, int] | None:
    """(variable, ranks, own rank) where an MPI launcher started this process, else None."""
    for size, rank in _LAUNCHERS.items():
        if size in os.environ:
            return size, int(os.environ[size]), int(os.environ.get(rank, "0"))
    return None


def open_world(silos: int) -> MPI.Comm:
    """The MPI world, checked against the launcher and the number of silos. Raises LaunchError."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"no MPI library can be loaded: {str(error).splitlines()[0]}",
            hint="install one with: pip install 'gptfl-dist[mpi]', or load your cluster's MPI module",
        ) from None
    world = MPI.COMM_WORLD
    start = launched()
    if start is not None and start[1] > 1 and world.Get_size() == 1:
        library = MPI.Get_library_version().splitlines()[0].strip()
        raise LaunchError(
            f"the launcher started {start[1]} processes ({start[0]}), but each is alone in its MPI world: "
            f"the launcher belongs to another MPI than the library that mpi4py loaded ({library})",
            hint="use the mpiexec of that library (`which -a mpiexec`), or install the launcher's MPI",
        )
    if world.Get_size() != silos + 1:
        raise LaunchError(
            f"the MPI world has {world.Get_size()} ranks, expected {silos + 1}: one coordinator and {silos} silos",
            hint=f"start it with: mpiexec -n {silos + 1} gptfl run FILE",
        )
    return world


def run_world(path: Path, fresh: bool, say: Callable[[str], None]) -> Summary | None:
    """This process's part in the federation file at `path`, from its place in the world on; rank 0 returns the summary.

    An error on any rank, or a signal, ends the whole job with its message and exit code.
    """
    launcher = launched()
    silos = len(load_federation(path).silos)
    try:
        world = open_world(silos)
    except GptflError:
        if launcher is not None and launcher[2] > 0:
            sys.exit(GptflError.exit_code)  # rank 0 says it for all
        raise
    rank = world.Get_rank()
    try:
        if rank == 0:
            open_run_folder(path, fresh)
            why = "--exchange mpi" if launcher is None else f"a launcher set {launcher[0]}={launcher[1]}"
            say(f"exchange: MPI, {world.Get_size()} ranks ({why})")
        return run_until_done(_run_rank(path, world, say))
    except GptflError as error:
        say(f"gptfl, rank {rank}: {error}")
        _abort(world, error.exit_code)
    except Interrupted as stop:
        if rank == 0:
            say(str(stop))
        _abort(world, Interrupted.exit_code)
    except BaseException:
        say(f"gptfl, rank {rank}:\n{traceback.format_exc()}")
        _abort(world, GptflError.exit_code)


def _abort(world: MPI.Comm, exit_code: int) -> NoReturn:
    """Ends all ranks. A launcher drops what it has not passed on by then, so the message gets a moment."""
    time.sleep(1)
    world.Abort(exit_code)
    os._exit(exit_code)  # some MPIs return from Abort before they have ended this process


async def _run_rank(path: Path, world: MPI.Comm, say: Callable[[str], None]) -> Summary | None:
    """This rank's part in the federation file at `path`; rank 0 returns the summary."""
    from gptfl_dist.exchange.collective.mpi import MpiCoordinatorExchange, MpiSiloExchange, dismiss

    file = load_federation(path)
    files = silo_files(file)
    rank = world.Get_rank()
    if rank == 0:
        # Before hours of synthesis, so that no rank is found to be the wrong one after them.
        wire = await _wire_to_silos(path, file, tuple(files), world)
        federated = False

        def make_exchange(file: FederationFile, inbox: Inbox) -> CoordinatorExchange:
            return MpiCoordinatorExchange(wire=wire, silos=tuple(files), inbox=inbox)

        async def opened(exchange: CoordinatorExchange, fail: Callable[[BaseException], None]) -> None:
            nonlocal federated
            federated = True
            secured = ", TLS 1.3 with each of them" if file.collective.trust == "tls" else ""
            say(f"{len(files)} silos as ranks 1 to {len(files)} over MPI{secured}")

        summary = await coordinate(path, make_exchange=make_exchange, opened=opened, say=say)
        if not federated:  # the run was finished before, or none of its arms needs the silos
            await dismiss(wire, len(files))
        return summary
    name, silo_path = list(files.items())[rank - 1]
    folder = file.run_folder / "silos" / name
    silo = load_silo(silo_path)
    if silo.name != name:
        raise LaunchError(f"{silo_path}: name is {silo.name}, {path} expects {name}")
    require_data(silo)
    make_folder(folder, PRIVATE)
    exchange = MpiSiloExchange(wire=await _wire_to_coordinator(file, silo_path, silo, world), folder=folder)
    runner = ProcessRunner(silo, silo_path.parent, folder / "trainer.log")
    if await exchange.invited():
        await Silo(silo=silo, exchange=exchange, runner=runner, folder=folder).run()
    return None


async def _wire_to_silos(path: Path, file: FederationFile, silos: tuple[str, ...], world: MPI.Comm) -> Wire:
    """Rank 0's end of the wire, of the trust level that the file asks for. Raises IdentityError."""
    from gptfl_dist.exchange.collective.wire import PlainWire

    if file.collective.trust == "plain":
        return PlainWire(world)
    from gptfl_dist.exchange.collective.tls import TlsWire

    credentials = coordinator_credentials(path, file.exchange)
    peers = {rank: Identity(file.name, "silo", silo) for rank, silo in enumerate(silos, start=1)}
    wire = TlsWire(world, {rank: Session(credentials, peer, f"rank {rank}") for rank, peer in peers.items()})
    await wire.shake_hands()
    return wire


async def _wire_to_coordinator(file: FederationFile, path: Path, silo: SiloFile, world: MPI.Comm) -> Wire:
    """A silo's end of the wire; `path` is its silo file's. Raises IdentityError."""
    from gptfl_dist.exchange.collective.wire import PlainWire

    if file.collective.trust == "plain":
        return PlainWire(world)
    from gptfl_dist.exchange.collective.tls import TlsWire

    credentials, own = silo_credentials(path, silo)
    peer = Identity(own.federation, "coordinator", "coordinator")
    wire = TlsWire(world, {0: Session(credentials, peer, "rank 0")})
    await wire.shake_hands()
    return wire

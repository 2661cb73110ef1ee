"""The same federation file under `mpiexec` or `torchrun`: rank 0 is the coordinator, the others serve the silos.

Whatever ends one rank before its time ends the job: the rank says why, with its host, and all end with its exit code.
The ledger holds what was committed, so the same command goes on.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_federation, load_silo
from gptfl_dist.config.silo import SiloFile
from gptfl_dist.errors import ConfigError, GptflError, Interrupted, LaunchError, Requeue
from gptfl_dist.exchange.base import CoordinatorExchange
from gptfl_dist.exchange.collective.base import Collective
from gptfl_dist.exchange.collective.coordinator import (
    CollectiveCoordinatorExchange,
    ReducingCoordinatorExchange,
    dismiss,
)
from gptfl_dist.exchange.collective.silo import FileKeeper, MemoryKeeper, RankExchange, SiloOnRank
from gptfl_dist.exchange.collective.watch import RankEnded, Watch
from gptfl_dist.exchange.inbox import Inbox
from gptfl_dist.launch.start import open_trainer
from gptfl_dist.observe.summary import Summary
from gptfl_dist.run.coordinator import Surroundings, coordinate
from gptfl_dist.run.credentials import coordinator_credentials, silo_credentials
from gptfl_dist.run.folder import PRIVATE, make_folder, open_run_folder
from gptfl_dist.run.freshness import Freshness
from gptfl_dist.run.in_process import ReducingRunner
from gptfl_dist.run.inputs import require_one_key, silo_files
from gptfl_dist.run.launcher import Choice, mpi_launcher, torchrun
from gptfl_dist.run.ranks import dismiss_helpers, help_train, open_ranks
from gptfl_dist.run.requirements import require_data
from gptfl_dist.run.runner import OrderRunner, ProcessRunner
from gptfl_dist.run.signals import deadly_stops, ignore_stops, raise_interrupted, run_until_done
from gptfl_dist.run.silo import Silo
from gptfl_dist.run.threads import ended
from gptfl_dist.run.world import NAMES, assign, open_world
from gptfl_dist.security.identity import Identity
from gptfl_dist.security.session import Session

_TIME_TO_SAY_SO = 3.0  # seconds in which rank 0 ends a job that it cannot begin
_TIME_TO_END = 3.0  # seconds that a rank's work has to end by itself once another rank is lost


def run_world(path: Path, choice: Choice, fresh: bool, say: Callable[[str], None]) -> Summary | None:
    """This process's part in the federation file at `path`, from its place in the world on; rank 0 returns the summary.

    An error on any rank, or a signal, ends the whole job with its message and exit code.
    """
    raise_interrupted(terminated=Requeue)
    launcher = torchrun() or mpi_launcher()
    try:
        with deadly_stops():  # it waits for ranks that may be gone
            collective = open_world(choice.wire)
    except GptflError:
        if launcher is not None and launcher.rank > 0:
            sys.exit(GptflError.exit_code)  # rank 0 says it for all
        raise
    rank, where = collective.rank, f"rank {collective.rank} on {socket.gethostname()}"
    try:
        ranks = _ranks_of(path, collective)
        if rank == 0:
            say(f"exchange: {NAMES[collective.transport]}, {collective.size} ranks ({choice.why})")
        summary = run_until_done(_run_rank(path, collective, ranks, fresh, say), terminated=Requeue)
        collective.close()
        return summary
    except RankEnded as error:  # which that rank has told itself
        _abort(collective, error.exit_code, told=rank == 0)
    except GptflError as error:
        say(f"gptfl, {where}: {error}")
        _abort(collective, error.exit_code)
    except Interrupted as stop:
        if rank == 0:
            say(str(stop))
        _abort(collective, stop.exit_code, told=rank == 0)
    except BaseException:
        say(f"gptfl, {where}:\n{traceback.format_exc()}")
        _abort(collective, GptflError.exit_code)


def _abort(collective: Collective, exit_code: int, *, told: bool = True) -> NoReturn:
    """Ends all ranks. A launcher drops what it has not passed on by then, so the message gets a moment.

    `told`: this rank is the one to end them; the others come to it only where it does not.
    """
    ignore_stops()
    time.sleep(1 if told else 5)
    collective.abort(exit_code)


def _ranks_of(path: Path, collective: Collective) -> dict[str, range]:
    """The ranks of each silo of the federation file."""
    try:
        file = load_federation(path)
        return _checked_ranks(file, collective.size, collective.transport)
    except GptflError:
        if collective.rank > 0:
            time.sleep(_TIME_TO_SAY_SO)  # rank 0 says what all of them find wrong, and ends them
        raise


def _checked_ranks(file: FederationFile, size: int, transport: str) -> dict[str, range]:
    """The ranks of each silo. Raises ConfigError or LaunchError where the file cannot be run by such a world."""
    files = silo_files(file)
    silos = {name: load_silo(path) for name, path in files.items()}
    ranks = assign(list(silos), size)
    require_one_key(file, silos)
    if file.collective.reduction == "fast" and size > len(ranks) + 1:
        raise LaunchError(
            f"collective.reduction is fast, and the world has {size} ranks, expected at most {len(ranks) + 1}: one "
            f"coordinator and {len(ranks)} silos, each a rank",
            hint="set collective.reduction to exact, which knows silos of several ranks, or start fewer ranks",
        )
    if file.collective.trust == "plain":
        return ranks
    if transport != "mpi" or size != len(ranks) + 1:
        raise LaunchError(
            f"collective.trust is tls, and this world has {size} ranks of {NAMES[transport]}, expected "
            f"{len(ranks) + 1} of MPI: one coordinator, and one for each silo's certificate",
            hint=f"start it with: mpiexec -n {len(ranks) + 1} gptfl run FILE",
        )
    for name, silo in silos.items():
        if silo.coordinator is None:
            raise ConfigError(
                f"{files[name]}: coordinator is missing, and collective.trust is tls",
                hint="name the silo's authority, certificate and key there; its address is not used",
            )
    return ranks


async def _run_rank(
    path: Path, collective: Collective, ranks: Mapping[str, range], fresh: bool, say: Callable[[str], None]
) -> Summary | None:
    """This rank's part, until it is done or another rank is lost; rank 0 returns the summary."""
    watch = Watch(collective)
    work: asyncio.Task[Summary | None] | None = None
    exit_code = 0
    try:
        await watch.open()
        collective = await _secured(path, collective, ranks)
        if collective.rank == 0:
            work = asyncio.create_task(_coordinate(path, collective, ranks, fresh, say))
        else:
            work = asyncio.create_task(_serve(path, collective, ranks))
        waited: set[asyncio.Future[Any]] = {work, watch.lost}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not watch.lost.done() and work.exception() is not None:
            # What fails because a rank is gone may fail before it is known that it is.
            await asyncio.wait({watch.lost}, timeout=0.5)
        if watch.lost.done() and (not work.done() or work.exception() is not None):
            collective.fail(watch.lost.result())
            await asyncio.wait({work}, timeout=_TIME_TO_END)
            raise watch.lost.result()
        return work.result()
    except BaseException as error:
        exit_code = error.exit_code if isinstance(error, GptflError) else GptflError.exit_code
        if isinstance(error, asyncio.CancelledError):
            exit_code = Requeue.exit_code
        raise
    finally:
        if work is not None and not work.done():
            collective.fail(GptflError("the job is ended"))  # no goodbye: the other ranks may listen no more
            work.cancel()
            await ended(work)
        await watch.end(exit_code)


async def _secured(path: Path, collective: Collective, ranks: Mapping[str, range]) -> Collective:
    """The world at the trust level that the federation file asks for. Raises ConfigError, IdentityError.

    It comes before hours of synthesis, so that no rank is found to be the wrong one after them.
    """
    file = load_federation(path)
    if file.collective.trust == "plain":
        return collective
    from gptfl_dist.exchange.collective.mpi import MpiCollective
    from gptfl_dist.exchange.collective.tls import TlsCollective

    assert isinstance(collective, MpiCollective)
    if collective.rank == 0:
        credentials = coordinator_credentials(path, file)
        peers = {its.start: Identity(file.name, "silo", silo) for silo, its in ranks.items()}
    else:
        (name,) = (silo for silo, its in ranks.items() if collective.rank in its)
        silo_path = silo_files(file)[name]
        credentials, own = silo_credentials(silo_path, load_silo(silo_path))
        peers = {0: Identity(own.federation, "coordinator", "coordinator")}
    sessions = {rank: Session(credentials, peer, f"rank {rank}") for rank, peer in peers.items()}
    secured = TlsCollective(collective.world, sessions)
    await secured.shake_hands()
    return secured


async def _coordinate(
    path: Path, collective: Collective, ranks: Mapping[str, range], fresh: bool, say: Callable[[str], None]
) -> Summary:
    for _ in range(1, collective.size):
        await collective.hear()  # that it can begin: `fresh` deletes an earlier run only then
    open_run_folder(path, fresh)
    for rank in range(1, collective.size):
        await collective.say(rank, {"type": "begin"})
    first = {silo: its.start for silo, its in ranks.items()}
    federated = False

    def make_exchange(file: FederationFile, inbox: Inbox) -> CoordinatorExchange:
        fast = file.collective.reduction == "fast"
        kind = ReducingCoordinatorExchange if fast else CollectiveCoordinatorExchange
        return kind(collective=collective, ranks=first, inbox=inbox)

    async def opened(exchange: CoordinatorExchange, fail: Callable[[BaseException], None]) -> None:
        nonlocal federated
        federated = True
        secured = ", TLS 1.3 with each of them" if load_federation(path).collective.trust == "tls" else ""
        working = collective.size - 1
        say(f"{len(ranks)} silos on {working} rank{'s' if working > 1 else ''}{secured}")

    summary = await coordinate(path, Surroundings(make_exchange=make_exchange, opened=opened, say=say))
    if not federated:  # the run was finished before, or none of its arms needs the silos
        await dismiss(collective)
    return summary


async def _serve(path: Path, collective: Collective, ranks: Mapping[str, range]) -> None:
    """The silos of this rank, or its part of one, until the coordinator says goodbye."""
    file = load_federation(path)
    names = [silo for silo, its in ranks.items() if collective.rank in its]
    its = ranks[names[0]]  # of one silo, if they are several
    silos = {name: _silo(path, file, name) for name in names}
    await collective.say(0, {"type": "ready"})
    await collective.hear()  # that the run folder is as it shall be
    for name in names:
        make_folder(_home(file, name), PRIVATE)
    if collective.rank > its.start:
        await help_train(*silos[names[0]], _home(file, names[0]), collective, its)
        return
    memory = MemoryKeeper() if file.collective.reduction == "fast" else None
    folder = file.run_folder / "ranks" / str(collective.rank)
    make_folder(folder, PRIVATE)
    rank = RankExchange(collective=collective, silos=names, keeper=memory or FileKeeper(folder))
    turn = asyncio.Lock()
    listening = asyncio.create_task(rank.listen())
    first: set[asyncio.Future[Any]] = {listening, rank.welcome}
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    work = [listening]
    if not rank.welcome.cancelled():
        for name, (silo, silo_folder) in silos.items():
            home = _home(file, name)
            runner: OrderRunner
            if memory is None:
                if len(its) == 1:
                    trainer = await open_trainer(silo, silo_folder, home)
                else:
                    trainer = await open_ranks(silo, silo_folder, home, collective, its)
                runner = ProcessRunner(silo, silo_folder, trainer)
            else:
                runner = ReducingRunner(silo, silo_folder, turn, memory, file.federation.max_update_norm)
            exchange = SiloOnRank(rank, name)
            fresh = _fresh(file, silo, home)
            work.append(asyncio.create_task(_to_the_goodbye(silo, exchange, runner, home, fresh)))
    try:
        done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        await dismiss_helpers(collective, its)
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)


def _fresh(file: FederationFile, silo: SiloFile, home: Path) -> Freshness | None:
    """What refuses to go back, where the ranks are of several owners."""
    if file.collective.trust == "plain":
        return None
    credentials, own = silo_credentials(silo_files(file)[silo.name], silo)
    return Freshness(home, own.federation, lambda: credentials.authority)


def _home(file: FederationFile, silo: str) -> Path:
    return file.run_folder / "silos" / silo


async def _to_the_goodbye(
    silo: SiloFile, exchange: SiloOnRank, runner: OrderRunner, home: Path, fresh: Freshness | None
) -> None:
    await Silo(silo=silo, exchange=exchange, runner=runner, folder=home, fresh=fresh).run()


def _silo(path: Path, file: FederationFile, name: str) -> tuple[SiloFile, Path]:
    """A silo's file and the folder that it lies in, checked."""
    silo_path = silo_files(file)[name]
    silo = load_silo(silo_path)
    if silo.name != name:
        raise LaunchError(f"{silo_path}: name is {silo.name}, {path} expects {name}")
    if silo.launch.how != "child":
        raise LaunchError(
            f"{silo_path}: launch.how is {silo.launch.how}, but in a world of ranks each trains what it serves",
            hint="leave launch.how at child, or start the federation without mpiexec or torchrun: gptfl run FILE",
        )
    require_data(silo)
    return silo, silo_path.parent

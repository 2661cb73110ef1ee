"""A silo of several ranks in a world: its first rank has the agent, and every one runs a process of its trainer.

The processes train data-parallel (`gptfl_dist.learning.group`). They exchange messages and weights with the agent
through a folder, as those of any launcher do. The other ranks help: they take part in broadcasts and reductions, and
start and stop their process when the first one says so.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from gptfl_dist.config.silo import SiloFile
from gptfl_dist.exchange.collective.base import Collective, Message
from gptfl_dist.exchange.collective.silo import DISMISS, NoKeeper, RankExchange
from gptfl_dist.launch.base import TrainerLine
from gptfl_dist.launch.job import TrainerJob
from gptfl_dist.launch.local import LocalLauncher
from gptfl_dist.launch.ranks import RanksLauncher, follow
from gptfl_dist.launch.start import LOG, launch_folder, trainer_command
from gptfl_dist.learning.group import RANK, RANKS


async def open_ranks(silo: SiloFile, folder: Path, home: Path, collective: Collective, ranks: range) -> TrainerLine:
    """The trainer of a silo whose first rank this is; `folder` is where the silo file lies, `home` its work folder."""

    async def tell(message: Message) -> None:
        for rank in ranks[1:]:
            await collective.say(rank, message)

    own = _process(silo, folder, home, collective.rank, ranks)
    job = TrainerJob(RanksLauncher(own, tell), launch_folder(silo, home), silo.launch.lease)
    await job.sweep()
    return job


async def dismiss_helpers(collective: Collective, ranks: range) -> None:
    """Nothing more will be asked of the other ranks of this rank's silo."""
    for rank in ranks[1:]:
        await collective.say(rank, {"type": DISMISS})


async def help_train(silo: SiloFile, folder: Path, home: Path, collective: Collective, ranks: range) -> None:
    """What a rank of the silo that is not its first does, until it is dismissed."""
    exchange = RankExchange(collective=collective, silos=[], keeper=NoKeeper(), helps=True)
    process = _process(silo, folder, home, collective.rank, ranks)

    async def follow_orders() -> None:
        while (message := await exchange.told.get())["type"] != DISMISS:
            await follow(message, process)

    work = [asyncio.create_task(exchange.listen()), asyncio.create_task(follow_orders())]
    try:
        await asyncio.gather(*work)
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        await process.stop()


def _process(silo: SiloFile, folder: Path, home: Path, rank: int, ranks: range) -> LocalLauncher:
    place = {RANK: str(ranks.index(rank)), RANKS: str(len(ranks))}
    return LocalLauncher(
        [], trainer_command(silo), lease=silo.launch.lease, log=home / LOG, cwd=folder, variables=place
    )

"""A whole federation in this process, without a wire: for experiments, where nobody is kept from anybody's data.

Coordinator, silos and ledger are the real ones, and the weights are those of any other wire. What differs: silos are
tasks of one event loop and train in turn, in threads, so nothing is started and torch is loaded once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.load import load_federation
from gptfl_dist.exchange.base import CoordinatorExchange
from gptfl_dist.exchange.inbox import Inbox
from gptfl_dist.exchange.memory import MemoryCoordinatorExchange, MemoryNetwork, MemorySiloExchange
from gptfl_dist.observe.summary import Summary
from gptfl_dist.run.coordinator import Surroundings, coordinate
from gptfl_dist.run.evaluation import Evaluator, InProcessEvaluator
from gptfl_dist.run.folder import PRIVATE, make_folder
from gptfl_dist.run.in_process import InProcessRunner
from gptfl_dist.run.inputs import load_silos, require_one_key
from gptfl_dist.run.silo import Silo
from gptfl_dist.run.stages import Stage, is_generated, is_pretrained, run_stage
from gptfl_dist.run.threads import to_its_end


async def run_in_memory(path: Path, say: Callable[[str], None]) -> Summary:
    """Runs the federation file at `path` with all its silos in this process. Raises what stops it."""
    file = load_federation(path)
    turn = asyncio.Lock()
    network = MemoryNetwork()
    loaded = load_silos(path, file)
    require_one_key(file, {name: silo for name, (_, silo) in loaded.items()})
    runners = {name: (silo, InProcessRunner(silo, where.parent, turn)) for name, (where, silo) in loaded.items()}
    working: list[asyncio.Task[None]] = []

    def make_exchange(file: FederationFile, inbox: Inbox) -> CoordinatorExchange:
        return MemoryCoordinatorExchange(network=network, silos=tuple(runners), inbox=inbox)

    def make_evaluator(path: Path, file: FederationFile) -> Evaluator:
        return InProcessEvaluator(file, path.absolute().parent, turn)

    async def only_if_needed(stage: Stage, path: Path) -> dict[str, Any]:
        # Cells of an experiment share what these stages made; a stage that was begun would wait for its lock.
        folder = path.absolute().parent
        if file.pretrains and await to_its_end(is_pretrained, file, folder):
            return {}
        if stage == "generate" and await to_its_end(is_generated, file, folder):
            return {}
        return await run_stage(stage, path)

    async def start_silos(exchange: CoordinatorExchange, fail: Callable[[BaseException], None]) -> None:
        async def work(name: str) -> None:
            silo, runner = runners[name]
            home = file.run_folder / "silos" / name
            make_folder(home, PRIVATE)
            try:
                exchange = MemorySiloExchange(network=network, silo=name)
                await Silo(silo=silo, exchange=exchange, runner=runner, folder=home, fresh=None).run()
            except Exception as error:  # nobody will start it again
                fail(error)

        working.extend(asyncio.create_task(work(name)) for name in runners)
        say(f"{len(runners)} silos in this process")

    try:
        around = Surroundings(
            make_exchange=make_exchange,
            opened=start_silos,
            say=say,
            make_evaluator=make_evaluator,
            run_stage=only_if_needed,
        )
        return await coordinate(path, around)
    finally:
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)

"""Who carries out a silo's orders: what is handed over, what comes back, and a trainer that is a process of its own.

A silo knows its `OrderRunner` alone. The one here speaks to a trainer over a line (`launch.base`), and starts it again
where it was lost; those of `run.in_process` train in this very process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from gptfl_dist.config.plan import Plan
from gptfl_dist.config.silo import SiloFile
from gptfl_dist.errors import ModelError, TrainerLost
from gptfl_dist.federation.orders import Order
from gptfl_dist.launch.base import Progress, TrainerLine, unheard
from gptfl_dist.launch.folder import Message
from gptfl_dist.run.requirements import require_built_in, require_layout, require_training
from gptfl_dist.weights import Layout
from gptfl_dist.weights.kept import NOTHING_KEPT, KeptFiles

_log = logging.getLogger(__name__)

_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Result:
    """What carrying out an order gave: BLAKE3 of the update (empty for an evaluation), samples, metrics."""

    digest: str
    samples: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class OrderFiles:
    """The files of an order: the weights that it starts from, where the update goes, what the silo keeps of updates,
    and the synthetic samples that it was given, if it was."""

    weights: Path
    update: Path
    kept: KeptFiles = NOTHING_KEPT
    samples: Path | None = None


class OrderRunner(Protocol):
    """Carries out orders: a trainer process, or the trainer in this very process.

    `keeps_updates`: an update is not written but kept, for an exchange that sums it. The silo then only reports.
    """

    keeps_updates: bool

    async def setup(self, run: str, plan: Plan, layout: Layout) -> None:
        """Builds model and data; raises ModelError where the model's layout is another.

        A trainer that would wait in a queue for it is set up with its first order, and an error comes with that.
        """

    async def run(self, order: Order, files: OrderFiles, progress: Progress) -> Result:
        """Trains or evaluates, from what was kept of an earlier update."""

    async def finish(self) -> None:
        """Lets the trainer end by itself: the federation is over."""

    async def stop(self) -> None:
        """Ends what runs, at once."""


class ProcessRunner:
    """An OrderRunner whose trainer is a process or a job of its own, started anew when it has ended.

    One that was lost, as when the kernel kills it for want of memory, is given other tries in each order.
    """

    keeps_updates = False

    def __init__(self, silo: SiloFile, folder: Path, trainer: TrainerLine) -> None:
        """`folder` is where the silo file lies."""
        self._silo = silo
        self._folder = folder.absolute()  # a trainer may run elsewhere
        self._trainer = trainer
        self._held = silo.launch.how != "slurm" or silo.launch.slurm.hold == "run"
        self._plan: Plan | None = None
        self._layout: Layout | None = None
        self._run = ""
        self._mixed = False  # whether the trainer has the synthetic samples

    async def setup(self, run: str, plan: Plan, layout: Layout) -> None:
        require_built_in(self._silo, plan)
        self._run, self._plan, self._layout = run, plan, layout
        await self._trainer.stop()
        if self._silo.launch.how != "slurm":
            await self._persist(lambda: self._start(unheard), unheard)

    async def run(self, order: Order, files: OrderFiles, progress: Progress) -> Result:
        require_training(self._silo, order)
        message: Message = {"type": order.kind, "weights": str(files.weights)}
        if order.training is not None:
            training = order.training.model_dump(mode="json")
            message |= {"update": str(files.update), "round": order.round, "training": training}
        kept = files.kept
        message |= {name: str(path) for name, path in (("kept", kept.before), ("keep", kept.after)) if path is not None}

        async def attempt() -> Message:
            if not self._trainer.running:
                await self._start(progress)
            if files.samples is None or self._mixed:
                return await self._trainer.ask(message, "result", progress)
            answer = await self._trainer.ask({**message, "samples": str(files.samples)}, "result", progress)
            self._mixed = True
            return answer

        answer = await self._persist(attempt, progress)
        if not self._held:
            await self.finish()
            await self._trainer.stop()
        metrics = {str(name): float(value) for name, value in answer["metrics"].items()}
        return Result(str(answer["digest"]), int(answer["samples"]), metrics)

    async def _persist(self, attempt: Callable[[], Awaitable[_R]], progress: Progress) -> _R:
        """Makes as many attempts as the silo file allows where the trainer was lost."""
        for left in range(self._silo.launch.retries, 0, -1):
            try:
                return await attempt()
            except TrainerLost as lost:
                _log.warning("%s\nit is started again, %d more tries", lost.message, left)
                progress(0, 0, f"{lost.message.splitlines()[0]}; it is started again")
                await self._trainer.stop()
                await asyncio.sleep(self._silo.launch.pause)
        return await attempt()

    async def _start(self, progress: Progress) -> None:
        assert self._plan is not None
        assert self._layout is not None
        await self._trainer.stop()
        self._mixed = False
        await self._trainer.start(self._run)
        message: Message = {
            "type": "setup",
            "plan": self._plan.model_dump(mode="json"),
            "silo": self._silo.model_dump(mode="json"),
            "folder": str(self._folder),
        }
        built = Layout.from_json((await self._trainer.ask(message, "ready", progress))["layout"])
        try:
            require_layout(self._layout, built)
        except ModelError:
            await self._trainer.stop()
            raise

    async def finish(self) -> None:
        await self._trainer.finish({"type": "finish"})

    async def stop(self) -> None:
        await self._trainer.stop()

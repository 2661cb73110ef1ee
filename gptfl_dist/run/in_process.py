"""A silo's trainer in this very process: a thread in place of a process, for experiments and for reductions.

All silos of a process train in turn, for torch's threads and seeds are the process's. A training cannot be killed: one
that is not wanted any more ends at its next report of progress.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gptfl_dist.config.plan import Plan
from gptfl_dist.config.silo import SiloFile
from gptfl_dist.errors import ConfigError, TrainerError
from gptfl_dist.exchange.collective.silo import MemoryKeeper
from gptfl_dist.federation.orders import Order
from gptfl_dist.launch.base import Progress
from gptfl_dist.run.requirements import require_layout
from gptfl_dist.run.runner import OrderFiles, Result
from gptfl_dist.run.threads import ended
from gptfl_dist.weights import Layout

if TYPE_CHECKING:
    from gptfl_dist.run.trainer import Trainer

_T = TypeVar("_T")


class _Unwanted(Exception):
    """Ends a training from within."""


class InProcessRunner:
    """An OrderRunner that trains in a thread; weights and updates are files, as with a trainer of its own process."""

    keeps_updates = False

    def __init__(self, silo: SiloFile, folder: Path, turn: asyncio.Lock) -> None:
        """`folder` is where the silo file lies; `turn` is shared by all that use torch in this process.

        Raises ConfigError for a silo with a script of its own.
        """
        if silo.code is not None and silo.code.script is not None:
            raise ConfigError(
                f"silo {silo.name} is trained by {silo.code.script}, a process of its own, but here silos are trained "
                "in the process that serves them",
                hint="run without --exchange memory, and with collective.reduction at exact in the federation file",
            )
        self._silo = silo
        self._folder = folder
        self._turn = turn
        self._trainer: Trainer | None = None
        self._unwanted = threading.Event()

    async def setup(self, run: str, plan: Plan, layout: Layout) -> None:
        self._trainer = await self._in_turn(self._build, plan)
        require_layout(layout, self._trainer.layout)

    def _build(self, plan: Plan) -> Trainer:
        from gptfl_dist.run.trainer import Trainer

        return Trainer(plan, self._silo, self._folder)

    async def run(self, order: Order, files: OrderFiles, progress: Progress) -> Result:
        assert self._trainer is not None
        loop = asyncio.get_running_loop()

        def report(done: int, total: int) -> None:
            if self._unwanted.is_set():
                raise _Unwanted
            loop.call_soon_threadsafe(progress, done, total, "")

        return await self._in_turn(self._carry_out, self._trainer, order, files, report)

    def _carry_out(
        self, trainer: Trainer, order: Order, files: OrderFiles, report: Callable[[int, int], None]
    ) -> Result:
        if order.training is None:
            result = trainer.evaluate(files.weights, kept=files.kept.before)
        else:
            result = trainer.train(
                round_=order.round,
                settings=order.training,
                weights=files.weights,
                update=files.update,
                kept=files.kept.before,
                keep=files.kept.after,
                samples=files.samples,
                progress=report,
            )
        return Result(result.digest, result.samples, dict(result.metrics))

    async def _in_turn(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Calls a function in a thread, once it is this silo's turn. Cancelled, it waits for the thread's early end."""
        async with self._turn:
            self._unwanted.clear()
            work = asyncio.create_task(asyncio.to_thread(function, *arguments))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                self._unwanted.set()
                raise
            finally:
                await ended(work)

    async def finish(self) -> None:
        """Nothing outlives the rank."""

    async def stop(self) -> None:
        self._unwanted.set()


class ReducingRunner(InProcessRunner):
    """Weights and updates are never anywhere but in memory.

    Weights come from the buffer into which they were broadcast, and after the training the model's own buffer becomes
    the update, which is checked here before it may count.
    """

    keeps_updates = True

    def __init__(
        self, silo: SiloFile, folder: Path, turn: asyncio.Lock, keeper: MemoryKeeper, max_norm: float | None
    ) -> None:
        """`max_norm` bounds the Euclidean norm of an update."""
        super().__init__(silo, folder, turn)
        self._keeper = keeper
        self._max_norm = max_norm

    def _carry_out(
        self, trainer: Trainer, order: Order, files: OrderFiles, report: Callable[[int, int], None]
    ) -> Result:
        received = self._keeper.weights
        self._keeper.updates.pop(self._silo.name, None)
        if order.training is None:
            result = trainer.evaluate(received)
        else:
            result = trainer.train(
                round_=order.round, settings=order.training, weights=received, update=None, progress=report
            )
            length = trainer.flat.become_update(received, trainer.samples)
            if math.isnan(length):
                raise TrainerError("the update holds NaN or infinite values")
            if self._max_norm is not None and length > self._max_norm:
                raise TrainerError(
                    f"the update's norm is {length:.4g}, federation.max_update_norm allows {self._max_norm:g}"
                )
            buffer = trainer.flat.buffer
            self._keeper.updates[self._silo.name] = buffer.cpu().numpy() if received.device.type == "cpu" else buffer
        return Result(result.digest, result.samples, dict(result.metrics))

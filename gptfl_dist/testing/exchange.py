"""Federations in one event loop: the exchange in memory with its faults, and silos whose trainer follows a script.

network = MemoryNetwork()
late = network.hold("silo-2", "upload", round=3)        # silo-2 is late in round 3 until late.release()
Federator(..., make_exchange=lambda inbox: MemoryCoordinatorExchange(network=network, silos=names, inbox=inbox))
Silo(silo=file, exchange=MemorySiloExchange(network=network, silo="silo-2"), runner=ScriptedTrainer(...), ...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gptfl_dist.config.plan import Plan
from gptfl_dist.exchange.memory import Fault, MemoryCoordinatorExchange, MemoryNetwork, MemorySiloExchange
from gptfl_dist.federation.orders import Order
from gptfl_dist.launch.base import Progress
from gptfl_dist.run.runner import OrderFiles, Result
from gptfl_dist.weights import Layout, write_weights

__all__ = ["Fault", "MemoryCoordinatorExchange", "MemoryNetwork", "MemorySiloExchange", "ScriptedTrainer"]


class ScriptedTrainer:
    """An `OrderRunner` without torch: the script says what each order comes to.

    `script(order)` returns the update as a flat buffer (b"" for an evaluation) and the metrics, or raises TrainerError.
    """

    keeps_updates = False

    def __init__(
        self, layout: Layout, samples: int, script: Callable[[Order], tuple[bytes, Mapping[str, float]]]
    ) -> None:
        self.orders: list[Order] = []  # that were carried out, in order
        self.stops = 0  # how often it was ended
        self._layout = layout
        self._samples = samples
        self._script = script

    async def setup(self, run: str, plan: Plan, layout: Layout) -> None:
        pass

    async def run(self, order: Order, files: OrderFiles, progress: Progress) -> Result:
        self.orders.append(order)
        flat, metrics = self._script(order)
        digest = write_weights(files.update, self._layout, [flat]) if order.kind == "train" else ""
        return Result(digest, self._samples, dict(metrics))

    async def finish(self) -> None:
        pass

    async def stop(self) -> None:
        self.stops += 1

"""A silo keeps to its policy against a coordinator that changes an order and sends it again under its nonce."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
from federated import LAYOUT, START, flat, in_loop

from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.config.silo import Data, Policy, SiloFile
from gptfl_dist.config.task import Task
from gptfl_dist.errors import TrainerError
from gptfl_dist.exchange.base import Goodbye, Receipt, UpdateHeader, Welcome
from gptfl_dist.federation.orders import Order
from gptfl_dist.run.silo import Silo
from gptfl_dist.testing.exchange import ScriptedTrainer
from gptfl_dist.weights import Layout, WeightsFile, write_weights

TRAINING = LocalTraining(
    epochs=1, batch_size=8, learning_rate=0.1, momentum=0, weight_decay=0, augmentation=False, threads=1
)
ORDER = Order("train", "one nonce", "gptfl", 1, "00" * 32, 60.0, TRAINING)


class FalseCoordinator:
    """A SiloExchange behind which somebody sends these orders, each once the one before was answered."""

    def __init__(self, *orders: Order) -> None:
        self._orders = list(orders)
        self._free = asyncio.Event()
        self._free.set()
        self.answers: list[str] = []

    async def connect(self) -> Welcome:
        plan = Plan(federation="fed", seed=0, labels=["left", "right"], task=Task(), model={"name": "cnn"})
        return Welcome("run", plan, LAYOUT)

    async def ready(self) -> None:
        pass

    async def receive(self) -> Order | Goodbye:
        await self._free.wait()
        self._free.clear()
        return self._orders.pop(0) if self._orders else Goodbye(True, "finished")

    async def download(self, digest: str, layout: Layout, path: Path) -> None:
        write_weights(path, layout, [flat(START)])

    async def upload(self, header: UpdateHeader, update: WeightsFile) -> Receipt:
        self._answered("update")
        return Receipt(True, "")

    async def fail(self, nonce: str, reason: str) -> None:
        self._answered(reason)

    async def close(self) -> None:
        pass

    def _answered(self, answer: str) -> None:
        self.answers.append(answer)
        self._free.set()


@pytest.mark.parametrize("changed", [{"trained": "means"}, {"epochs": 3}], ids=["class means", "epochs"])
@pytest.mark.parametrize("fails", [True, False], ids=["failed", "answered"])
@in_loop
async def test_more_than_it_allows_is_refused_under_the_nonce_of_an_earlier_order(
    tmp_path: Path, fails: bool, changed: Mapping[str, object]
) -> None:
    def script(order: Order) -> tuple[bytes, Mapping[str, float]]:
        if fails:
            raise TrainerError("no")
        return flat(1.0), {}

    worse = dataclasses.replace(ORDER, training=TRAINING.model_copy(update=changed))
    trainer = ScriptedTrainer(LAYOUT, 1, script)
    exchange = FalseCoordinator(ORDER, worse)
    silo = SiloFile(name="a", data=Data(path=tmp_path), policy=Policy(max_epochs_per_round=2))
    await Silo(silo=silo, exchange=exchange, runner=trainer, folder=tmp_path, fresh=None).run()
    assert trainer.orders == [ORDER]
    assert [answer.split(":")[0] for answer in exchange.answers] == [
        "TrainerError" if fails else "update",
        "PolicyError",
    ]

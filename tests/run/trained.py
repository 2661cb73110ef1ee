"""Federations in one event loop whose silos train for real: federator, ledger, inbox, agents, trainers and their files.

The data are the 1,797 handwritten digits of scikit-learn, 8x8. Only the wire and the trainers' processes are missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from federated import ARM, Notes, World
from sklearn.datasets import load_digits

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.plan import Plan
from gptfl_dist.config.silo import Data, SiloFile
from gptfl_dist.federation.orders import Order
from gptfl_dist.launch.base import Progress
from gptfl_dist.learning.data import load_images
from gptfl_dist.learning.evaluate import evaluate
from gptfl_dist.learning.measures import Measures
from gptfl_dist.learning.models import build_model
from gptfl_dist.run.evaluation import RANDOM_WEIGHTS, Measured
from gptfl_dist.run.requirements import require_layout
from gptfl_dist.run.runner import OrderFiles, Result
from gptfl_dist.run.silo import Silo
from gptfl_dist.run.trainer import Trainer
from gptfl_dist.testing.exchange import MemoryNetwork, MemorySiloExchange
from gptfl_dist.weights import Layout
from gptfl_dist.weights.flat import FlatModel

Spoil = Callable[[FlatModel, Path], None]
"""What a malicious silo does to its trained model, given the received weights, before the update is taken."""


def digits(folder: Path, parts: Mapping[str, np.ndarray], test: np.ndarray) -> None:
    """Writes NAME.npz for each part of the data, given by indices, and test.npz."""
    images, labels = load_digits(return_X_y=True)
    images = (images * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    for name, chosen in {**parts, "test": test}.items():
        np.savez(folder / f"{name}.npz", images=images[chosen], labels=labels[chosen].astype(str))


class TrainerInLoop:
    """An OrderRunner with a trainer of its own in this process, which is built anew by every agent."""

    keeps_updates = False

    def __init__(self, silo: SiloFile, folder: Path, spoil: Spoil | None) -> None:
        self._silo, self._folder, self._spoil = silo, folder, spoil
        self.orders: list[Order] = []  # that were carried out
        self.told: list[dict[str, float]] = []  # the metrics of each

    async def setup(self, run: str, plan: Plan, layout: Layout) -> None:
        self.trainer = await asyncio.to_thread(Trainer, plan, self._silo, self._folder)
        require_layout(layout, self.trainer.layout)

    async def run(self, order: Order, files: OrderFiles, progress: Progress) -> Result:
        result = await asyncio.to_thread(self._carry_out, order, files)
        self.orders.append(order)
        self.told.append(result.metrics)
        return result

    def _carry_out(self, order: Order, files: OrderFiles) -> Result:
        if order.training is None:
            found = self.trainer.evaluate(files.weights, kept=files.kept.before)
        else:
            found = self.trainer.train(
                round_=order.round, settings=order.training, weights=files.weights, update=files.update,
                progress=lambda done, total: None, kept=files.kept.before, keep=files.kept.after,
                samples=files.samples,
            )  # fmt: skip
        digest = found.digest
        if self._spoil is not None and order.training is not None:
            self._spoil(self.trainer.flat, files.weights)
            digest = self.trainer.flat.save_update(files.weights, files.update)
        return Result(digest, found.samples, dict(found.metrics))

    async def finish(self) -> None:
        pass

    async def stop(self) -> None:
        pass


class TrainedWorld(World):
    """See `World`. Silos have the digits of their part; those with a `spoil` are malicious."""

    def __init__(
        self, folder: Path, parts: Mapping[str, np.ndarray], test: np.ndarray,
        spoils: Mapping[str, Spoil] | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        """`settings` are sections of the federation file."""
        digits(folder, parts, test)
        self.folder = folder
        self.network = MemoryNetwork()
        self.notes = Notes()
        self.at_work = None
        rules = {"rounds": 5, "quorum": "all", "deadline": "600s", "join_deadline": "600s"}
        self.file = FederationFile.model_validate(
            {
                "name": "digits",
                "run_folder": folder / "run",
                "labels": [str(label) for label in range(10)],
                "task": {"size": 8},
                "arms": [ARM],
                "test_data": folder / "test.npz",
                "silos": [{"name": name} for name in parts],
                **settings,
                "training": {"learning_rate": 0.2, "warm_up_rounds": 0, **settings.get("training", {})},
                "federation": {**rules, **settings.get("federation", {})},
            }
        )
        self.file.run_folder.mkdir(parents=True, exist_ok=True)
        self.plan = Plan.of(self.file)
        self._model = FlatModel(build_model(self.file.model, self.file.task, 10, seed=0))
        self._model.save(self.file.run_folder / RANDOM_WEIGHTS)
        self.layout, self.parameters = self._model.layout, self._model.parameters
        self._test = load_images(Data(path=folder / "test.npz"), self.file.task, self.file.labels)
        self.tester = self
        self.silos = {name: SiloFile(name=name, data=Data(path=folder / f"{name}.npz"), device="cpu") for name in parts}
        self._spoils = spoils or {}
        self.trainers: dict[str, Any] = dict.fromkeys(parts)
        self._running = {}

    async def test(self, weights: Path) -> Measured:
        return Measured(await asyncio.to_thread(self._measures, weights), [])

    def accuracy(self, weights: Path | None = None) -> float:
        """On the test data; of the newest model where none is named."""
        return self._measures(weights or self.model()).accuracy

    def _measures(self, weights: Path) -> Measures:
        torch.set_num_threads(1)
        self._model.load(weights)
        return evaluate(self._model.model, self._test, self.file.task, device="cpu").measures

    def join(self, *names: str) -> None:
        for name in names:
            runner = TrainerInLoop(self.silos[name], self.folder, self._spoils.get(name))
            self.trainers[name] = runner
            exchange = MemorySiloExchange(network=self.network, silo=name)
            silo = Silo(silo=self.silos[name], exchange=exchange, runner=runner, folder=self.folder / name, fresh=None)
            self._running[name] = asyncio.create_task(silo.run())

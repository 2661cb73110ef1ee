"""The coordinator's hold on its torch process (`run.evaluator`), so that it needs no torch itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.plan import Plan
from gptfl_dist.launch.trainer import TrainerProcess
from gptfl_dist.weights import Layout, WeightsFile

RANDOM_WEIGHTS = "random.safetensors"
"""The random start weights, in the run folder."""


class Evaluator:
    """The coordinator's torch process: random start weights, the model's layout, accuracy on the test data."""

    def __init__(self, process: TrainerProcess, file: FederationFile, folder: Path) -> None:
        self._process = process
        self._file = file
        self._folder = folder
        self._asking = asyncio.Lock()

    async def start(self) -> Layout:
        """The layout; starts the process, unless the random start weights lie there and nothing is to be tested.

        Raises DataError or ModelError.
        """
        random_weights = self._folder / RANDOM_WEIGHTS
        if self._file.test_data is not None or not random_weights.exists():
            await self._start_process(random_weights)
        with WeightsFile(random_weights) as file:
            return file.layout

    async def _start_process(self, random_weights: Path) -> None:
        await self._process.start()
        await self._process.ask(
            {
                "type": "setup",
                "plan": Plan.of(self._file).model_dump(mode="json"),
                "test_data": None if self._file.test_data is None else str(self._file.test_data),
                "random_weights": str(random_weights),
                "at_rest": None if self._file.at_rest is None else self._file.at_rest.model_dump(mode="json"),
            },
            "ready",
        )

    async def test(self, weights: Path) -> tuple[float, list[list[int]]] | None:
        """Accuracy and confusion (rows: true label) on the test data; None where there is none."""
        if self._file.test_data is None:
            return None
        async with self._asking:
            answer = await self._process.ask({"type": "evaluate", "weights": str(weights)}, "evaluated")
        return float(answer["accuracy"]), answer["confusion"]

    async def stop(self) -> None:
        await self._process.stop()

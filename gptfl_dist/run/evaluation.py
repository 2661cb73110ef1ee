"""Random start weights, the model's layout, accuracy on the test data: what the coordinator needs torch for.

Mostly that is done by a process of its own (`run.evaluator`), so that the coordinator stays small.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.plan import Plan
from gptfl_dist.launch.trainer import TrainerProcess
from gptfl_dist.run.threads import to_its_end
from gptfl_dist.weights import Layout, WeightsFile

if TYPE_CHECKING:
    from gptfl_dist.run.evaluator import Tester

RANDOM_WEIGHTS = "random.safetensors"
"""The random start weights, in the run folder."""


class Evaluator(Protocol):
    """Whoever does it."""

    async def start(self) -> Layout:
        """The model's layout; the random start weights lie in the run folder. Raises DataError or ModelError."""

    async def test(self, weights: Path) -> tuple[float, list[list[int]]] | None:
        """Accuracy and confusion (rows: true label) on the test data; None where there is none."""

    async def stop(self) -> None:
        """Ends what was started."""


class ProcessEvaluator:
    """An Evaluator that is a process."""

    def __init__(self, process: TrainerProcess, file: FederationFile) -> None:
        self._process = process
        self._file = file
        self._asking = asyncio.Lock()

    async def start(self) -> Layout:
        """Starts the process, unless the random start weights lie there and nothing is to be tested."""
        random_weights = self._file.run_folder / RANDOM_WEIGHTS
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
        if self._file.test_data is None:
            return None
        async with self._asking:
            answer = await self._process.ask({"type": "evaluate", "weights": str(weights)}, "evaluated")
        return float(answer["accuracy"]), answer["confusion"]

    async def stop(self) -> None:
        await self._process.stop()


class InProcessEvaluator:
    """An Evaluator in this process, in a thread."""

    def __init__(self, file: FederationFile, turn: asyncio.Lock) -> None:
        """`turn` is shared by all that use torch in this process."""
        self._file = file
        self._turn = turn
        self._tester: Tester | None = None

    async def start(self) -> Layout:
        from gptfl_dist.run.evaluator import Tester

        random_weights = self._file.run_folder / RANDOM_WEIGHTS
        async with self._turn:
            self._tester = await to_its_end(Tester, Plan.of(self._file), self._file.test_data)
            await to_its_end(self._tester.save, random_weights)
        with WeightsFile(random_weights) as file:
            return file.layout

    async def test(self, weights: Path) -> tuple[float, list[list[int]]] | None:
        if self._file.test_data is None:
            return None
        assert self._tester is not None
        async with self._turn:
            result = await to_its_end(self._tester.test, weights)
        return result.accuracy, result.confusion.tolist()

    async def stop(self) -> None:
        pass

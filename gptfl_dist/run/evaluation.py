"""Random start weights, the model's layout, measures on the test data: what the coordinator needs torch for.

Mostly that is done by a process of its own (`run.evaluator`), so that the coordinator stays small.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.plan import Plan
from gptfl_dist.launch.trainer import TrainerProcess
from gptfl_dist.learning.measures import Measures
from gptfl_dist.run.threads import to_its_end
from gptfl_dist.weights import Layout, WeightsFile

if TYPE_CHECKING:
    from gptfl_dist.run.evaluator import Tester

RANDOM_WEIGHTS = "random.safetensors"
"""The random start weights, in the run folder."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What there is to know of the model without torch. `parameters` are the names of its tensors that are no buffers;
    none where nobody is to ask for them."""

    layout: Layout
    parameters: frozenset[str]


@dataclass(frozen=True, slots=True)
class Measured:
    """How good weights are on the test data; `confusion` has a row for each true label."""

    measures: Measures
    confusion: list[list[int]]


class Evaluator(Protocol):
    """Whoever does it."""

    async def start(self) -> ModelFacts:
        """The random start weights lie in the run folder from then on. Raises DataError or ModelError."""

    async def test(self, weights: Path) -> Measured | None:
        """How good weights are on the test data; None where there is none."""

    async def stop(self) -> None:
        """Ends what was started."""


class ProcessEvaluator:
    """An Evaluator that is a process."""

    def __init__(self, process: TrainerProcess, file: FederationFile) -> None:
        self._process = process
        self._file = file
        self._asking = asyncio.Lock()

    async def start(self) -> ModelFacts:
        """Starts the process, unless the random start weights lie there and nothing is to be tested or asked."""
        random_weights, parameters = self._file.run_folder / RANDOM_WEIGHTS, frozenset[str]()
        needed = self._file.test_data is not None or self._file.federation.diversity
        if needed or not random_weights.exists():
            parameters = await self._start_process(random_weights)
        with WeightsFile(random_weights) as file:
            return ModelFacts(file.layout, parameters)

    async def _start_process(self, random_weights: Path) -> frozenset[str]:
        await self._process.start()
        ready = await self._process.ask(
            {
                "type": "setup",
                "plan": Plan.of(self._file).model_dump(mode="json"),
                "test_data": None if self._file.test_data is None else str(self._file.test_data),
                "random_weights": str(random_weights),
                "at_rest": None if self._file.at_rest is None else self._file.at_rest.model_dump(mode="json"),
            },
            "ready",
        )
        return frozenset(ready["parameters"])

    async def test(self, weights: Path) -> Measured | None:
        if self._file.test_data is None:
            return None
        async with self._asking:
            answer = await self._process.ask({"type": "evaluate", "weights": str(weights)}, "evaluated")
        return Measured(Measures(**answer["measures"]), answer["confusion"])

    async def stop(self) -> None:
        await self._process.stop()


class InProcessEvaluator:
    """An Evaluator in this process, in a thread."""

    def __init__(self, file: FederationFile, turn: asyncio.Lock) -> None:
        """`turn` is shared by all that use torch in this process."""
        self._file = file
        self._turn = turn
        self._tester: Tester | None = None

    async def start(self) -> ModelFacts:
        from gptfl_dist.run.evaluator import Tester

        random_weights = self._file.run_folder / RANDOM_WEIGHTS
        async with self._turn:
            self._tester = await to_its_end(Tester, Plan.of(self._file), self._file.test_data)
            await to_its_end(self._tester.save, random_weights)
        with WeightsFile(random_weights) as file:
            return ModelFacts(file.layout, self._tester.parameters)

    async def test(self, weights: Path) -> Measured | None:
        if self._file.test_data is None:
            return None
        assert self._tester is not None
        async with self._turn:
            result = await to_its_end(self._tester.test, weights)
        return Measured(result.measures, result.confusion.tolist())

    async def stop(self) -> None:
        pass

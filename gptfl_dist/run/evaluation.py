"""Random start weights, samples for silos, measures on the test data: what the coordinator needs torch for.

Mostly that is done by a process of its own (`run.evaluator`), so that the coordinator stays small.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.launch.folder import Message
from gptfl_dist.launch.trainer import TrainerProcess
from gptfl_dist.learning.measures import Measures
from gptfl_dist.run.synthetic import SAMPLES
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


def samples_to_make(file: FederationFile) -> Path | None:
    """Where the samples for silos are to be written; None where there are none, or they were written before."""
    path = file.run_folder / SAMPLES
    return None if file.mixing.samples == "none" or path.exists() else path


class Evaluator(Protocol):
    """Whoever does it. `notes` are on the start weights, for the operator; there are none before they are made."""

    notes: list[str]

    async def start(self) -> ModelFacts:
        """In the run folder lie from then on the random start weights, and what silos are given of the synthetic set.

        Raises DataError or ModelError.
        """

    async def test(self, weights: Path) -> Measured | None:
        """How good weights are on the test data; None where there is none."""

    async def judge(self, weights: Path) -> tuple[float, float]:
        """Accuracy and loss on the held-out synthetic data. Raises DataError where there is no synthetic set."""

    async def make_head(self, base: Path, summed: Path, made: Path) -> None:
        """Writes weights whose last layer is made of the sums of class means that lie between two others."""

    async def stop(self) -> None:
        """Ends what was started."""


class ProcessEvaluator:
    """An Evaluator that is a process."""

    def __init__(self, process: TrainerProcess, file: FederationFile, folder: Path) -> None:
        """`folder` is where the federation file lies."""
        self._process = process
        self._file = file
        self._folder = folder
        self._asking = asyncio.Lock()
        self.notes: list[str] = []

    async def start(self) -> ModelFacts:
        """Starts the process, unless all that it makes lies there and it is asked for nothing."""
        random_weights, samples = self._file.run_folder / RANDOM_WEIGHTS, samples_to_make(self._file)
        rules, parameters = self._file.federation, frozenset[str]()
        asked = self._file.test_data is not None or rules.choose_by == "synthetic" or rules.diversity
        asked |= self._file.training.first_round == "means"
        if asked or not random_weights.exists() or samples is not None:
            message: Message = {
                "type": "setup",
                "file": self._file.model_dump(mode="json"),
                "folder": str(self._folder),
                "random_weights": str(random_weights),
                **({} if samples is None else {"samples": str(samples)}),
            }
            await self._process.start()
            ready = await self._process.ask(message, "ready")
            self.notes, parameters = ready["notes"], frozenset(ready["parameters"])
        with WeightsFile(random_weights) as file:
            return ModelFacts(file.layout, parameters)

    async def test(self, weights: Path) -> Measured | None:
        if self._file.test_data is None:
            return None
        async with self._asking:
            answer = await self._process.ask({"type": "evaluate", "weights": str(weights)}, "evaluated")
        return Measured(Measures(**answer["measures"]), answer["confusion"])

    async def judge(self, weights: Path) -> tuple[float, float]:
        async with self._asking:
            answer = await self._process.ask({"type": "judge", "weights": str(weights)}, "judged")
        return float(answer["accuracy"]), float(answer["loss"])

    async def make_head(self, base: Path, summed: Path, made: Path) -> None:
        message: Message = {"type": "head", "base": str(base), "summed": str(summed), "made": str(made)}
        async with self._asking:
            await self._process.ask(message, "made")

    async def stop(self) -> None:
        await self._process.stop()


class InProcessEvaluator:
    """An Evaluator in this process, in a thread."""

    def __init__(self, file: FederationFile, folder: Path, turn: asyncio.Lock) -> None:
        """`folder` is where the federation file lies; `turn` is shared by all that use torch in this process."""
        self._file = file
        self._folder = folder
        self._turn = turn
        self._tester: Tester | None = None
        self.notes: list[str] = []

    async def start(self) -> ModelFacts:
        from gptfl_dist.run.evaluator import Tester

        random_weights, samples = self._file.run_folder / RANDOM_WEIGHTS, samples_to_make(self._file)
        async with self._turn:
            self._tester = await to_its_end(Tester, self._file, self._folder)
            self.notes = self._tester.notes
            await to_its_end(self._tester.save, random_weights)
            if samples is not None:
                await to_its_end(self._tester.save_samples, samples)
        with WeightsFile(random_weights) as file:
            return ModelFacts(file.layout, self._tester.parameters)

    async def test(self, weights: Path) -> Measured | None:
        if self._file.test_data is None:
            return None
        assert self._tester is not None
        async with self._turn:
            result = await to_its_end(self._tester.test, weights)
        return Measured(result.measures, result.confusion.tolist())

    async def judge(self, weights: Path) -> tuple[float, float]:
        assert self._tester is not None
        async with self._turn:
            result = await to_its_end(self._tester.judge, weights)
        return result.accuracy, result.loss

    async def make_head(self, base: Path, summed: Path, made: Path) -> None:
        assert self._tester is not None
        async with self._turn:
            await to_its_end(self._tester.make_head, base, summed, made)

    async def stop(self) -> None:
        pass

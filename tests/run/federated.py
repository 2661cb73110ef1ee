"""A federation in one event loop: real federator, ledger, inbox, silos and files; only torch and the wire are replaced.

A silo's update is a constant, so the weights after any round have a closed form. The numbers are chosen so that the
weighted mean over any of the silos is exact in float32, and tests compare with `==`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.silo import Data, Policy, SiloFile
from gptfl_dist.errors import TrainerError
from gptfl_dist.exchange.base import CoordinatorExchange, Goodbye
from gptfl_dist.exchange.inbox import Inbox
from gptfl_dist.federation.orders import Order
from gptfl_dist.learning.measures import Measures
from gptfl_dist.ledger.records import ArmRecord, RoundRecord
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.observe.live import Standing
from gptfl_dist.run.arms import run_arms
from gptfl_dist.run.evaluation import RANDOM_WEIGHTS, Measured, ModelFacts
from gptfl_dist.run.federate import Federator
from gptfl_dist.run.freshness import Freshness
from gptfl_dist.run.silo import Silo
from gptfl_dist.testing import clock
from gptfl_dist.testing.exchange import MemoryCoordinatorExchange, MemoryNetwork, MemorySiloExchange, ScriptedTrainer
from gptfl_dist.weights import Layout, WeightsFile, write_weights

LAYOUT = Layout.of([("w", (4,), "F32"), ("seen", (1,), "I64")])
START = 0.5  # every number of the start weights
STEPS = {"a": 105.0, "b": -210.0, "c": 420.0}  # what each silo adds in a round
SAMPLES = {"a": 1, "b": 3, "c": 4}
ARM = "fedavg_random"
ROUNDS = 3
DEADLINE, JOIN_DEADLINE = 1000.0, 5000.0  # seconds, of a clock that is put forward

Metrics = Mapping[str, float]


def flat(value: float, seen: int = 0) -> bytes:
    """A flat buffer with one number everywhere."""
    return np.array([seen], "<i8").tobytes() + np.full(4, value, "<f4").tobytes()


def value_of(path: Path) -> float:
    """The one number that weights hold everywhere."""
    with WeightsFile(path) as weights:
        numbers = np.frombuffer(weights.read(8, weights.nbytes - 8), "<f4")
    assert len(set(numbers)) == 1
    return float(numbers[0])


def mean_step(silos: Iterable[str], samples: Mapping[str, int] = SAMPLES) -> float:
    """What one round adds to the weights if these silos count."""
    counted = list(silos)
    return sum(samples[silo] * STEPS[silo] for silo in counted) / sum(samples[silo] for silo in counted)


def measured(accuracy: float) -> Measured:
    """Of that accuracy, and with the other measures of no interest."""
    return Measured(Measures(accuracy, macro_f1=0.5, calibration_error=0.25, loss=2.0), [[1, 0], [0, 1]])


class Tester:
    """Stands in for the torch process: the accuracy of weights, on test data and on held-out synthetic data, is a
    function of their number."""

    def __init__(
        self, accuracy: Callable[[float], float] | None = None, judged: Callable[[float], float] | None = None
    ) -> None:
        self._accuracy = accuracy or (lambda value: 0.5)
        self._judged = judged or (lambda value: 0.5)
        self.judgements: list[float] = []  # the numbers of the weights that were judged

    async def test(self, weights: Path) -> Measured:
        return measured(self._accuracy(value_of(weights)))

    async def judge(self, weights: Path) -> tuple[float, float]:
        self.judgements.append(value_of(weights))
        return self._judged(self.judgements[-1]), 1.0


class Notes:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.closed: list[tuple[str, int]] = []
        self.done: list[str] = []  # the silos of which nothing more is expected, one by one
        self.left: dict[str, int] = {}  # rounds that arms were ended before
        self.standing: Standing | None = None
        self.missing: list[tuple[str, ...]] = []  # each set of silos that was waited for

    def round_closed(self, arm: str, rounds: int, record: RoundRecord, test_accuracy: float | None) -> None:
        self.closed.append((arm, record.round))

    def arm_stopped(self, arm: str, rounds_left: int) -> None:
        self.left[arm] = rounds_left

    def stands(self, standing: Standing) -> None:
        self.standing = standing

    def heard(self, silo: str) -> None:
        pass

    def silo_progress(self, silo: str, done: int, total: int, note: str) -> None:
        pass

    def silo_done(self, silo: str) -> None:
        self.done.append(silo)

    def waiting_for(self, silos: tuple[str, ...]) -> None:
        self.missing.append(silos)

    def note(self, text: str) -> None:
        self.texts.append(text)


class World:
    """One run folder, a network, and the silos on it. Coordinators come and go."""

    layout = LAYOUT
    parameters = frozenset({"w"})
    ahead = True  # whether coordinators begin with the next weights before all updates are there

    def __init__(
        self,
        folder: Path,
        *,
        silos: Mapping[str, int] = SAMPLES,
        script: Callable[[str, Order], Metrics] = lambda silo, order: {"accuracy": 0.5},
        step: Callable[[str, Order], float] = lambda silo, order: STEPS[silo],
        accuracy: Callable[[float], float] | None = None,
        judged: Callable[[float], float] | None = None,
        released: list[str] | None = None,
        rates: list[float] | None = None,
        tuning: int = 1,
        strategy: Mapping[str, object] | None = None,
        compression: Mapping[str, object] | None = None,
        **rules: Any,
    ) -> None:
        """`script` gives a silo's metrics or raises TrainerError; `released` are the metrics that may leave a silo."""
        self.folder = folder
        self.network = MemoryNetwork()
        self.notes = Notes()
        self.at_work: Ledger | None = None  # of the coordinator that runs
        self.file = FederationFile.model_validate(
            {
                "name": "fed",
                "run_folder": folder / "run",
                "labels": ["left", "right"],
                "arms": [ARM],
                "training": {"learning_rate": rates or 0.25, "warm_up_rounds": 0},
                "tuning": {"rounds": tuning},
                "strategy": strategy or {},
                "compression": compression or {},
                "federation": {
                    "rounds": ROUNDS,
                    "quorum": "all",
                    "deadline": f"{DEADLINE:g}s",
                    "join_deadline": f"{JOIN_DEADLINE:g}s",
                    **rules,
                },
                "test_data": folder / "test.npz",
                "silos": [{"name": name, "max_samples": 100} for name in silos],
            }
        )
        self.file.run_folder.mkdir(parents=True, exist_ok=True)
        write_weights(self.file.run_folder / RANDOM_WEIGHTS, LAYOUT, [flat(START)])
        self.tester = Tester(accuracy, judged)
        self.policy = Policy() if released is None else Policy(metrics=released)
        self.trainers = {
            name: ScriptedTrainer(LAYOUT, samples, functools.partial(self._carry_out, name))
            for name, samples in silos.items()
        }
        self._script, self._step = script, step
        self._running: dict[str, asyncio.Task[Goodbye]] = {}

    def _carry_out(self, silo: str, order: Order) -> tuple[bytes, Metrics]:
        metrics = self._script(silo, order)
        return (flat(self._step(silo, order), seen=order.round) if order.kind == "train" else b""), metrics

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def kill(self, silo: str) -> None:
        """Ends a silo's agent at this instant; `join` starts it anew on the same files."""
        task = self._running.pop(silo)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def join(self, *names: str) -> None:
        """Starts silos, in this order."""
        for name in names:
            exchange = MemorySiloExchange(network=self.network, silo=name)
            silo = SiloFile(name=name, data=Data(path=self.folder / "data"), policy=self.policy)
            home = self.folder / name
            fresh = Freshness(home, self.file.name, lambda: b"")
            runner = Silo(silo=silo, exchange=exchange, runner=self.trainers[name], folder=home, fresh=fresh)
            self._running[name] = asyncio.create_task(runner.run())

    def ledger(self) -> Ledger:
        return Ledger(self.file.run_folder, "request")

    def make_exchange(self, inbox: Inbox) -> MemoryCoordinatorExchange:
        return MemoryCoordinatorExchange(network=self.network, silos=tuple(self.trainers), inbox=inbox)

    @contextlib.asynccontextmanager
    async def coordinator(
        self, ledger: Ledger | None = None, make_exchange: Callable[[Inbox], CoordinatorExchange] | None = None
    ) -> AsyncIterator[Federator]:
        """A federator that has started and is stopped in the end."""
        ledger = self.at_work = ledger or self.ledger()
        federator = Federator(
            file=self.file,
            model=ModelFacts(self.layout, self.parameters),
            ledger=ledger,
            evaluator=self.tester,  # type: ignore[arg-type]  # it tests, and starts no process
            make_exchange=make_exchange or self.make_exchange,
            watcher=self.notes,
            ahead=self.ahead,
        )
        goodbye = Goodbye(False, "the coordinator stopped")
        try:
            await federator.start()
            yield federator
            goodbye = Goodbye(True, "finished")
        finally:
            await federator.stop(goodbye)
            self.at_work = None
            ledger.close()

    async def federate(self) -> ArmRecord:
        """A whole run with all silos that are not there yet."""
        self.join(*(name for name in self.trainers if name not in self._running))
        return await self.federate_with()

    async def federate_with(self) -> ArmRecord:
        """A whole run with the silos that join by themselves."""
        async with self.coordinator() as federator:
            await run_arms(federator)
        return self.record()

    def record(self, arm: str = ARM) -> ArmRecord:
        with contextlib.closing(self.ledger()) as ledger:
            record = ledger.arm(arm)
        assert record is not None
        return record

    def model(self, name: str = f"{ARM}-final") -> Path:
        return self.file.run_folder / "models" / f"{name}.safetensors"

    def value(self) -> float:
        """The number in the final weights."""
        return value_of(self.model())

    def trained(self, silo: str) -> list[tuple[str, int]]:
        """(arm, round) of each training that a silo carried out."""
        return [(order.arm, order.round) for order in self.trainers[silo].orders if order.kind == "train"]

    async def until(self, happened: Callable[[], bool]) -> None:
        """Waits for something that the coordinator or a silo does by itself."""
        started = time.monotonic()
        while not happened():
            assert time.monotonic() - started < 30, "waited in vain"
            await asyncio.sleep(0.001)

    def committed(self, round_: int, arm: str = ARM) -> set[str]:
        """The silos whose update of a round is in the ledger of the coordinator at work."""
        record = None if self.at_work is None else self.at_work.arm(arm)
        rounds = () if record is None else record.rounds
        return {order.silo for r in rounds if r.round == round_ for order in r.orders if order.digest is not None}


def failing(who: str, *rounds: int) -> Callable[[str, Order], Metrics]:
    """A silo whose training fails in these rounds, whenever it is asked."""

    def script(silo: str, order: Order) -> Metrics:
        if silo == who and order.kind == "train" and order.round in rounds:
            raise TrainerError("out of memory")
        return {"accuracy": 0.5}

    return script


def answered(record: ArmRecord, round_: int) -> set[str]:
    (found,) = [r for r in record.rounds if r.round == round_]
    return {order.silo for order in found.orders if order.digest is not None}


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs an async test in a loop whose clock can be put forward."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        clock.run(test(**fixtures))

    return run

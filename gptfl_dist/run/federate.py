"""The coordinator at work: the arms of a federation file, one after the other, over one exchange.

The state machine of `federation.coordinator` decides, this module does: it gives orders, aggregates spools into the
next weights, has them tested, and writes every step to the ledger before it goes on. Started again on the same run
folder, it goes on in the round that it was in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gptfl_dist.aggregation.mean import weighted_mean
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.errors import FederationError
from gptfl_dist.exchange.base import (
    Answered,
    CoordinatorExchange,
    ExchangeEvent,
    ExchangeFailed,
    Goodbye,
    OrderFailed,
    SiloJoined,
    SiloLeft,
    Traffic,
    Welcome,
)
from gptfl_dist.exchange.inbox import Inbox
from gptfl_dist.federation import coordinator as machine
from gptfl_dist.federation.orders import Kind, Order, Report
from gptfl_dist.files import storage_error
from gptfl_dist.launch.trainer import TrainerProcess
from gptfl_dist.ledger.store import ArmRecord, Ledger, RoundRecord
from gptfl_dist.weights import BLOCK, Layout, WeightsFile

_log = logging.getLogger(__name__)

RANDOM_WEIGHTS = "random.safetensors"
PRETRAINED_WEIGHTS = "pretrained.safetensors"


class RoundFailed(FederationError):
    """Too few of the silos that were called on could train, as where the learning rate lets the loss diverge."""


class Watcher(Protocol):
    """What listens to a federation. It decides nothing."""

    def round_closed(self, arm: str, rounds: int, record: RoundRecord, test_accuracy: float | None) -> None:
        """A round was aggregated, and its weights tested where there is test data."""

    def note(self, text: str) -> None:
        """Something that the operator should read."""


class Evaluator:
    """The coordinator's torch process: random start weights, the model's layout, accuracy on the test data."""

    def __init__(self, process: TrainerProcess, file: FederationFile, folder: Path) -> None:
        self._process = process
        self._file = file
        self._folder = folder
        self._asking = asyncio.Lock()

    async def start(self) -> Layout:
        """Starts the process, which writes the random start weights; returns the layout.

        Raises DataError or ModelError.
        """
        random_weights = self._folder / RANDOM_WEIGHTS
        await self._process.start()
        await self._process.ask(
            {
                "type": "setup",
                "plan": Plan.of(self._file).model_dump(mode="json"),
                "test_data": None if self._file.test_data is None else str(self._file.test_data),
                "random_weights": str(random_weights),
            },
            "ready",
        )
        with WeightsFile(random_weights) as file:
            return file.layout

    async def test(self, weights: Path) -> tuple[float, list[list[int]]] | None:
        """Accuracy and confusion (rows: true label) on the test data; None where there is none."""
        if self._file.test_data is None:
            return None
        async with self._asking:
            answer = await self._process.ask({"type": "evaluate", "weights": str(weights)}, "evaluated")
        return float(answer["accuracy"]), answer["confusion"]

    async def stop(self) -> None:
        await self._process.stop()


@dataclass(frozen=True, slots=True)
class ArmPlan:
    """One federated training: a main arm, or a short trial of one learning rate."""

    name: str
    start: str
    learning_rate: float
    rounds: int
    tested: bool


def rounds_planned(file: FederationFile) -> int:
    """Training rounds of all arms and tuning trials."""
    arms = sum(arm != "synthetic_only" for arm in file.arms)
    rates = len(file.training.learning_rates)
    return arms * (file.federation.rounds + (rates * file.tuning.rounds if rates > 1 else 0))


def trial_name(arm: str, rate: float) -> str:
    """The name under which the ledger keeps a tuning trial."""
    return f"tuning/{arm}/{rate:g}"


class Federator:
    """Runs the arms. Made for one run; `exchange` is open from `start` to `stop`."""

    def __init__(
        self, *, file: FederationFile, layout: Layout, ledger: Ledger, evaluator: Evaluator,
        make_exchange: Callable[[Inbox], CoordinatorExchange], watcher: Watcher,
    ) -> None:  # fmt: skip
        self._file = file
        self._layout = layout
        self._ledger = ledger
        self._evaluator = evaluator
        self._watcher = watcher
        self._silos = tuple(sorted(entry.name for entry in file.silos))
        self._inbox = Inbox(
            folder=ledger.folder / "spools",
            layout=layout,
            max_samples={entry.name: entry.max_samples for entry in file.silos},
            commit=self._commit,
        )
        self.exchange = make_exchange(self._inbox)
        self._connected: set[str] = set()
        self._queue: asyncio.Queue[ExchangeEvent | machine.Event | BaseException] = asyncio.Queue()
        self._pump: asyncio.Task[None] | None = None
        self._tests: set[asyncio.Task[None]] = set()
        self._tested_now: set[str] = set()  # digests that a test still reads

    async def start(self) -> None:
        """Opens the exchange. Raises LaunchError."""
        run = self._ledger.fact("run") or secrets.token_hex(8)
        self._ledger.set_fact("run", run)
        self._ledger.set_fact("transport", self.exchange.transport)
        await self.exchange.open(Welcome(run, Plan.of(self._file), self._layout))
        self._pump = asyncio.create_task(self._pump_events())

    async def stop(self, goodbye: Goodbye) -> None:
        """Says goodbye and ends the exchange."""
        for task in self._tests:
            task.cancel()
        if self._pump is not None:
            self._pump.cancel()
        await self.exchange.close(goodbye)
        self._inbox.close()

    def fail(self, error: BaseException) -> None:
        """Ends the arm in progress with this error. To be called from the event loop."""
        self._queue.put_nowait(error)

    async def run(self) -> None:
        """All federated arms of the file. Raises FederationError where one cannot go on."""
        starts = {"fedavg_random": RANDOM_WEIGHTS, "gptfl": PRETRAINED_WEIGHTS}
        for arm, file_name in starts.items():
            if arm not in self._file.arms:
                continue
            with WeightsFile(self._ledger.folder / file_name) as weights:
                start = self._ledger.add_weights(self._layout, _blocks(weights))
            with self._timed(f"tuning {arm}"):
                rate = await self._choose_rate(arm, start)
            with self._timed(arm):
                await self._run_arm(ArmPlan(arm, start, rate, self._file.federation.rounds, tested=True))
                record = self._record(arm)
                assert record.best_round is not None
                for name, digest in ((arm, record.weights_of(record.best_round)), (f"{arm}-final", record.final)):
                    _publish(self._ledger.weights_path(digest), self._ledger.folder / "models" / f"{name}.safetensors")

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._ledger.add_seconds(stage, time.monotonic() - started)

    async def _choose_rate(self, arm: str, start: str) -> float:
        """The rate of the grid whose short trial ends best on the silos' validation data."""
        rates = self._file.training.learning_rates
        if len(rates) == 1:
            return rates[0]
        scores: dict[float, tuple[float, float]] = {}
        for rate in rates:
            plan = ArmPlan(trial_name(arm, rate), start, rate, self._file.tuning.rounds, tested=False)
            try:
                await self._run_arm(plan)
            except RoundFailed:
                self._ledger.finish_arm(plan.name, 0)
            if not self._record(plan.name).completed:
                self._watcher.note(f"{arm}: learning rate {rate:g} is out: its trial failed")
                continue
            last = self._record(plan.name).rounds[-1]
            accuracy, loss = last.mean_metric("accuracy"), last.mean_metric("loss")
            if accuracy is None:
                raise FederationError(
                    "the learning rate cannot be tuned: no silo reported an accuracy on its validation data",
                    hint="give training.learning_rate one value, or let policy.metrics of the silos release accuracy",
                )
            scores[rate] = (accuracy, -(loss or 0.0))
        if not scores:
            raise FederationError(
                f"{arm}: no learning rate of the grid could be trained with",
                hint="give training.learning_rate smaller values; the silos' failures stand above",
            )
        best = max(scores, key=lambda rate: scores[rate])
        told = ", ".join(f"{rate:g}: {100 * accuracy:.1f} %" for rate, (accuracy, _) in scores.items())
        self._watcher.note(f"{arm}: learning rate {best:g} chosen on validation data ({told})")
        return best

    def _record(self, arm: str) -> ArmRecord:
        record = self._ledger.arm(arm)
        assert record is not None
        return record

    async def _run_arm(self, plan: ArmPlan) -> None:
        """From where the ledger says that the arm is, to its end."""
        self._ledger.begin_arm(plan.name, plan.learning_rate, plan.start)
        record = self._record(plan.name)
        if record.finished:
            return
        arm = _ArmRun(plan, self._file, self._silos)
        unfinished = next((r for r in record.rounds if r.kind == "train" and r.weights is None), None)
        try:
            self._catch_up_with_tests(plan, record)
            if unfinished is not None:
                committed = self._take_over(arm, unfinished)
                commands = arm.machine.resume(self._connected, unfinished.round, unfinished.cohort, committed)
            else:
                commands = arm.machine.begin(self._connected, record.finished_rounds)
            while True:
                for command in commands:
                    await self._do(arm, command)
                if arm.machine.state == "done":
                    break
                event = self._translate(arm, await self._queue.get())
                commands = [] if event is None else arm.machine.handle(event)
            if self._tests:
                await asyncio.gather(*self._tests)
        finally:
            arm.close()
        best = _best_round(self._record(plan.name))
        self._ledger.finish_arm(plan.name, best)
        self._drop_old_weights()

    def _catch_up_with_tests(self, plan: ArmPlan, record: ArmRecord) -> None:
        """Tests the start weights, and those that an interrupted run had not come to test."""
        if not plan.tested or self._file.test_data is None:
            return
        if self._ledger.fact(f"start_accuracy/{plan.name}") is None:
            self._test(plan, 0, plan.start, None)
        for closed in record.rounds:
            if closed.weights is not None and closed.test_accuracy is None:
                self._test(plan, closed.round, closed.weights, closed)

    def _take_over(self, arm: _ArmRun, interrupted: RoundRecord) -> list[str]:
        """Expects what an interrupted round still owes, under its old nonces. Returns who has delivered already."""
        arm.open_round(interrupted.round, "train", interrupted.base, {o.silo: o.nonce for o in interrupted.orders})
        for record in interrupted.orders:
            if record.digest is None:
                continue
            if self._inbox.expect_committed(record.silo, arm.order_for(record.silo), record.digest):
                arm.taken_over.add(record.silo)
            else:
                self._watcher.note(f"the committed update of {record.silo} is damaged on disk and is asked for again")
        return sorted(arm.taken_over)

    async def _do(self, arm: _ArmRun, command: machine.Command) -> None:
        plan, ledger = arm.plan, self._ledger
        if isinstance(command, machine.StartRound):
            base = self._record(plan.name).weights_of(command.round - 1)
            if arm.round != command.round:
                nonces = {silo: secrets.token_hex(16) for silo in command.cohort}
                ledger.open_round(plan.name, command.round, command.kind, base, command.cohort, nonces)
                arm.open_round(command.round, command.kind, base, nonces)
            for silo in set(command.cohort) - arm.taken_over:
                self._inbox.expect(silo, arm.order_for(silo))
            arm.begin_counting(self.exchange.traffic)
            arm.hold(WeightsFile(ledger.weights_path(base)))
            await self.exchange.publish(base, arm.weights)
        elif isinstance(command, machine.Call):
            await self.exchange.send(command.silo, arm.order_for(command.silo))
        elif isinstance(command, machine.Recall):
            self._inbox.withdraw(command.silo)
            ledger.fail(plan.name, command.round, command.silo, command.reason)
            self._watcher.note(f"{plan.name}, round {command.round}: {command.silo} recalled: {command.reason}")
            await self.exchange.recall(command.silo, arm.nonces[command.silo], command.reason)
        elif isinstance(command, machine.SetDeadline):
            event = machine.DeadlinePassed(command.round, command.state)
            arm.deadlines.append(asyncio.get_running_loop().call_later(command.seconds, self._queue.put_nowait, event))
        elif isinstance(command, machine.Aggregate):
            record = self._record(plan.name).rounds[-1]
            digest = await asyncio.to_thread(self._aggregate, arm, record, command.silos)
            seconds, down, up = arm.spent(self.exchange.traffic)
            ledger.close_round(plan.name, command.round, digest, seconds, down, up)
            self._test(plan, command.round, digest, self._record(plan.name).rounds[-1])
            self._drop_old_weights()
            self._queue.put_nowait(machine.Aggregated(command.round))
        elif isinstance(command, machine.Finish):
            seconds, down, up = arm.spent(self.exchange.traffic)
            ledger.close_round(plan.name, arm.round, None, seconds, down, up)
        else:
            kind = RoundFailed if command.state == "train" else FederationError
            raise kind(
                f"arm {plan.name}, {command.reason}",
                hint="look at the silos' logs; the same command goes on from this round once they are back",
            )

    def _aggregate(self, arm: _ArmRun, record: RoundRecord, silos: tuple[str, ...]) -> str:
        samples = {order.silo: order.samples for order in record.orders if order.samples is not None}
        updates = self._inbox.updates(silos)
        rate = self._file.federation.server_learning_rate
        return self._ledger.add_weights(self._layout, weighted_mean(self._layout, arm.weights, updates, samples, rate))

    def _commit(self, silo: str, order: Order, report: Report, digest: str) -> None:
        self._ledger.commit(order.arm, order.round, silo, report.samples, report.metrics, digest)

    def _translate(self, arm: _ArmRun, event: ExchangeEvent | machine.Event | BaseException) -> machine.Event | None:
        """What an event of the wire means in this arm's round."""
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, ExchangeFailed):
            raise event.error
        if isinstance(event, SiloJoined):
            self._connected.add(event.silo)
            return machine.Joined(event.silo)
        if isinstance(event, SiloLeft):
            self._connected.discard(event.silo)
            _log.warning("silo %s left", event.silo)
            return machine.Left(event.silo)
        if isinstance(event, Answered | OrderFailed):
            if arm.nonces.get(event.silo) != event.nonce:
                return None
            if isinstance(event, Answered):
                return machine.Delivered(event.silo, arm.round)
            self._ledger.fail(arm.plan.name, arm.round, event.silo, event.reason)
            self._watcher.note(f"{arm.plan.name}, round {arm.round}: {event.silo} failed: {event.reason}")
            return machine.Failed(event.silo, arm.round, event.reason)
        if isinstance(event, machine.DeadlinePassed | machine.Aggregated):
            return event
        return None

    async def _pump_events(self) -> None:
        while True:
            self._queue.put_nowait(await self.exchange.events.get())

    def _test(self, plan: ArmPlan, round_: int, digest: str, record: RoundRecord | None) -> None:
        """Tests weights beside the next round's training. Test data choose nothing: see `_best_round`."""

        async def test() -> None:
            try:
                result = await self._evaluator.test(self._ledger.weights_path(digest)) if plan.tested else None
            finally:
                self._tested_now.discard(digest)
            accuracy = None if result is None else result[0]
            if accuracy is not None and record is None:
                self._ledger.set_fact(f"start_accuracy/{plan.name}", str(accuracy))
            elif accuracy is not None:
                self._ledger.note_test_accuracy(plan.name, round_, accuracy)
            if record is not None:
                self._watcher.round_closed(plan.name, plan.rounds, record, accuracy)

        def done(task: asyncio.Task[None]) -> None:
            self._tests.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._queue.put_nowait(error)

        self._tested_now.add(digest)
        task = asyncio.create_task(test())
        self._tests.add(task)
        task.add_done_callback(done)

    def _drop_old_weights(self) -> None:
        """Keeps of every arm the start, the best so far, the newest, and what is being tested."""
        keep = set(self._tested_now)
        for name in self._ledger.arms():
            record = self._record(name)
            keep |= {record.start, record.final, record.weights_of(_best_round(record))}
        self._ledger.drop_weights_except(keep)


class _ArmRun:
    """What the federator keeps in memory of the arm in progress."""

    def __init__(self, plan: ArmPlan, file: FederationFile, silos: tuple[str, ...]) -> None:
        rules = file.federation
        cohort = len(silos) if rules.cohort == "all" else rules.cohort
        self.plan = plan
        self.machine = machine.Coordinator(
            machine.Rules(
                arm=plan.name,
                seed=file.seed,
                silos=silos,
                rounds=plan.rounds,
                cohort=cohort,
                quorum={"all": cohort, "majority": cohort // 2 + 1}.get(str(rules.quorum)) or int(rules.quorum),
                deadline=rules.deadline,
                join_deadline=rules.join_deadline,
            )
        )
        self.round = 0
        self.nonces: dict[str, str] = {}
        self.taken_over: set[str] = set()  # who had delivered before the coordinator was started again
        self.deadlines: list[asyncio.TimerHandle] = []
        self._kind: Kind = "train"
        self._base = ""
        self._weights: WeightsFile | None = None
        self._began = (0.0, 0, 0)
        self._seconds = rules.deadline
        self._training = LocalTraining.of(file, plan.learning_rate)

    @property
    def weights(self) -> WeightsFile:
        """The weights that the round starts from."""
        assert self._weights is not None
        return self._weights

    def open_round(self, round_: int, kind: Kind, base: str, nonces: Mapping[str, str]) -> None:
        self.round, self._kind, self._base = round_, kind, base
        self.nonces, self.taken_over = dict(nonces), set()

    def hold(self, weights: WeightsFile) -> None:
        """Keeps the round's weights open in place of the last round's."""
        if self._weights is not None:
            self._weights.close()
        self._weights = weights

    def order_for(self, silo: str) -> Order:
        training = self._training if self._kind == "train" else None
        return Order(self._kind, self.nonces[silo], self.plan.name, self.round, self._base, self._seconds, training)

    def begin_counting(self, traffic: Traffic) -> None:
        self._began = (time.monotonic(), traffic.down, traffic.up)

    def spent(self, traffic: Traffic) -> tuple[float, int, int]:
        """Seconds, bytes down and bytes up since the round began."""
        began, down, up = self._began
        return time.monotonic() - began, traffic.down - down, traffic.up - up

    def close(self) -> None:
        for deadline in self.deadlines:
            deadline.cancel()
        if self._weights is not None:
            self._weights.close()


def validation_of(record: ArmRecord, round_: int) -> tuple[float, float] | None:
    """(accuracy, minus loss) on the silos' validation data of the weights after a round; None where none was told.

    The silos that were called on in the following round measured it.
    """
    following = next((r for r in record.rounds if r.round == round_ + 1), None)
    accuracy = None if following is None else following.mean_metric("accuracy")
    if following is None or accuracy is None:
        return None
    return accuracy, -(following.mean_metric("loss") or 0.0)


def _best_round(record: ArmRecord) -> int:
    """The round whose weights do best on the silos' validation data; the last where nothing was told."""
    scores = {r: score for r in range(record.finished_rounds + 1) if (score := validation_of(record, r)) is not None}
    return max(scores, key=lambda r: scores[r]) if scores else record.finished_rounds


def _blocks(weights: WeightsFile) -> Iterator[bytes]:
    for offset in range(0, weights.nbytes, BLOCK):
        yield weights.read(offset, min(BLOCK, weights.nbytes - offset))


def _publish(source: Path, target: Path) -> None:
    """Copies a model to where people look for it, whole or not at all."""
    target.parent.mkdir(exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, part)
        part.replace(target)
    except OSError as error:
        raise storage_error(error, target) from None

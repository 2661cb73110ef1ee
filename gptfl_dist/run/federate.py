"""The coordinator at work: the rounds of an arm, over an exchange that is there for all of them.

The state machine of `federation.coordinator` decides, this module does: it gives orders, has the next weights made of
spools (`run.next_weights`) and looked after (`run.closed_rounds`), and writes every step to the ledger before it goes
on. Started again on the same run folder, it goes on in the round that it was in. It hears by `run.listening`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Mapping

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.plan import Plan
from gptfl_dist.errors import FederationError, RunAborted
from gptfl_dist.exchange.base import (
    Answered,
    CoordinatorExchange,
    ExchangeEvent,
    ExchangeFailed,
    Goodbye,
    OrderFailed,
    Reducing,
    SiloBarred,
    SiloConnected,
    SiloJoined,
    SiloLeft,
    SiloProgress,
    Welcome,
)
from gptfl_dist.exchange.inbox import Inbox
from gptfl_dist.federation import steps
from gptfl_dist.federation.freshness import ROLLBACK
from gptfl_dist.federation.orders import RECALLED, Kind, Order, Report
from gptfl_dist.ledger.records import ArmRecord
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.observe.live import Standing
from gptfl_dist.run.aggregate import state_of
from gptfl_dist.run.arm import ArmPlan, ArmRun, best_round
from gptfl_dist.run.closed_rounds import ClosedRounds
from gptfl_dist.run.epoch import epoch_of
from gptfl_dist.run.evaluation import Evaluator, ModelFacts
from gptfl_dist.run.handout import HandOut
from gptfl_dist.run.listening import Listening
from gptfl_dist.run.next_weights import NextWeights
from gptfl_dist.run.presence import Presence
from gptfl_dist.run.synthetic import open_samples
from gptfl_dist.run.watcher import Watcher
from gptfl_dist.weights import Codec, WeightsFile
from gptfl_dist.weights.file import blocks


class RoundFailed(FederationError):
    """Too few of the silos that were called on could train, as where the learning rate lets the loss diverge."""


class Federator:
    """Runs arms (`run_arms` says which). Made for one run; `exchange` is open from `start` to `stop`."""

    def __init__(
        self, *, file: FederationFile, model: ModelFacts, ledger: Ledger, evaluator: Evaluator,
        make_exchange: Callable[[Inbox], CoordinatorExchange], watcher: Watcher, ahead: bool = True,
    ) -> None:  # fmt: skip
        """`ahead`: see `NextWeights`."""
        self.file = file
        self.layout = layout = model.layout
        self.ledger = ledger
        self._evaluator = evaluator
        self.watcher = watcher
        self._silos = tuple(sorted(entry.name for entry in file.silos))
        down = Codec(file.compression.down)
        self._hand_out = HandOut(ledger.folder / "handed-out", ledger.weights_path, layout, down, file.strategy)
        self._inbox = Inbox(
            folder=ledger.folder / "spools",
            layout=self._hand_out.layout,
            codec=Codec(file.compression.up, file.compression.top_share),
            max_samples={entry.name: entry.max_samples for entry in file.silos},
            commit=self._commit,
            max_norm=file.federation.max_update_norm,
            durable=ledger.durable,
            announced=lambda: self._next.begin(),
        )
        self._next = NextWeights(file, layout, model.parameters, ledger, self._inbox, ahead=ahead)
        self.exchange = make_exchange(self._inbox)
        self._reducing = self.exchange if isinstance(self.exchange, Reducing) else None
        self._samples: dict[str, WeightsFile] = {}  # synthetic ones that silos are given, by digest: one file, or none
        self._presence = Presence(self._silos, watcher)
        self._closed = ClosedRounds(file, ledger, evaluator, watcher, self.fail)
        self._epoch = epoch_of(ledger, file)
        self._assembled = False  # whether all silos were waited for, once in this process
        self._queue: asyncio.Queue[ExchangeEvent | steps.Event | BaseException] = asyncio.Queue()
        self._listening = Listening(self.exchange, ledger, watcher, self._queue.put_nowait)
        self._said_paused = False

    async def start(self) -> None:
        """Opens the exchange. Raises LaunchError."""
        run = self.ledger.fact("run") or secrets.token_hex(8)
        self.ledger.set_fact("run", run)
        self.ledger.set_fact("transport", self.exchange.transport)
        samples = None
        if self.file.mixing.samples != "none":
            opened, samples = open_samples(self.file, self.ledger)
            self._samples[samples.digest] = opened
        plan = Plan.of(self.file, samples)
        await self.exchange.open(Welcome(run, plan, self._hand_out.layout, self._epoch))
        self._listening.start()

    async def stop(self, goodbye: Goodbye) -> None:
        """Says goodbye and ends the exchange."""
        self._closed.stop()
        self._listening.stop()
        await self.exchange.close(goodbye)
        self._listening.note_the_rest()
        self._inbox.close()
        for samples in self._samples.values():
            samples.close()

    def fail(self, error: BaseException) -> None:
        """Ends the arm in progress with this error. To be called from the event loop."""
        self._queue.put_nowait(error)

    async def run_arm(self, plan: ArmPlan) -> None:
        """From where the ledger says that the arm is, to its end. Raises FederationError where it cannot go on."""
        self.ledger.begin_arm(plan.name, plan.learning_rate, plan.start)
        record = self.ledger.begun_arm(plan.name)
        if record.finished:
            return
        arm = ArmRun(plan, self.file, self._silos, assembled=self._assembled, epoch=self._epoch.number)
        unfinished = next((r for r in record.rounds if r.kind == "train" and r.weights is None), None)
        if self._listening.paused:
            arm.machine.handle(steps.Paused())
        arm.machine.bar(self._presence.barred)
        # No silo could start from damaged weights, and what this process writes later it need not doubt.
        await asyncio.to_thread(self.ledger.require_weights, record.final)
        await asyncio.to_thread(self.ledger.require_state, record.final)
        try:
            self._closed.catch_up_with_tests(plan, record)
            record = await self._closed.judged(plan)
            delivered = await self._take_over(arm, record)
            owed = {silo: order.round for silo, order in arm.orders.items() if silo not in delivered}
            if unfinished is not None:
                self.watcher.note(f"going on in round {unfinished.round} of {plan.name}")
                given = await self._handed_out(unfinished.round, unfinished.base)
                arm.open_round(unfinished.round, unfinished.base, given, unfinished.cohort)
                arm.spent_before = (unfinished.seconds or 0.0, unfinished.bytes_down or 0, unfinished.bytes_up or 0)
                failed = {order.silo: order.failure for order in unfinished.orders if order.failure is not None}
                commands = arm.machine.resume(
                    self._presence.connected, unfinished.round, unfinished.cohort, owed, delivered, failed
                )
            else:
                last = self._closed.stops(plan, record)
                commands = arm.machine.begin(
                    self._presence.connected, record.finished_rounds, owed, delivered, last=last
                )
            if owed:
                await self._publish(arm)
            while True:
                for command in commands:
                    await self._do(arm, command)
                self._tell_where_it_stands(arm)
                if arm.machine.state == "done":
                    break
                commands = []
                for event in self._translate(arm, await self._queue.get()):
                    commands += arm.machine.handle(event)
            await self._closed.tested()
        except RunAborted as error:
            for silo, round_ in sorted(arm.machine.owed.items()):
                if self._inbox.withdraw(silo):
                    await self._do(arm, steps.Recall(silo, round_, error.message))
            raise
        finally:
            await self._next.stop()
            self._note_spent(arm)
            arm.close()
        best = best_round(self.ledger.begun_arm(plan.name))
        self.ledger.finish_arm(plan.name, best)
        self._closed.drop_old_weights()

    async def _take_over(self, arm: ArmRun, record: ArmRecord) -> dict[str, int]:
        """Takes the orders of an interrupted run over, under their old nonces. Returns the round of those delivered."""
        delivered: dict[str, int] = {}
        for round_, told in record.pending:
            given = await self._handed_out(round_.round, round_.base)
            follows = record.last_committed(told.silo, round_.round)
            order = arm.orders[told.silo] = arm.order("train", told.nonce, round_.round, given, follows)
            if not told.digest or self._reducing is not None:  # an update that was reported lay in its silo's memory
                self._inbox.expect(told.silo, order)
            elif await asyncio.to_thread(self._inbox.expect_committed, told.silo, order, told.digest):
                delivered[told.silo] = round_.round
            else:
                self.watcher.note(f"the committed update of {told.silo} is damaged on disk and is asked for again")
                lost = {"silo": told.silo, "arm": record.arm, "round": round_.round, "nonce": told.nonce}
                self.ledger.note("update lost", {**lost, "digest": told.digest})
                self._inbox.expect(told.silo, order)
        return delivered

    async def _handed_out(self, round_: int, base: str) -> str:
        """The digest of what the silos get of a round's weights."""
        return await self._hand_out.prepare(base, state_of(self.ledger, self.file.training, round_, base))

    async def _publish(self, arm: ArmRun) -> None:
        """Makes the weights available that open orders and the round start from, and no others."""
        unneeded = arm.hold_bases(self._hand_out.path)
        await self.exchange.publish(arm.bases | self._samples)
        for weights in unneeded:
            weights.close()
        self._hand_out.keep_only(arm.bases)

    def _enlist(self, arm: ArmRun, kind: Kind, nonces: Mapping[str, str]) -> None:
        """Expects the answers to new orders of the open round."""
        record = self.ledger.begun_arm(arm.plan.name)
        for silo, nonce in sorted(nonces.items()):
            follows = record.last_committed(silo, arm.round)
            order = arm.orders[silo] = arm.order(kind, nonce, arm.round, arm.given, follows)
            self._inbox.expect(silo, order)

    async def _do(self, arm: ArmRun, command: steps.Command) -> None:
        plan, ledger = arm.plan, self.ledger
        if isinstance(command, steps.StartRound):
            if arm.round != command.round:
                base = self.ledger.begun_arm(plan.name).weights_of(command.round - 1)
                nonces = _nonces(command.cohort)
                ledger.open_round(plan.name, command.round, command.kind, base, command.cohort, nonces)
                arm.open_round(command.round, base, await self._handed_out(command.round, base), command.cohort)
                self._enlist(arm, command.kind, nonces)
            self._assembled = True
            arm.begin_counting(self.exchange.traffic)
            arm.hold(WeightsFile(ledger.weights_path(arm.base)))
            await self._publish(arm)
            self._next.open(arm)
        elif isinstance(command, steps.Enlist):
            nonces = _nonces(command.silos)
            arm.cohort = tuple(sorted({*arm.cohort, *command.silos}))
            ledger.enlist(plan.name, command.round, arm.cohort, nonces)
            self._enlist(arm, "train", nonces)
        elif isinstance(command, steps.Halt):
            await self._next.stop()
            self._note_spent(arm)
            arm.halt(self.exchange.traffic)
        elif isinstance(command, steps.Call):
            await self.exchange.send(command.silo, arm.orders[command.silo])
        elif isinstance(command, steps.Recall):
            order = arm.orders.pop(command.silo)
            self._inbox.withdraw(command.silo)
            ledger.fail(plan.name, command.round, command.silo, f"{RECALLED}{command.reason}")
            self.watcher.note(f"{plan.name}, round {command.round}: {command.silo} recalled: {command.reason}")
            self.watcher.silo_done(command.silo)
            await self.exchange.recall(command.silo, order.nonce, command.reason)
        elif isinstance(command, steps.SetDeadline):
            event = steps.DeadlinePassed(command.round, command.state)
            arm.set_deadline(command.seconds, lambda: self._queue.put_nowait(event))
        elif isinstance(command, steps.Aggregate):
            counted = {silo: arm.orders[silo].round for silo in command.silos}
            reduced = None if self._reducing is None else await self._reducing.reduce(command.silos)
            digest = await self._next.make(counted, reduced)
            means = command.round < self.file.training.first_trained
            diversity = None if means else await self._next.diversity(counted)
            if means:
                digest = await self._with_means(arm, digest)
            self._note_spent(arm)
            arm.stop_counting(self.exchange.traffic)
            ledger.close_round(plan.name, command.round, digest, counted, diversity)
            for silo in counted:
                del arm.orders[silo]
            record = await self._closed.judged(plan)
            self._closed.test(plan, command.round, digest, record.rounds[-1])
            self._closed.drop_old_weights()
            self._queue.put_nowait(steps.Aggregated(command.round, last=self._closed.stops(plan, record)))
        elif isinstance(command, steps.Finish):
            self._note_spent(arm)
            arm.stop_counting(self.exchange.traffic)
        else:
            ledger.forgive(plan.name, arm.machine.round, command.reason)  # not of a round that was closed
            kind = RoundFailed if command.untrainable else FederationError
            raise kind(f"arm {plan.name}, {command.reason}", hint=_hint(command))

    async def _with_means(self, arm: ArmRun, summed: str) -> str:
        """The digest of the round's weights with a last layer of the class means that were summed into it."""
        made = self.ledger.weights_path("means")  # no digest: it is dropped with what nothing needs
        await self._evaluator.make_head(self.ledger.weights_path(arm.base), self.ledger.weights_path(summed), made)
        with WeightsFile(made) as weights:
            content = blocks(weights, weights.nbytes)
            return await asyncio.to_thread(self.ledger.add_weights, self.layout, content)

    def _note_spent(self, arm: ArmRun) -> None:
        spent = arm.spent(self.exchange.traffic)
        if spent is not None:
            self.ledger.note_spent(arm.plan.name, arm.round, *spent)

    def _commit(self, silo: str, order: Order, report: Report, digest: str) -> None:
        signed = self._inbox.signed(silo)
        self.ledger.commit(order.arm, order.round, silo, report.samples, report.metrics, digest, signed)

    def _translate(self, arm: ArmRun, event: ExchangeEvent | steps.Event | BaseException) -> list[steps.Event]:
        """What an event of the wire means in this arm's round."""
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, ExchangeFailed):
            raise event.error
        if isinstance(event, SiloConnected | SiloJoined | SiloLeft | Answered | OrderFailed | SiloProgress):
            self.watcher.heard(event.silo)
        if isinstance(event, SiloConnected):
            return []
        if isinstance(event, SiloJoined | SiloLeft | SiloBarred):
            return [self._presence.take(event)]
        if isinstance(event, Answered | OrderFailed | SiloProgress):
            order = arm.orders.get(event.silo)
            return self._answer(arm, order, event) if order is not None and order.nonce == event.nonce else []
        now = (arm.round, arm.machine.state)
        if isinstance(event, steps.DeadlinePassed) and now[1] != "gather" and (event.round, event.state) == now:
            # Whoever's update was committed a moment ago has delivered; from here on nobody else can, or counts later.
            in_time = {
                silo: round_
                for silo, round_ in sorted(arm.machine.owed.items())
                if (
                    not self._inbox.withdraw(silo)
                    if arm.machine.recalls_at_deadline
                    else self._inbox.committed(silo, arm.orders[silo].nonce)
                )
            }
            return [*(steps.Delivered(silo, round_) for silo, round_ in in_time.items()), event]
        return [event]

    def _answer(self, arm: ArmRun, order: Order, event: Answered | OrderFailed | SiloProgress) -> list[steps.Event]:
        if isinstance(event, SiloProgress):
            self.watcher.silo_progress(event.silo, event.done, event.total, event.note)
            return []
        self.watcher.silo_done(event.silo)
        if isinstance(event, Answered):
            self._note_spent(arm)
            return [steps.Delivered(event.silo, order.round)]
        del arm.orders[event.silo]
        self.ledger.fail(order.arm, order.round, event.silo, event.reason)
        self.watcher.note(f"{order.arm}, round {order.round}: {event.silo} failed: {event.reason}")
        return [steps.Failed(event.silo, order.round, event.reason)]

    def _tell_where_it_stands(self, arm: ArmRun) -> None:
        self._presence.tell(arm.machine.missing)
        if self._said_paused != (arm.machine.state == "paused"):
            self._said_paused = not self._said_paused
            where = f"before round {arm.machine.round} of {arm.plan.name}"
            self.watcher.note(f"paused {where}; gptfl resume ends that" if self._said_paused else f"going on {where}")
        self.watcher.stands(
            Standing(
                arm=arm.plan.name,
                rounds=arm.plan.rounds,
                round=arm.machine.round,
                state=arm.machine.state,
                connected=frozenset(self._presence.connected),
                revoked=frozenset(self._presence.barred),
                seconds_left=arm.seconds_left if arm.machine.state in ("gather", "train", "evaluate") else None,
            )
        )


def _hint(command: steps.GiveUp) -> str:
    """What the operator can do where an arm cannot go on."""
    if ROLLBACK in command.reason:
        return (
            "where the run folder was set back on purpose, as from a copy, say so with gptfl epoch FEDERATION_FILE; "
            "then the same command goes on from this round"
        )
    if command.revoked:
        return (
            f"invite {', '.join(command.revoked)} anew (gptfl invite FEDERATION_FILE NAME), then the same command goes "
            "on from this round and waits until they have joined; or begin anew with a smaller federation.quorum, with "
            "--fresh"
        )
    return "look at the silos' logs; the same command goes on from this round and calls them again"


def _nonces(silos: Iterable[str]) -> dict[str, str]:
    return {silo: secrets.token_hex(16) for silo in silos}

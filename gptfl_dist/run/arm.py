"""One arm: what is planned, what is kept in memory while it runs, and which of its models is the best."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gptfl_dist.config.federation import Federation, FederationFile
from gptfl_dist.config.plan import LocalTraining
from gptfl_dist.exchange.base import Traffic
from gptfl_dist.federation.asynchronous import AsynchronousCoordinator
from gptfl_dist.federation.coordinator import Coordinator, Rules
from gptfl_dist.federation.orders import Kind, Order
from gptfl_dist.ledger.records import ArmRecord
from gptfl_dist.observe.summary import StopCriterion
from gptfl_dist.observe.wording import duration, percent
from gptfl_dist.weights import WeightsFile


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


def stopped_name(arm: str) -> str:
    """The name under which the ledger keeps the setting that ended an arm before its last round."""
    return f"stopped/{arm}"


def choice_name(candidate: str) -> str:
    """The name under which the ledger keeps the silos' judgement of a candidate's model."""
    return f"choice/{candidate}"


class ArmRun:
    """What the federator keeps in memory of the arm in progress."""

    def __init__(
        self, plan: ArmPlan, file: FederationFile, silos: tuple[str, ...], *, assembled: bool, epoch: int
    ) -> None:
        rules, asynchronous = file.federation, file.federation.mode == "asynchronous"
        self.plan = plan
        self.machine = (AsynchronousCoordinator if asynchronous else Coordinator)(
            Rules(
                seed=file.seed,
                silos=silos,
                rounds=plan.rounds,
                cohort=rules.cohort_of(len(silos)),
                quorum=rules.quorum_of(len(silos)),
                deadline=rules.deadline,
                join_deadline=rules.join_deadline,
                carry=rules.late == "carry",
                max_staleness=rules.max_staleness,
                buffer=rules.wanted_of(len(silos)) if asynchronous else None,
            ),
            assembled=assembled,
        )
        self.round = 0  # that is open, or was open last
        self.base = ""  # the digest of the weights that it starts from
        self.given = ""  # and of what the silos get of them
        self.cohort: tuple[str, ...] = ()  # who has an order of this round
        self.orders: dict[str, Order] = {}  # by silo: those that are open, or whose updates wait to be counted
        self.bases: dict[str, WeightsFile] = {}  # by digest: what the silos get for these orders and the round
        self.spent_before = (0.0, 0, 0)  # seconds, bytes down and up of this round, in an earlier process
        self._deadline: asyncio.TimerHandle | None = None
        self._weights: WeightsFile | None = None
        self._began: float | None = None  # the time; None once the round is closed
        self._counted: tuple[int, int] | None = None  # the traffic, down and up, that is not this round's
        self._seconds = rules.deadline
        self._file = file
        self._epoch = epoch

    @property
    def weights(self) -> WeightsFile:
        """The weights that the round starts from."""
        assert self._weights is not None
        return self._weights

    def open_round(self, round_: int, base: str, given: str, cohort: tuple[str, ...]) -> None:
        """`base` is the digest of the round's weights, `given` that of what the silos get of them."""
        self.round, self.base, self.given, self.cohort = round_, base, given, cohort
        self.spent_before = (0.0, 0, 0)

    def hold(self, weights: WeightsFile) -> None:
        """Keeps the round's weights open in place of the last round's."""
        if self._weights is not None:
            self._weights.close()
        self._weights = weights

    def hold_bases(self, path_of: Callable[[str], Path]) -> list[WeightsFile]:
        """Opens what open orders and the round start from; returns the files that nothing needs any more."""
        needed = {order.base for order in self.orders.values()} | ({self.given} if self.given else set())
        unneeded = [self.bases.pop(digest) for digest in self.bases.keys() - needed]
        for digest in needed - self.bases.keys():
            self.bases[digest] = WeightsFile(path_of(digest))
        return unneeded

    def order(self, kind: Kind, nonce: str, round_: int, given: str, follows: str) -> Order:
        """An order of a round of this arm; `follows` is the nonce of the silo's last committed update before."""
        training = self.training(round_) if kind == "train" else None
        return Order(kind, nonce, self.plan.name, round_, given, self._seconds, training, follows, self._epoch)

    def training(self, round_: int) -> LocalTraining:
        """What silos that are called on in a round are ordered to do."""
        return LocalTraining.of(self._file, self.plan.learning_rate, round_)

    def begin_counting(self, traffic: Traffic) -> None:
        """From now on time counts for the round; bytes do since the round before was closed."""
        self._began = time.monotonic()
        if self._counted is None:
            self._counted = (traffic.down, traffic.up)

    def spent(self, traffic: Traffic) -> tuple[float, int, int] | None:
        """Seconds, bytes down and bytes up of the open round so far."""
        if self._began is None or self._counted is None:
            return None
        down, up = self._counted
        seconds_before, down_before, up_before = self.spent_before
        seconds = time.monotonic() - self._began + seconds_before
        return seconds, traffic.down - down + down_before, traffic.up - up + up_before

    def stop_counting(self, traffic: Traffic) -> None:
        self._began, self._counted = None, (traffic.down, traffic.up)

    def halt(self, traffic: Traffic) -> None:
        """Time does not count while the round waits for silos; what it has taken so far stays."""
        spent = self.spent(traffic)
        if spent is not None:
            self.spent_before = spent
            self.stop_counting(traffic)

    def set_deadline(self, seconds: float, passed: Callable[[], None]) -> None:
        """Calls `passed` after so many seconds, in place of what was to be called at an earlier deadline."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = asyncio.get_running_loop().call_later(seconds, passed)

    @property
    def seconds_left(self) -> float | None:
        """Until the deadline that was set last."""
        return None if self._deadline is None else self._deadline.when() - asyncio.get_running_loop().time()

    def close(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        for weights in self.bases.values():
            weights.close()
        if self._weights is not None:
            self._weights.close()


def validation_of(record: ArmRecord, round_: int) -> tuple[float, float] | None:
    """(accuracy, minus loss) on the silos' validation data of the weights after a round; None where none was told.

    The silos that were called on in the following round measured it, and told it with their update, however late.
    """
    following = next((r for r in record.rounds if r.round == round_ + 1), None)
    accuracy = None if following is None else following.mean_metric("accuracy")
    if following is None or accuracy is None:
        return None
    return accuracy, -(following.mean_metric("loss") or 0.0)


def score_of(record: ArmRecord, round_: int) -> tuple[float, float] | None:
    """What the weights after a round are chosen by, (accuracy, minus loss): on held-out synthetic data where these were
    judged on them, else on the silos' validation data."""
    if not record.judged:
        return validation_of(record, round_)
    if round_ >= len(record.judged):
        return None
    accuracy, loss = record.judged[round_]
    return accuracy, -loss


def best_round(record: ArmRecord, unsettled: frozenset[int] = frozenset()) -> int:
    """The round whose weights do best on what chooses (see `score_of`); the last where nothing was told.

    Rounds after which one of `unsettled` follows are left out, where silos are to tell.
    """
    scores = {
        r: score
        for r in range(record.finished_rounds + 1)
        if (record.judged or r + 1 not in unsettled) and (score := score_of(record, r)) is not None
    }
    return max(scores, key=lambda r: scores[r]) if scores else record.finished_rounds


def needed_weights(record: ArmRecord) -> set[str]:
    """The weights of an arm that may still be wanted: start, newest, best so far, bases of orders that are not done.

    The best so far is among those of which no open order will tell more: what is dropped for it never comes back.
    """
    pending = [] if record.finished else record.pending
    unsettled = {r.round for r, order in pending if order.digest is None}
    unsettled |= {r.round for r in record.rounds if r.kind == "train" and r.weights is None}
    best = best_round(record, frozenset(unsettled))
    return {record.start, record.final, record.weights_of(best), *(r.base for r, _ in pending)}


@dataclass(frozen=True, slots=True)
class Stop:
    """Why an arm ends before its last round: the setting, and what was found, for the operator."""

    by: StopCriterion
    found: str


def stop_of(record: ArmRecord, rules: Federation) -> Stop | None:
    """What ends an arm after its finished rounds; None where another round follows, or all were run.

    It looks at finished rounds alone, so a coordinator that was started again decides alike.
    """
    finished = record.finished_rounds
    if finished >= rules.rounds:
        return None
    taken = sum(r.seconds or 0.0 for r in record.rounds if r.weights is not None)
    if rules.max_time is not None and taken >= rules.max_time:
        return Stop("max_time", f"its rounds have taken {duration(taken)}")
    # Silos tell of the newest weights in the next round alone.
    known = range(finished + 1 if record.judged else finished)
    scores = {r: score for r in known if (score := score_of(record, r)) is not None}
    if not scores:
        return None
    best, newest = max(scores, key=lambda r: scores[r]), max(scores)
    where = "held-out synthetic data" if record.judged else "validation data"
    told = f"{percent(scores[best][0])} on {where} after round {best}"
    if rules.target_accuracy is not None and scores[best][0] >= rules.target_accuracy:
        return Stop("target_accuracy", told)
    if rules.patience is not None and newest - best >= rules.patience:
        return Stop("patience", f"nothing better than {told}")
    return None

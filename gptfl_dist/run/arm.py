"""One arm: what is planned, what is kept in memory while it runs, and which of its models is the best."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gptfl_dist.config.federation import Federation, FederationFile
from gptfl_dist.config.plan import LocalTraining
from gptfl_dist.exchange.base import Traffic
from gptfl_dist.federation import coordinator as machine
from gptfl_dist.federation.orders import Kind, Order
from gptfl_dist.ledger.store import ArmRecord
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

    def __init__(self, plan: ArmPlan, file: FederationFile, silos: tuple[str, ...], *, assembled: bool) -> None:
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
            ),
            assembled=assembled,
        )
        self.round = 0
        self.nonces: dict[str, str] = {}
        self.taken_over: set[str] = set()  # who had delivered before the coordinator was started again
        self.spent_before = (0.0, 0, 0)  # seconds, bytes down and up of this round, before that
        self._deadline: asyncio.TimerHandle | None = None
        self._kind: Kind = "train"
        self._base = ""
        self._weights: WeightsFile | None = None
        self._began: tuple[float, int, int] | None = None  # time and traffic; None once the round is closed
        self._seconds = rules.deadline
        self._file = file

    @property
    def weights(self) -> WeightsFile:
        """The weights that the round starts from."""
        assert self._weights is not None
        return self._weights

    def open_round(self, round_: int, kind: Kind, base: str, nonces: Mapping[str, str]) -> None:
        self.round, self._kind, self._base = round_, kind, base
        self.nonces, self.taken_over, self.spent_before = dict(nonces), set(), (0.0, 0, 0)

    def hold(self, weights: WeightsFile) -> None:
        """Keeps the round's weights open in place of the last round's."""
        if self._weights is not None:
            self._weights.close()
        self._weights = weights

    def order_for(self, silo: str) -> Order:
        training = None
        if self._kind == "train":
            training = LocalTraining.of(self._file, self.plan.learning_rate, self.round)
        return Order(self._kind, self.nonces[silo], self.plan.name, self.round, self._base, self._seconds, training)

    def begin_counting(self, traffic: Traffic) -> None:
        self._began = (time.monotonic(), traffic.down, traffic.up)

    def spent(self, traffic: Traffic) -> tuple[float, int, int] | None:
        """Seconds, bytes down and bytes up of the open round so far."""
        if self._began is None:
            return None
        began, down, up = self._began
        seconds_before, down_before, up_before = self.spent_before
        seconds = time.monotonic() - began + seconds_before
        return seconds, traffic.down - down + down_before, traffic.up - up + up_before

    def stop_counting(self) -> None:
        self._began = None

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


def best_round(record: ArmRecord) -> int:
    """The round whose weights do best on the silos' validation data; the last where nothing was told."""
    scores = {r: score for r in range(record.finished_rounds + 1) if (score := validation_of(record, r)) is not None}
    return max(scores, key=lambda r: scores[r]) if scores else record.finished_rounds


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
    scores = {r: score for r in range(finished) if (score := validation_of(record, r)) is not None}
    if not scores:
        return None
    best, newest = max(scores, key=lambda r: scores[r]), max(scores)
    told = f"{percent(scores[best][0])} on validation data after round {best}"
    if rules.target_accuracy is not None and scores[best][0] >= rules.target_accuracy:
        return Stop("target_accuracy", told)
    if rules.patience is not None and newest - best >= rules.patience:
        return Stop("patience", f"nothing better than {told}")
    return None

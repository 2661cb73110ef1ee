"""One arm: what is planned, what is kept in memory while it runs, and which of its models is the best."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.plan import LocalTraining
from gptfl_dist.exchange.base import Traffic
from gptfl_dist.federation import coordinator as machine
from gptfl_dist.federation.orders import Kind, Order
from gptfl_dist.ledger.store import ArmRecord
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
        self.deadlines: list[asyncio.TimerHandle] = []
        self._kind: Kind = "train"
        self._base = ""
        self._follows: Mapping[str, str] = {}
        self._held: tuple[WeightsFile, WeightsFile] | None = None
        self._began: tuple[float, int, int] | None = None  # time and traffic; None once the round is closed
        self._seconds = rules.deadline
        self._file = file

    @property
    def weights(self) -> WeightsFile:
        """The weights that the round starts from."""
        assert self._held is not None
        return self._held[0]

    def open_round(
        self, round_: int, kind: Kind, base: str, nonces: Mapping[str, str], follows: Mapping[str, str]
    ) -> None:
        """`base` is the digest of what is handed out; `follows` has each silo's last committed nonce."""
        self.round, self._kind, self._base, self._follows = round_, kind, base, follows
        self.nonces, self.taken_over, self.spent_before = dict(nonces), set(), (0.0, 0, 0)

    def hold(self, weights: WeightsFile, handed_out: WeightsFile) -> None:
        """Keeps the round's weights, and what is handed out of them, open in place of the last round's."""
        self._let_go()
        self._held = weights, handed_out

    def order_for(self, silo: str) -> Order:
        training = None
        if self._kind == "train":
            training = LocalTraining.of(self._file, self.plan.learning_rate, self.round)
        return Order(
            self._kind,
            self.nonces[silo],
            self.plan.name,
            self.round,
            self._base,
            self._seconds,
            training,
            self._follows[silo],
        )

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

    def close(self) -> None:
        for deadline in self.deadlines:
            deadline.cancel()
        self._let_go()

    def _let_go(self) -> None:
        for file in self._held or ():
            file.close()
        self._held = None


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

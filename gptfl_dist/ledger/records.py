"""What the record of a run tells: its arms, their rounds, the orders given in them and the updates that counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptfl_dist.aggregation.diversity import Diversity
from gptfl_dist.learning.measures import Measures


@dataclass(frozen=True, slots=True)
class OrderRecord:
    """An order that was given. `samples`, `metrics` and `digest` are None until it was answered.

    The metrics are those of the weights that the order named. `counted` is the round in which the update counted.
    """

    silo: str
    nonce: str
    samples: int | None
    metrics: dict[str, float] | None
    digest: str | None
    failure: str | None
    counted: int | None = None


@dataclass(frozen=True, slots=True)
class CountedUpdate:
    """An update that a round was made of. `staleness`: how many rounds before, its order was given."""

    silo: str
    samples: int
    staleness: int


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """A round. `weights` is None until it was aggregated; digests are BLAKE3 in hex.

    `orders` are those that were given in it, `updates` those that counted in it, whenever they were ordered.
    `tested` is of the weights that it led to, `diversity` of the updates that counted; None where nobody asked for it.
    """

    round: int
    kind: str
    base: str
    cohort: tuple[str, ...]
    weights: str | None
    seconds: float | None
    bytes_down: int | None
    bytes_up: int | None
    tested: Measures | None
    orders: tuple[OrderRecord, ...]
    updates: tuple[CountedUpdate, ...] = ()
    diversity: Diversity | None = None

    def metric(self, name: str) -> dict[str, float]:
        """A metric by silo, of those that measured and sent it with the answer to an order of this round."""
        return {order.silo: order.metrics[name] for order in self.orders if order.metrics and name in order.metrics}

    def mean_metric(self, name: str) -> float | None:
        """The mean of a metric of the round's base over the silos that measured and sent it, weighted by samples."""
        told = [(o.samples, o.metrics[name]) for o in self.orders if o.samples and o.metrics and name in o.metrics]
        total = sum(samples for samples, _ in told)
        return sum(samples * value for samples, value in told) / total if total else None


@dataclass(frozen=True, slots=True)
class Signed:
    """A silo's statement of what it delivers, the signature over it (base64), and who signed: the certificate, PEM, and
    its SHA-256 in hex."""

    statement: str
    signature: str
    signer: str
    certificate: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """An event that is not known to stand in the audit log yet. `number` orders those that wait; `token` names it."""

    number: int
    token: str
    time: str
    event: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ArmRecord:
    """An arm with its rounds in order. `start` is the digest of the weights that it began with, `start_tested` how good
    they are on test data.

    `judged` holds accuracy and loss of the start and of the weights after each round on held-out synthetic data, where
    these choose; nothing where the silos' validation data do.
    """

    arm: str
    learning_rate: float
    start: str
    finished: bool
    best_round: int | None
    rounds: tuple[RoundRecord, ...]
    start_tested: Measures | None = None
    judged: tuple[tuple[float, float], ...] = ()

    @property
    def final(self) -> str:
        """The digest of the newest weights."""
        return next((r.weights for r in reversed(self.rounds) if r.weights is not None), self.start)

    @property
    def completed(self) -> bool:
        """Whether it came to its end, the evaluation of its final weights."""
        return self.finished and bool(self.rounds) and self.rounds[-1].kind == "evaluate"

    @property
    def finished_rounds(self) -> int:
        return sum(r.weights is not None for r in self.rounds)

    @property
    def pending(self) -> list[tuple[RoundRecord, OrderRecord]]:
        """The training orders that are open, or whose committed update has not counted yet; each with its round."""
        return [
            (r, order)
            for r in self.rounds
            if r.kind == "train"
            for order in r.orders
            if order.failure is None and order.counted is None
        ]

    def last_committed(self, silo: str, before: int) -> str:
        """The nonce of a silo's newest committed update of the rounds before one; "" where there is none."""
        nonces = [
            order.nonce
            for r in self.rounds
            if r.kind == "train" and r.round < before
            for order in r.orders
            if order.silo == silo and order.digest is not None
        ]
        return nonces[-1] if nonces else ""

    def weights_of(self, round_: int) -> str:
        """The digest of the weights after a round; round 0 is the start."""
        if round_ == 0:
            return self.start
        return next(r.weights for r in self.rounds if r.round == round_ and r.weights is not None)

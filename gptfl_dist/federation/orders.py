"""What the coordinator asks of a silo, and what a silo answers, whatever the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gptfl_dist.config.plan import LocalTraining

Kind = Literal["train", "evaluate"]

REFUSED, RECALLED = "refused: ", "recalled: "
"""How the reason begins why an answer does not count, where the silo did not say itself that it failed."""


@dataclass(frozen=True, slots=True)
class Order:
    """One task for one silo: to train from the weights whose BLAKE3 is `base`, or to evaluate them.

    `nonce` is unique to this order and silo. `seconds` is how long the coordinator waits. `training` is None for an
    evaluation. `follows` is the nonce of this silo's last committed update in this arm, "" where there is none. `epoch`
    is that of the run: an answer counts in its own epoch alone.
    """

    kind: Kind
    nonce: str
    arm: str
    round: int
    base: str
    seconds: float
    training: LocalTraining | None = None
    follows: str = ""
    epoch: int = 1


@dataclass(frozen=True, slots=True)
class Report:
    """What a silo tells of an order: the number of its training samples, which weighs all it returns, and metrics.

    `accuracy` and `loss` are those of the received weights on the silo's validation part.
    """

    nonce: str
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)

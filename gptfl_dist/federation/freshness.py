"""What a silo remembers of how far a run has come, and which orders it refuses as going back. No input or output.

Within an epoch the rounds of an arm never fall, and the weights of a round are always the same. An order may well come
again, under its nonce or, after a failure, under another: as long as it is of the same round and weights, or of a later
round, it is welcome. Whatever else comes is a rollback, whoever asks for it: an intruder with the coordinator's old
files, or an operator who put back a copy of the run folder without telling the silos so (`gptfl epoch`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gptfl_dist.errors import PolicyError
from gptfl_dist.federation.orders import Order

ROLLBACK = "rollback: "
"""How the reason begins why a silo refuses to go back."""

_MOST_ARMS = 1000  # far more than any grid of learning rates has
_SAY_SO = "where that is meant, the coordinator's operator says so with gptfl epoch"


@dataclass(frozen=True, slots=True)
class Reached:
    """The newest round of an arm that was asked for, and the digest of its weights; "" where any will do."""

    round: int
    base: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered of a run: its epoch, the statement that began it, and how far each arm has come in it.

    `kept`: its federation keeps an authority of its own.
    """

    epoch: int = 1
    statement: str = ""
    kept: bool = False
    arms: Mapping[str, Reached] = field(default_factory=dict)

    def after(self, order: Order) -> Memory:
        """What is remembered after an order of this epoch. Raises PolicyError where the order goes back."""
        reached, asked = self.arms.get(order.arm, Reached(0)), f"round {order.round} of {order.arm}"
        if order.round < reached.round:
            raise rollback(f"{asked} is asked for, and round {reached.round} was seen in epoch {self.epoch}")
        if order.round == reached.round and reached.base not in ("", order.base):
            raise rollback(
                f"{asked} is asked for with the weights {order.base[:12]}, and they were {reached.base[:12]} before"
            )
        if order.arm not in self.arms and len(self.arms) >= _MOST_ARMS:
            raise PolicyError(f"the coordinator asks for more than {_MOST_ARMS} arms in one run")
        return replace(self, arms={**self.arms, order.arm: Reached(order.round, order.base)})


def rollback(found: str) -> PolicyError:
    """The refusal to go back; its first line is told to the coordinator."""
    return PolicyError(f"{ROLLBACK}{found}; {_SAY_SO}")

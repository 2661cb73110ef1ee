"""What a silo lets the coordinator ask of it: its own policy, checked before anything is done. No input or output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gptfl_dist.config.silo import Policy
from gptfl_dist.errors import PolicyError
from gptfl_dist.federation.orders import Order


@dataclass
class PolicyGuard:
    """Counts the training orders that this silo took and refuses what its policy does not allow."""

    policy: Policy
    rounds: int = 0
    _last: Order | None = None  # that was counted last: the same one may come again

    def check(self, order: Order) -> None:
        """Raises PolicyError where the order asks for more than the policy allows, whether it comes again or not, or
        for other work than an order of the same nonce did."""
        again = self._last is not None and order.nonce == self._last.nonce
        if again and _work_of(order) != self._last:
            raise PolicyError("the coordinator asks for other work under the nonce of another order")
        if order.kind != "train":
            return
        assert order.training is not None
        if order.training.epochs > self.policy.max_epochs_per_round:
            raise PolicyError(
                f"the coordinator asks for {order.training.epochs} epochs a round, "
                f"policy.max_epochs_per_round allows {self.policy.max_epochs_per_round}"
            )
        if order.training.trained == "means":
            self.check_class_means()
        if again:
            return
        if self.rounds >= self.policy.max_rounds:
            raise PolicyError(f"policy.max_rounds allows {self.policy.max_rounds} rounds, and they are used up")
        self.rounds += 1
        self._last = _work_of(order)

    def check_model(self, nbytes: int) -> None:
        """Raises PolicyError where the federation's model is larger than the policy allows."""
        if nbytes > self.policy.max_model:
            raise PolicyError(
                f"the federation's model has {nbytes} bytes, policy.max_model allows {self.policy.max_model}",
                hint="raise policy.max_model in the silo file if this is meant",
            )

    def check_samples(self, nbytes: int) -> None:
        """Raises PolicyError where the synthetic samples that the federation hands out are more than is allowed."""
        if nbytes > self.policy.max_synthetic:
            raise PolicyError(
                f"the federation hands out {nbytes} bytes of synthetic samples, policy.max_synthetic allows "
                f"{self.policy.max_synthetic}",
                hint="raise policy.max_synthetic in the silo file if the silo is to train on them",
            )

    def check_class_means(self) -> None:
        """Raises PolicyError where class means may not leave."""
        if not self.policy.class_means:
            raise PolicyError(
                "the coordinator asks for the sums of what the samples of each label look like to the model, "
                "policy.class_means is false",
                hint="set policy.class_means to true in the silo file if they may leave",
            )

    def release(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics that may leave."""
        return {name: value for name, value in metrics.items() if name in self.policy.metrics}


def _work_of(order: Order) -> Order:
    """The order without what a coordinator that was started again may change: how long it waits, and the epoch."""
    return replace(order, seconds=0.0, epoch=0)

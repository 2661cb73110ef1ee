"""What the strategy makes of the updates of a round: the next weights and its own state, in the ledger's folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from gptfl_dist.aggregation.diversity import Diversity, diversity_of
from gptfl_dist.aggregation.factors import clipping, freshness
from gptfl_dist.aggregation.mean import weighted_mean
from gptfl_dist.aggregation.rules import next_weights, reads_once, rule_of
from gptfl_dist.aggregation.scaffold import next_control
from gptfl_dist.aggregation.server import ServerOptimizer, control_of, stepping
from gptfl_dist.aggregation.updates import Updates
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.strategy import Strategy
from gptfl_dist.config.training import Training
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.run.arm import ArmRun
from gptfl_dist.weights import FlatReader, Layout
from gptfl_dist.weights.beside import control_part, model_part


def state_of(ledger: Ledger, training: Training, round_: int, base: str) -> Path | None:
    """Where the strategy's state of a round's weights lies; None for those that silos train from first."""
    return ledger.state_path(base) if round_ > training.first_trained else None


class Aggregation:
    """Carries out the strategy of a federation file. `layout` is the model's.

    What it writes of the state counts once the ledger keeps it.
    """

    def __init__(self, file: FederationFile, layout: Layout, ledger: Ledger) -> None:
        """Raises ModelError where the strategy's rule is code that cannot be imported."""
        self._file = file
        self._layout = layout
        self._ledger = ledger
        rule_of(file.strategy)  # what cannot be imported is told before a round is open
        self.reads_once = reads_once(file.strategy)
        """Whether each update is read once, in order, so that the work can begin while updates arrive."""

    def of_sum(self, arm: ArmRun, reduced: FlatReader, samples: Mapping[str, int]) -> str:
        """The digest of the next weights, from the sum of the updates, each times its samples. Raises StorageError."""
        old = state_of(self._ledger, self._file.training, arm.round, arm.base)
        new, durable = self._ledger.incoming_state, self._ledger.durable
        with stepping(self._strategy(arm), self._layout, old, new, durable=durable) as optimizer:
            share = 1 / sum(samples.values())
            blocks = weighted_mean(self._layout, arm.weights, {"": reduced}, {"": share}, optimizer.step)
            return self._ledger.add_weights(self._layout, blocks)

    def of(
        self, arm: ArmRun, updates: Mapping[str, FlatReader], samples: Mapping[str, int], counted: Mapping[str, int]
    ) -> str:
        """The digest of the next weights, from updates of so many samples whose orders' rounds these are.

        Raises StorageError, and FederationError where the rule fails.
        """
        strategy, ledger = self._strategy(arm), self._ledger
        old = state_of(ledger, self._file.training, arm.round, arm.base)
        with stepping(strategy, self._layout, old, ledger.incoming_state, durable=ledger.durable) as optimizer:
            seen = self._seen(arm, updates, samples, counted)
            blocks = next_weights(rule_of(strategy), strategy, arm.weights, seen, optimizer.step)
            digest = ledger.add_weights(self._layout, blocks)
            if strategy.rule == "scaffold":
                self._keep_control(updates, old, optimizer)
        return digest

    def _strategy(self, arm: ArmRun) -> Strategy:
        """That of the file; of sums for class means the plain mean is taken, in a step of 1."""
        return Strategy() if arm.round < self._file.training.first_trained else self._file.strategy

    def diversity(self, updates: Mapping[str, FlatReader], parameters: Collection[str]) -> Diversity:
        """How far these updates agree, each as it came, over the tensors of these names. Raises StorageError."""
        return diversity_of(self._layout, parameters, self._of_the_model(updates))

    def _of_the_model(self, updates: Mapping[str, FlatReader]) -> Mapping[str, FlatReader]:
        """The updates without what travels beside them."""
        if self._file.strategy.rule != "scaffold":
            return updates
        return {silo: model_part(self._layout, update) for silo, update in updates.items()}

    def _seen(
        self, arm: ArmRun, readers: Mapping[str, FlatReader], samples: Mapping[str, int], counted: Mapping[str, int]
    ) -> Updates:
        """The updates of a round as its rule sees them."""
        strategy, readers = self._file.strategy, self._of_the_model(readers)
        fresh = freshness({silo: arm.round - given for silo, given in counted.items()}, self._file.federation.staleness)
        short = clipping(self._layout, readers, strategy.clip_norm)
        silos = tuple(sorted(readers))
        return Updates(
            layout=self._layout,
            silos=silos,
            readers=tuple(readers[silo] for silo in silos),
            samples=tuple(samples[silo] for silo in silos),
            trainings=tuple(arm.training(counted[silo]) for silo in silos),
            factors=tuple(fresh[silo] * short[silo] for silo in silos),
        )

    def _keep_control(self, updates: Mapping[str, FlatReader], old: Path | None, optimizer: ServerOptimizer) -> None:
        """Makes the control variate of the next round of the old one, and the increases that came with the updates."""
        increases = [control_part(self._layout, updates[silo]) for silo in sorted(updates)]
        with control_of(self._file.strategy, self._layout, old) as control:
            optimizer.keep_control(next_control(self._layout, control, increases, len(self._file.silos)))

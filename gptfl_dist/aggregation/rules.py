"""From the updates of a round to the next weights, by the rule that the strategy names.

A rule is a function of the updates (`Updates`) and the section `strategy`. It returns either a weight for each update,
(K,), whose weighted sum is taken; or a function that makes the numbers of a block, (n,), of those of all updates,
(K, n), which is then called for each block. It is one of ours (`mean`, those of `fednova`, `scaffold` and `robust`),
one that an installed package offers under the entry points `gptfl_dist.strategies`, or one that the coordinator's file
names as package.module:function. Such code is the coordinator's own and runs there alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points

import numpy as np

from gptfl_dist.aggregation.blocks import Array, Increase, blocks_of, counted
from gptfl_dist.aggregation.fednova import fednova
from gptfl_dist.aggregation.mean import Step, weighted_mean
from gptfl_dist.aggregation.robust import geometric_median, krum, median, multi_krum, trimmed_mean
from gptfl_dist.aggregation.scaffold import scaffold
from gptfl_dist.aggregation.updates import Updates, Vector
from gptfl_dist.config.strategy import GROUP, PLAIN, Strategy
from gptfl_dist.errors import FederationError, GptflError, first_line
from gptfl_dist.learning.code import import_function
from gptfl_dist.weights import FlatReader
from gptfl_dist.weights.numbers import narrow, numbers

Rule = Callable[[Updates, Strategy], Vector | Callable[[Array], Array]]


def mean(updates: Updates, strategy: Strategy) -> Vector:
    """Each by its part of all samples (FedAvg, arXiv:1602.05629)."""
    return updates.shares


OURS: dict[str, Rule] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
    "fednova": fednova,
    "scaffold": scaffold,
}

_ONCE = (*PLAIN, "median", "trimmed_mean")


def rule_of(strategy: Strategy) -> Rule:
    """The rule that a strategy names. Raises ModelError where it is code that cannot be imported."""
    name = strategy.rule
    if name in OURS:
        return OURS[name]
    source = name if ":" in name else entry_points(group=GROUP)[name].value
    rule: Rule = import_function(source, "strategy.rule")
    return rule


def reads_once(strategy: Strategy) -> bool:
    """Whether each update is read once, from its first block to its last."""
    return strategy.clip_norm is None and strategy.rule in _ONCE


def next_weights(
    rule: Rule, strategy: Strategy, base: FlatReader, updates: Updates, step: Step
) -> Iterator[bytes | memoryview]:
    """The next weights as consecutive blocks of the flat buffer: `step` of the weights and what the rule makes.

    Of integers the middle increase is added, unless the mean itself bears nobody. Raises FederationError where a rule
    fails, or returns something else than numbers of the right shape.
    """
    name = strategy.rule
    increase: Increase = "largest" if name in PLAIN else "middle"
    with _blamed(name):
        made = rule(updates, strategy)
    if callable(made):
        for block in blocks_of(updates.layout, updates.elements):
            if not block.floating:
                yield counted(block, base, updates.readers, increase)
                continue
            read = updates.read(block, block.wide)
            with _blamed(name):
                found = made(read)
            combined = _checked(name, found, block.count).astype(block.wide, copy=False)
            memory = memoryview(bytearray(block.size))
            base.read_into(block.start, memory)
            weights = numbers(memory, block.dtype).astype(block.wide, copy=False)
            yield narrow(step(block.place, weights, combined), block.dtype).data.cast("B")
        return
    weights = _checked(name, made, len(updates))
    each = zip(updates.silos, weights, updates.factors, strict=True)
    shares = {silo: float(weight) * factor for silo, weight, factor in each}
    readers = dict(zip(updates.silos, updates.readers, strict=True))
    yield from weighted_mean(updates.layout, base, readers, shares, step, increase)


@contextmanager
def _blamed(rule: str) -> Iterator[None]:
    """What a rule raises that is no error of ours is told as its failure."""
    try:
        yield
    except GptflError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise FederationError(
            f"strategy.rule {rule} failed: {type(error).__name__}: {first_line(error)}",
            hint="it is called with the updates of the round and the section strategy: see docs/strategies.md",
        ) from error


def _checked(rule: str, found: object, count: int) -> Array:
    """What a rule returned, if it is so many finite numbers. Raises FederationError."""
    made = np.asarray(found)
    if made.shape != (count,) or made.dtype.kind not in "fiu" or not np.isfinite(made).all():
        raise FederationError(
            f"strategy.rule {rule} returned {made.dtype} of shape {made.shape}, expected {count} finite numbers",
            hint="it returns a weight for each update, or a function of a block (K, n) that returns (n,)",
        )
    return made

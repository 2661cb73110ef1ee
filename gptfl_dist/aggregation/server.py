"""The server's optimiser: from the mean update of a round to what is added to the weights.

Its state (one or two numbers for each weight) lies in a file of its own beside the weights that it belongs to. It is
read and written block by block, so memory does not grow with the model. The formulas are those of FedOpt
(arXiv:2003.00295, algorithm 2) and, for `sgd` with momentum, of FedAvgM (arXiv:1909.06335, section 4.1).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gptfl_dist.config.federation import Strategy
from gptfl_dist.errors import ModelError, StorageError
from gptfl_dist.files import replacing
from gptfl_dist.weights import Layout, WeightsFile
from gptfl_dist.weights.file import header_of

Array = NDArray[np.float64]
_ANEW = "bring the run folder back from a backup, or start anew with --fresh"


def moment_names(strategy: Strategy) -> tuple[str, ...]:
    """What is remembered of each weight: nothing, the `first` moment of the mean updates, or the `second` too."""
    if strategy.optimizer != "sgd":
        return ("first", "second")
    return ("first",) if strategy.first_momentum else ()


def first_moments(strategy: Strategy, size: int) -> list[Array]:
    """The moments before the first round, each float64 (size,): nothing seen, and the second as small as it may be."""
    values = {"first": 0.0, "second": strategy.adaptivity**2}
    return [np.full(size, values[name]) for name in moment_names(strategy)]


def advance(strategy: Strategy, mean: Array, moments: list[Array]) -> tuple[Array, list[Array]]:
    """One step on one block: what is added to the weights, and the new moments, each float64 (n,) as `mean` is."""
    momentum = strategy.first_momentum
    if strategy.optimizer == "sgd":
        if not moments:
            return strategy.step * mean, []
        first = momentum * moments[0] + mean
        return strategy.step * first, [first]
    first, second = moments
    first = momentum * first + (1 - momentum) * mean
    square = mean**2
    if strategy.optimizer == "adagrad":
        second = second + square
    elif strategy.optimizer == "yogi":
        second = second - (1 - strategy.second_momentum) * square * np.sign(second - square)
    else:
        second = strategy.second_momentum * second + (1 - strategy.second_momentum) * square
    return strategy.step * first / (np.sqrt(second) + strategy.adaptivity), [first, second]


class ServerOptimizer:
    """Steps through the blocks of one round; see `stepping`."""

    def __init__(
        self, strategy: Strategy, old: WeightsFile | None, new: int | None, start: int, parameters: int
    ) -> None:
        self._strategy, self._old, self._new = strategy, old, new
        self._start, self._parameters = start, parameters

    def step(self, place: int, mean: Array) -> Array:
        """What is added to the `len(mean)` weights that follow `place` others. Moments are kept as float32."""
        names, size = moment_names(self._strategy), len(mean)
        offsets = [4 * (number * self._parameters + place) for number in range(len(names))]
        if self._old is None:
            moments = first_moments(self._strategy, size)
        else:
            blocks = [self._old.read(offset, 4 * size) for offset in offsets]
            moments = [np.frombuffer(block, "<f4").astype(np.float64) for block in blocks]
        increase, moments = advance(self._strategy, mean, moments)
        for offset, moment in zip(offsets, moments, strict=True):
            assert self._new is not None  # there are moments, so there is a file for them
            _write_at(self._new, self._start + offset, moment.astype("<f4").tobytes())
        return increase


@contextmanager
def stepping(
    strategy: Strategy, layout: Layout, old: Path | None, new: Path, *, durable: bool = True
) -> Iterator[ServerOptimizer]:
    """The optimiser of one round: goes on from the state in `old` (None in the first round), leaves its own in `new`.

    Reads and writes nothing where the strategy remembers nothing. `durable` as in `replacing`. Raises StorageError,
    also where `old` is missing or is no state of this strategy and model.
    """
    names = moment_names(strategy)
    if not names:
        yield ServerOptimizer(strategy, None, None, 0, layout.parameters)
        return
    shape = Layout.of((name, (layout.parameters,), "F32") for name in names)
    with ExitStack() as stack:
        state = None if old is None else stack.enter_context(_opened(old, shape))
        fd = stack.enter_context(replacing(new, durable=durable))
        header = header_of(shape)
        _write_at(fd, 0, header)
        os.truncate(fd, len(header) + shape.nbytes)
        yield ServerOptimizer(strategy, state, fd, len(header), layout.parameters)


def _opened(path: Path, shape: Layout) -> WeightsFile:
    try:
        state = WeightsFile(path)
    except ModelError as error:
        raise StorageError(f"the strategy's state is lost: {error}", hint=_ANEW) from None
    if difference := shape.difference(state.layout):
        state.close()
        raise StorageError(f"{path} is no state of this strategy: {difference}", hint=_ANEW)
    return state


def _write_at(fd: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written

"""The server's optimiser: from the mean update of a round to what is added to the weights.

Its state (up to two numbers for each weight, a float32 master of weights in half precision, and the control variate of
SCAFFOLD) lies in a file of its own beside the weights that it belongs to. It is read and written block by block, so
memory does not grow with the model. The formulas are those of FedOpt (arXiv:2003.00295, algorithm 2) and, for `sgd`
with momentum, of FedAvgM (arXiv:1909.06335, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptfl_dist.config.strategy import Strategy
from gptfl_dist.errors import ModelError, StorageError
from gptfl_dist.files import replacing
from gptfl_dist.weights import FLOATS, ITEM_SIZE, FlatReader, Layout, WeightsFile
from gptfl_dist.weights.beside import Pieces
from gptfl_dist.weights.file import header_of
from gptfl_dist.weights.sealed import writer

Array = NDArray[np.floating[Any]]
Moment = NDArray[np.float64]
_Write = Callable[[int, memoryview], None]
_CONTROL = "control"
_ANEW = "bring the run folder back from a backup, or start anew with --fresh"


def moment_names(strategy: Strategy) -> tuple[str, ...]:
    """What is remembered of each weight: nothing, the `first` moment of the mean updates, or the `second` too."""
    if strategy.optimizer != "sgd":
        return ("first", "second")
    return ("first",) if strategy.first_momentum else ()


def first_moments(strategy: Strategy, size: int) -> list[Moment]:
    """The moments before the first round, each float64 (size,): nothing seen, and the second as small as it may be."""
    values = {"first": 0.0, "second": strategy.adaptivity**2}
    return [np.full(size, values[name]) for name in moment_names(strategy)]


def advance(strategy: Strategy, mean: Array, moments: list[Moment]) -> tuple[Array, list[Moment]]:
    """One step on one block: what is added to the weights, and the new moments (float64), each (n,) as `mean` is."""
    momentum = strategy.first_momentum
    if strategy.optimizer == "sgd":
        if not moments:
            return strategy.step * mean, []
        first = momentum * moments[0] + mean
        return strategy.step * first, [first]
    wide = mean.astype(np.float64)  # of which the squares of small updates are more than nothing
    first, second = moments
    first = momentum * first + (1 - momentum) * wide
    square = wide**2
    if strategy.optimizer == "adagrad":
        second = second + square
    elif strategy.optimizer == "yogi":
        second = second - (1 - strategy.second_momentum) * square * np.sign(second - square)
    else:
        second = strategy.second_momentum * second + (1 - strategy.second_momentum) * square
    return strategy.step * first / (np.sqrt(second) + strategy.adaptivity), [first, second]


class ServerOptimizer:
    """Steps through the blocks of one round; see `stepping`."""

    def __init__(self, strategy: Strategy, layout: Layout, old: WeightsFile | None, write: _Write | None) -> None:
        """`layout` is the weights', `old` the state that was left, `write` puts the next one into its file."""
        self._strategy, self._old, self._put = strategy, old, write
        self._first_half = _first_half(layout)
        self._state = _state_layout(strategy, layout)
        self._offsets = {tensor.name: tensor.offset for tensor in self._state.tensors}
        self._start = len(header_of(self._state))

    def step(self, place: int, weights: Array, mean: Array) -> Array:
        """The next weights of the `len(mean)` that follow `place` others, each (n,). State is kept as float32.

        Weights of half precision step from their full-precision master, which is part of the state: what a round adds
        may be too small to show in a half.
        """
        moments = first_moments(self._strategy, len(mean))
        if self._old is not None:
            moments = [self._read(name, place, len(mean)) for name in moment_names(self._strategy)]
        increase, moments = advance(self._strategy, mean, moments)
        for name, moment in zip(moment_names(self._strategy), moments, strict=True):
            self._write(name, place, moment)
        if place < self._first_half:
            return weights + increase
        master = weights if self._old is None else self._read("master", place - self._first_half, len(mean))
        stepped = master + increase
        self._write("master", place - self._first_half, stepped)
        return stepped

    def keep_control(self, blocks: Iterable[bytes | memoryview]) -> None:
        """Makes these blocks, in order, the control variate of the next round."""
        assert self._put is not None
        place = self._start + self._offsets[_CONTROL]
        for block in blocks:
            self._put(place, memoryview(block))
            place += len(block)

    def _read(self, name: str, place: int, count: int) -> Moment:
        assert self._old is not None
        block = np.empty(count, "<f4")
        self._old.read_into(self._offsets[name] + 4 * place, block.data.cast("B"))
        return block.astype(np.float64)

    def _write(self, name: str, place: int, values: Array) -> None:
        assert self._put is not None
        self._put(self._start + self._offsets[name] + 4 * place, values.astype("<f4").data.cast("B"))


def _first_half(layout: Layout) -> int:
    """How many floating elements lie before those of half precision, which a layout puts last."""
    return sum(s.nbytes // ITEM_SIZE[s.dtype] for s in layout.tensors if s.dtype in FLOATS and ITEM_SIZE[s.dtype] > 2)


def _state_layout(strategy: Strategy, layout: Layout) -> Layout:
    """What is remembered from round to round: moments, the master of half precision, the control variate."""
    halves = layout.parameters - _first_half(layout)
    moments = [(name, (layout.parameters,), "F32") for name in moment_names(strategy)]
    master = [("master", (halves,), "F32")] if halves else []
    control = [(_CONTROL, (layout.parameters,), "F32")] if strategy.rule == "scaffold" else []
    return Layout.of([*moments, *master, *control])


@contextmanager
def stepping(
    strategy: Strategy, layout: Layout, old: Path | None, new: Path, *, durable: bool
) -> Iterator[ServerOptimizer]:
    """The optimiser of one round: goes on from the state in `old` (None in the first round), leaves its own in `new`.

    Reads and writes nothing where nothing is remembered. `durable` as in `replacing`. Raises StorageError, also where
    `old` is missing or is no state of this strategy and model.
    """
    shape = _state_layout(strategy, layout)
    if not shape.nbytes:
        yield ServerOptimizer(strategy, layout, None, None)
        return
    with ExitStack() as stack:
        state = None if old is None else stack.enter_context(_opened(old, shape))
        fd = stack.enter_context(replacing(new, durable=durable))
        header = header_of(shape)
        out = writer(len(header) + shape.nbytes)
        out.write(fd, 0, memoryview(header))
        yield ServerOptimizer(strategy, layout, state, partial(out.write, fd))
        out.finish(fd)


@contextmanager
def control_of(strategy: Strategy, layout: Layout, state: Path | None) -> Iterator[FlatReader]:
    """The control variate in a state; zeros where there is none yet. Raises StorageError as `stepping`."""
    if state is None:
        yield _Zeros()
        return
    shape = _state_layout(strategy, layout)
    offset = next(tensor.offset for tensor in shape.tensors if tensor.name == _CONTROL)
    with _opened(state, shape) as file:
        yield Pieces((4 * layout.parameters, file, offset))


class _Zeros:
    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))


def _opened(path: Path, shape: Layout) -> WeightsFile:
    try:
        state = WeightsFile(path)
    except ModelError as error:
        raise StorageError(f"the strategy's state is lost: {error}", hint=_ANEW) from None
    if difference := shape.difference(state.layout):
        state.close()
        raise StorageError(f"{path} is no state of this strategy: {difference}", hint=_ANEW)
    return state

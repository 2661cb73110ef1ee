"""What travels beside a model's weights: SCAFFOLD's control variate, one number for each floating one of the model.

It is one more tensor of the layout, down as it is and up as its increase. So all that the wire does with weights and
updates (digests, resuming, checks, codecs) it does with it too. The files of models do not have it.
"""

from __future__ import annotations

from collections.abc import Iterator

from gptfl_dist.weights.file import FlatReader
from gptfl_dist.weights.layout import FLOATS, ITEM_SIZE, Layout

CONTROL = "scaffold/control"
"""The name of the tensor: float32, in the order of the model's floating numbers."""


def with_control(model: Layout) -> Layout:
    """The layout of what travels."""
    tensors = [(tensor.name, tensor.shape, tensor.dtype) for tensor in model.tensors]
    return Layout.of([*tensors, (CONTROL, (model.parameters,), "F32")])


def control_layout(model: Layout) -> Layout:
    """The layout of a control variate alone."""
    return Layout.of([(CONTROL, (model.parameters,), "F32")])


def control_places(model: Layout) -> Iterator[tuple[str, slice]]:
    """Where the numbers of each floating tensor stand in the control variate."""
    place = 0
    for tensor in model.tensors:
        if tensor.dtype in FLOATS:
            count = tensor.nbytes // ITEM_SIZE[tensor.dtype]
            yield tensor.name, slice(place, place + count)
            place += count


class Pieces:
    """A flat buffer that is put together of pieces of others."""

    def __init__(self, *pieces: tuple[int, FlatReader, int]) -> None:
        """Each piece in order: its size in bytes, and the buffer and place that it is read from."""
        self._pieces = pieces

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from `offset`."""
        start, stop = 0, offset + len(buffer)
        for size, reader, place in self._pieces:
            first, last = max(offset, start), min(stop, start + size)
            if first < last:
                reader.read_into(place + first - start, buffer[first - offset : last - offset])
            start += size


def joined(model: Layout, weights: FlatReader, control: FlatReader) -> FlatReader:
    """What travels, from its two parts."""
    cut, size = _cut(model)
    return Pieces((cut, weights, 0), (size, control, 0), (model.nbytes - cut, weights, cut))


def model_part(model: Layout, travelling: FlatReader) -> FlatReader:
    """The model's part of what travels."""
    cut, size = _cut(model)
    return Pieces((cut, travelling, 0), (model.nbytes - cut, travelling, cut + size))


def control_part(model: Layout, travelling: FlatReader) -> FlatReader:
    """The control variate in what travels."""
    cut, size = _cut(model)
    return Pieces((size, travelling, cut))


def _cut(model: Layout) -> tuple[int, int]:
    """Where in the model's buffer the control variate stands when both travel, and its size."""
    return next((tensor.offset, tensor.nbytes) for tensor in with_control(model).tensors if tensor.name == CONTROL)

"""A PyTorch model whose parameters and buffers are views into one flat buffer.

Loading weights is then one read into the buffer, and an update is one subtraction, whatever the number of tensors.
Tensors that are no part of the model can lie beside it in the buffer, and go where it goes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from gptfl_dist.errors import ModelError
from gptfl_dist.weights.file import BLOCK, WeightsFile, overwrite_weights, write_weights
from gptfl_dist.weights.layout import Layout

_DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "F16": torch.float16,
    "BF16": torch.bfloat16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state by name, a tensor shared by several names under the first only."""
    named: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            named[name] = tensor
    return named


def layout_of(model: nn.Module) -> Layout:
    """The layout of a model's parameters and persistent buffers. Raises ModelError for an unsupported dtype."""
    return _layout(_named_tensors(model))


def _layout(named: Mapping[str, torch.Tensor]) -> Layout:
    triples = []
    for name, tensor in named.items():
        if tensor.dtype not in _NAMES:
            raise ModelError(f"tensor {name} has dtype {tensor.dtype}, expected one of {', '.join(_DTYPES)}")
        triples.append((name, tuple(tensor.shape), _NAMES[tensor.dtype]))
    return Layout.of(triples)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a one-dimensional uint8 tensor on the CPU."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]  # numpy's stubs call no array a buffer before Python 3.12


def _square(numbers: torch.Tensor) -> float:
    """The sum of squares; NaN where a number is NaN or infinite."""
    square = float(torch.dot(numbers, numbers))
    if not math.isfinite(square):  # squares of large numbers overflow where the numbers are finite
        square = float(torch.dot(numbers.double(), numbers.double())) if numbers.isfinite().all() else math.nan
    return square


class FlatModel:
    """Binds a model to one flat buffer: a uint8 tensor of `layout.nbytes` on the model's device."""

    def __init__(self, model: nn.Module, beside: Mapping[str, torch.Tensor] | None = None) -> None:
        """`beside` names tensors on the same device that are to lie in the buffer too."""
        self.model = model
        self.beside = dict(beside or {})
        named = self._named()
        self.layout = _layout(named)
        device = next((tensor.device for tensor in named.values()), torch.device("cpu"))
        self.buffer = torch.empty(self.layout.nbytes, dtype=torch.uint8, device=device)
        for spec in self.layout.tensors:
            view = self.buffer[spec.offset : spec.offset + spec.nbytes].view(_DTYPES[spec.dtype]).view(spec.shape)
            view.copy_(named[spec.name].detach())
            named[spec.name].data = view

    def _named(self) -> dict[str, torch.Tensor]:
        return {**_named_tensors(self.model), **self.beside}

    @property
    def parameters(self) -> frozenset[str]:
        """The names of the tensors that are parameters of the model; the others are buffers, or lie beside it."""
        named = _named_tensors(self.model)
        return frozenset(name for name, tensor in named.items() if isinstance(tensor, nn.Parameter))

    @property
    def bound(self) -> bool:
        """False once tensors of the model lie elsewhere, as after `model.to(device)` or `model.half()`."""
        named, start = self._named(), self.buffer.data_ptr()
        return all(
            spec.name in named and named[spec.name].data_ptr() == start + spec.offset
            for spec in self.layout.tensors
            if spec.nbytes
        )

    def load(self, path: Path) -> None:
        """Reads a weights file into the buffer. Raises ModelError if its layout is another."""
        with WeightsFile(path) as file:
            difference = self.layout.difference(file.layout)
            if difference:
                raise ModelError(f"{path} does not fit: {difference}", hint="use one model definition on all sides")
            if self.buffer.device.type == "cpu":
                file.read_into(0, _bytes_of(self.buffer))
            else:
                staging = torch.empty_like(self.buffer, device="cpu")
                file.read_into(0, _bytes_of(staging))
                self.buffer.copy_(staging)

    def take(self, weights: torch.Tensor) -> None:
        """Copies a flat buffer, from whatever device."""
        self.buffer.copy_(weights)

    def become_update(self, received: torch.Tensor, factor: float) -> float:
        """Turns the weights into the update since `received`, in place; floating numbers times `factor`.

        Returns the Euclidean norm of the floating numbers before that, NaN where one of them is NaN or infinite.
        A BOOL keeps the local value itself.
        """
        square = 0.0
        for segment in self.layout.segments():
            if segment.dtype == "BOOL":
                continue
            dtype = _DTYPES[segment.dtype]
            for start in range(segment.start, segment.stop, BLOCK):
                stop = min(start + BLOCK, segment.stop)
                update = self.buffer[start:stop].view(dtype)
                update -= received[start:stop].to(self.buffer.device).view(dtype)
                if dtype.is_floating_point:
                    square += _square(update)
                    update *= factor
        return math.sqrt(square)

    def save(self, path: Path) -> str:
        """Writes the buffer as a weights file; returns its BLAKE3 digest."""
        flat = _bytes_of(self.buffer.cpu())
        return write_weights(path, self.layout, (flat[i : i + BLOCK] for i in range(0, len(flat), BLOCK)))

    def release(self) -> None:
        """Gives every tensor memory of its own, for code that takes tensors of one buffer for shared ones."""
        for tensor in _named_tensors(self.model).values():
            tensor.data = tensor.data.clone()

    def save_update(self, received: Path, path: Path) -> str:
        """Writes the update (the buffer minus the weights in `received`) as a weights file; returns its BLAKE3 digest.

        Works block by block, so it takes no second model in memory, and over the pages of the update before.
        Subtraction is in each tensor's own dtype; a BOOL carries the local value itself.
        """
        flat = self.buffer.cpu()
        memory = torch.empty(2, BLOCK, dtype=torch.uint8)

        def blocks(file: WeightsFile) -> Iterator[memoryview]:
            for segment in self.layout.segments():
                for start in range(segment.start, segment.stop, BLOCK):
                    stop = min(start + BLOCK, segment.stop)
                    local = flat[start:stop]
                    if segment.dtype == "BOOL":
                        yield _bytes_of(local)
                        continue
                    base, update = memory[:, : stop - start]
                    file.read_into(start, _bytes_of(base))
                    dtype = _DTYPES[segment.dtype]
                    torch.sub(local.view(dtype), base.view(dtype), out=update.view(dtype))
                    yield _bytes_of(update)

        with WeightsFile(received) as file:
            return overwrite_weights(path, self.layout, blocks(file))

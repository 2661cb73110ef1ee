"""Flat buffers in memory, with the tensors in them."""

from __future__ import annotations

import torch

from gptfl_dist.weights import FLOATS, Layout

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Flat:
    """A flat buffer in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert offset + len(buffer) <= len(self.data)
        buffer[:] = self.data[offset : offset + len(buffer)]


def flat_of(layout: Layout, seed: int, scale: float = 1.0) -> tuple[Flat, dict[str, torch.Tensor]]:
    """A random flat buffer and the tensors in it, by name."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in layout.tensors:
        if spec.dtype in FLOATS:
            values = (torch.randn(spec.shape, generator=generator, dtype=torch.float64) * scale).to(TORCH[spec.dtype])
        else:
            values = torch.randint(0, 2 if spec.dtype == "BOOL" else 40, spec.shape, generator=generator)
            values = values.to(TORCH[spec.dtype])
        tensors[spec.name] = values
    raw = b"".join(tensors[s.name].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for s in layout.tensors)
    return Flat(raw), tensors

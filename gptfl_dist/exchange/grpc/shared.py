"""Frames of weights that several silos read.

Silos that are given an order at once read on side by side. The last few frames are kept, so each is read from its file,
and packed, once for all of them; for a silo that lags behind it is made anew.
"""

from __future__ import annotations

from gptfl_dist.exchange.grpc import frames
from gptfl_dist.weights import WeightsFile

_KEPT = 32 << 20  # bytes; silos that read on side by side drift apart by some of them


class SharedFrames:
    """Makes the frames of weights, `chunk` bytes of a flat buffer each."""

    def __init__(self, chunk: int, *, packed: bool) -> None:
        self._chunk = chunk
        self._packed = packed
        self._kept: dict[tuple[str, int], tuple[bytes, int]] = {}

    def frame(self, digest: str, weights: WeightsFile, offset: int) -> tuple[bytes, int]:
        """The frame from byte `offset` of the weights of this digest, and how many bytes of content it carries.

        Raises StorageError where the file ends early.
        """
        key = digest, offset
        if key not in self._kept:
            while len(self._kept) >= max(1, _KEPT // self._chunk):
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self._made(weights, offset)
        return self._kept[key]

    def _made(self, weights: WeightsFile, offset: int) -> tuple[bytes, int]:
        size = min(self._chunk, weights.nbytes - offset)
        if self._packed:
            return frames.pack_chunk(offset, weights.read(offset, size), frames.width_of(weights.layout))
        return frames.read_chunk(weights, offset, size), size

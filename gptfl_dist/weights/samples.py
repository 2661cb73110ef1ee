"""Samples that travel as weights do: a file of two tensors, `images` and the indices of their `labels`.

So they are handed out, checked by their digest, resumed where a line broke, and encrypted at rest by what does that for
weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from gptfl_dist.weights.layout import Layout

IMAGES, LABELS = "images", "labels"


def samples_layout(shape: Sequence[int], count: int) -> Layout:
    """The layout of `count` samples of one shape (channels, height, width)."""
    return Layout.of([(IMAGES, (count, *shape), "U8"), (LABELS, (count,), "I64")])


def count_of(layout: Layout) -> int:
    """How many samples a file of this layout holds."""
    return next(tensor.shape[0] for tensor in layout.tensors if tensor.name == LABELS)

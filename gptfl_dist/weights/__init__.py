"""Weights as one flat buffer: its layout, its file, and PyTorch models bound to it (`flat`, which loads torch)."""

from gptfl_dist.weights.file import BLOCK, FlatReader, WeightsFile, digest_of, overwrite_weights, write_weights
from gptfl_dist.weights.layout import FLOATS, ITEM_SIZE, Layout, Segment, TensorSpec

__all__ = [
    "BLOCK",
    "FLOATS",
    "ITEM_SIZE",
    "FlatReader",
    "Layout",
    "Segment",
    "TensorSpec",
    "WeightsFile",
    "digest_of",
    "overwrite_weights",
    "write_weights",
]

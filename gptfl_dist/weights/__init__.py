"""Weights as one flat buffer: its layout, its file, and PyTorch models bound to it (`flat`, which loads torch)."""

from gptfl_dist.weights.codec import Codec
from gptfl_dist.weights.file import BLOCK, WeightsFile, write_weights
from gptfl_dist.weights.layout import FLOATS, ITEM_SIZE, Layout, Segment, TensorSpec

__all__ = ["BLOCK", "FLOATS", "ITEM_SIZE", "Codec", "Layout", "Segment", "TensorSpec", "WeightsFile", "write_weights"]

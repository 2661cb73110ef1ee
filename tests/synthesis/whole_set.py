"""A synthetic set read back as arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gptfl_dist.synthesis.store import complete_manifest, read_shard


def load_images(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A finished set in storage order: images uint8 (N, H, W, C), of clips their spectrograms, and labels int64 (N,).

    Raises StorageError if the set is missing, unfinished or damaged.
    """
    manifest = complete_manifest(folder)
    task = manifest.request.task.shown_as
    channels, height, width = task.shape
    images = np.empty((manifest.request.count, height, width, channels), np.uint8)
    labels = np.empty(manifest.request.count, np.int64)
    at = 0
    for shard in manifest.shards:
        pictures, positions = read_shard(folder, shard, task)
        images[at : at + shard.rows] = pictures
        labels[at : at + shard.rows] = positions
        at += shard.rows
    return images, labels

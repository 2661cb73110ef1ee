"""Synthetic samples in a silo's own training set: drawn at the coordinator, written, read at the silo, and mixed in.

All silos are given the same samples. What of them is trained on each silo decides by itself, by its own labels: all of
them, as FedGC does (arXiv:2312.05807), or only what fills the labels that it lacks, as Gen-FedSD does
(arXiv:2405.07925). A mixed set is shuffled into batches like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from gptfl_dist.config.mixing import HandedOut
from gptfl_dist.config.task import Task
from gptfl_dist.errors import DataError
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.weights import BLOCK, WeightsFile, write_weights
from gptfl_dist.weights.samples import samples_layout


def drawn(data: ImageSet, per_label: int, seed: int) -> ImageSet:
    """At most `per_label` samples of each label, drawn by the seed; of a label that has fewer, all."""
    generator = np.random.default_rng(seed)
    labels = data.labels.numpy()
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:per_label] for label in range(len(data.label_names))
    ]
    return data.subset(np.concatenate(chosen))


def write_samples(path: Path, data: ImageSet) -> None:
    """Writes samples, whole or not at all. Raises StorageError."""
    write_weights(path, samples_layout(data.images.shape[1:], len(data)), _blocks(data))


def _blocks(data: ImageSet) -> Iterator[memoryview]:
    """The flat buffer: the labels first, whose numbers are the wider ones."""
    for part in (data.labels.numpy().astype("<i8"), data.images.contiguous().numpy()):
        whole = part.reshape(-1).view(np.uint8).data
        for start in range(0, len(whole), BLOCK):
            yield whole[start : start + BLOCK]


def blank_samples(task: Task, count: int, label_names: tuple[str, ...]) -> ImageSet:
    """Room for so many samples."""
    images = torch.zeros((count, *task.shape), dtype=torch.uint8)
    return ImageSet(images, torch.zeros(count, dtype=torch.int64), label_names)


def read_samples(path: Path, samples: ImageSet) -> None:
    """Reads a file into samples that have room for it. Raises DataError where it holds others, or has been damaged."""
    labels = samples.labels.numpy()  # its memory, as that of the images
    with WeightsFile(path) as file:
        expected = samples_layout(samples.images.shape[1:], len(samples))
        if difference := expected.difference(file.layout):
            raise DataError(f"{path}: the synthetic samples are not those that the plan speaks of: {difference}")
        file.read_into(0, labels.view(np.uint8).data)
        file.read_into(labels.nbytes, samples.images.numpy().reshape(-1).data)
    known = len(samples.label_names)
    if labels.min() < 0 or labels.max() >= known:
        wrong = int(labels.min()) if labels.min() < 0 else int(labels.max())
        raise DataError(
            f"{path}: a synthetic sample has the label {wrong}, and the federation's are 0 to {known - 1}",
            hint="they are the coordinator's: tell its operator",
        )


def mixed(own: ImageSet, given: ImageSet, told: HandedOut) -> ImageSet:
    """The silo's own samples, and of those that it was given what is to be used.

    For missing labels that is of each label as many as are left until there are `per_label`, the first ones.
    """
    if told.use == "all":
        used = torch.arange(len(given))
    else:
        counts = torch.bincount(own.labels, minlength=len(own.label_names)).tolist()
        wanted = [torch.nonzero(given.labels == label).flatten() for label in range(len(own.label_names))]
        used = torch.cat([there[: max(0, told.per_label - count)] for there, count in zip(wanted, counts, strict=True)])
    images = torch.cat([own.images, given.images[used]])
    return ImageSet(images, torch.cat([own.labels, given.labels[used]]), own.label_names)

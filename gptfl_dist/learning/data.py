"""Labelled images in memory, and how they are read from what a silo has on its disk.

The samples' label names are listed first (`sources`) and the samples decoded second (`images`, or `audio` for clips,
whose spectrograms are images from there on), so that a label the federation does not know is found before an hour of
decoding. The data's names become indices into the federation's labels, by name and never by position.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gptfl_dist.audio.clip import read_clip
from gptfl_dist.audio.spectrogram import spectrogram
from gptfl_dist.config.silo import Data
from gptfl_dist.config.task import Task
from gptfl_dist.errors import DataError
from gptfl_dist.learning.images import pixels
from gptfl_dist.learning.sources import CHECK, Kind, Raw, kind_of, list_samples

_MOST_NAMED = 10  # labels in one message


@dataclass(frozen=True, eq=False)
class ImageSet:
    """`images` uint8 (N, C, H, W), `labels` int64 (N,) as indices into `label_names`.

    Of clips the images are their spectrograms, (N, 1, bins, windows).
    """

    images: torch.Tensor
    labels: torch.Tensor
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray | torch.Tensor | Sequence[int]) -> ImageSet:
        """The samples at `indices`, copied, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return ImageSet(self.images[chosen], self.labels[chosen], self.label_names)


def load_images(data: Data, task: Task, labels: Sequence[str]) -> ImageSet:
    """Reads `data.path` into images of the task's shape, labelled by the federation's `labels`.

    Raises DataError, naming the file, where something is missing, unreadable, empty or has an unknown label.
    """
    with _reading(data.path):
        samples = list_samples(data, task.kind)
        targets = _translate(samples.labels, data.labels, labels, data.path)
        images = np.empty((len(targets), *task.shape), dtype=np.uint8)
        for index, (where, raw) in enumerate(samples.raw):
            images[index] = _image(where, raw, task)
    return ImageSet(torch.from_numpy(images), torch.tensor(targets, dtype=torch.int64), tuple(labels))


def find_kind(data: Data) -> Kind:
    """Whether `data.path` holds images or audio, by its first file or column. Raises DataError like `load_images`."""
    with _reading(data.path):
        return kind_of(data)


def count_labels(data: Data, kind: Kind) -> dict[str, int]:
    """How many samples `data.path` has of each label, by the names that `data.labels` gives them. Decodes none.

    Raises DataError like `load_images`.
    """
    with _reading(data.path):
        return dict(Counter(data.labels.get(name, name) for name in list_samples(data, kind).labels))


def split(data: ImageSet, validation_share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """A training and a validation part: disjoint, every label in both by its share as far as counts allow.

    Each part has at least one sample. Raises DataError for fewer than two samples.
    """
    if len(data) < 2:
        raise DataError(
            f"{len(data)} sample(s) cannot be split into a training and a validation part",
            hint="give at least two samples",
        )
    labels = data.labels.numpy()
    counts = np.bincount(labels, minlength=len(data.label_names))
    wanted = counts * validation_share
    total = min(max(round(len(data) * validation_share), 1), len(data) - 1)
    # Whole samples first, then one by one to the label that is furthest below its share. A label gives its last
    # sample to validation only when every other label has one left: what is never trained on is never learnt.
    taken = np.minimum(np.floor(wanted).astype(np.int64), np.maximum(counts - 1, 0))
    while taken.sum() < total:
        lacking = wanted - taken
        open_labels = taken < counts - 1
        if not open_labels.any():
            open_labels = taken < counts
        taken[np.argmax(np.where(open_labels, lacking, -np.inf))] += 1
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(data), dtype=bool)
    for label, count in enumerate(taken):
        held_out[generator.permutation(np.flatnonzero(labels == label))[:count]] = True
    return data.subset(np.flatnonzero(~held_out)), data.subset(np.flatnonzero(held_out))


def _translate(found: list[str], renames: dict[str, str], labels: Sequence[str], path: Path) -> list[int]:
    """The data's label names as indices into the federation's labels."""
    index_of = {label: index for index, label in enumerate(labels)}
    counts = Counter(found)
    unknown = [name for name in counts if renames.get(name, name) not in index_of]
    if unknown:
        told = [
            f"{name!r}{f' (renamed to {renames[name]!r} by data.labels)' if name in renames else ''} of "
            f"{counts[name]} sample(s)"
            for name in unknown[:_MOST_NAMED]
        ]
        more = f" and {len(unknown) - _MOST_NAMED} more" if len(unknown) > _MOST_NAMED else ""
        raise DataError(
            f"the label {', '.join(told)}{more} in {path} is none of the federation's labels: {', '.join(labels)}",
            hint=_advice(renames.get(unknown[0], unknown[0]), unknown[0], labels),
        )
    return [index_of[renames.get(name, name)] for name in found]


def _advice(label: str, name: str, labels: Sequence[str]) -> str:
    """A label is proposed only where it is nearly the same word: who obeys a wrong guess trains the wrong thing."""
    near = difflib.get_close_matches(label, labels, n=1, cutoff=0.6)
    meant = f"'{name}: {near[0]}', if that is meant" if near else f"'{name}: ...' with the federation's name for it"
    return f"add {meant}, to data.labels in the silo file, or remove those samples"


def _image(where: str, raw: Raw, task: Task) -> np.ndarray:
    """A sample as uint8 of the task's shape."""
    if task.kind == "image":
        return pixels(where, raw, task)
    assert not isinstance(raw, np.ndarray)  # no form of data has clips as arrays
    return spectrogram(read_clip(where, raw, task.sample_rate), task)[None]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a file of the data into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}", hint=CHECK) from error

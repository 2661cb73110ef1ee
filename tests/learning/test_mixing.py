"""Synthetic samples that a silo is given: which are drawn, how they travel, and which of them a silo trains on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptfl_dist.config.mixing import HandedOut, Use
from gptfl_dist.config.task import Task
from gptfl_dist.errors import DataError, ModelError
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.mixing import blank_samples, drawn, mixed, read_samples, write_samples
from gptfl_dist.weights import WeightsFile
from gptfl_dist.weights.samples import count_of, samples_layout

TASK = Task(size=3)
NAMES = ("left", "right", "none")
LABELS = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def images(labels: list[int], first: int = 0) -> ImageSet:
    """Images of which each is known by its brightness."""
    pixels = torch.arange(first, first + len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 3, 3)
    return ImageSet(pixels.contiguous(), torch.tensor(labels, dtype=torch.int64), NAMES)


def known(data: ImageSet) -> list[tuple[int, int]]:
    """Each sample's brightness and label."""
    return list(zip(data.images[:, 0, 0, 0].tolist(), data.labels.tolist(), strict=True))


def told(count: int, use: Use, per_label: int) -> HandedOut:
    return HandedOut(digest="0" * 64, count=count, use=use, per_label=per_label)


@given(labels=LABELS, per_label=st.integers(1, 20), seed=st.integers(0, 5))
def test_so_many_of_each_label_are_drawn_as_there_are(labels: list[int], per_label: int, seed: int) -> None:
    data = images(labels)
    chosen = drawn(data, per_label, seed)
    assert Counter(chosen.labels.tolist()) == Counter(
        {label: min(count, per_label) for label, count in Counter(labels).items()}
    )
    assert len(set(known(chosen))) == len(chosen)
    assert set(known(chosen)) <= set(known(data))
    assert known(drawn(data, per_label, seed)) == known(chosen)


@given(own=LABELS, synthetic=LABELS, per_label=st.integers(1, 20))
def test_labels_that_a_silo_lacks_are_filled_and_no_others(
    own: list[int], synthetic: list[int], per_label: int
) -> None:
    mine, theirs = images(own), images(synthetic, first=100)
    mixture = mixed(mine, theirs, told(len(theirs), "missing", per_label))
    assert known(mixture)[: len(mine)] == known(mine)
    has, there, comes_to = Counter(own), Counter(synthetic), Counter(mixture.labels.tolist())
    for label in range(3):
        assert comes_to[label] == max(has[label], min(per_label, has[label] + there[label]))
    assert set(known(mixture)[len(mine) :]) <= set(known(theirs))


def test_all_of_them_are_mixed_in_where_that_is_asked_for() -> None:
    mine, theirs = images([0, 0, 1]), images([0, 2], first=100)
    assert known(mixed(mine, theirs, told(2, "all", 1))) == [*known(mine), *known(theirs)]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path, data = tmp_path / "samples.safetensors", images([2, 0, 1, 1])
    write_samples(path, data)
    with WeightsFile(path) as file:
        assert file.layout == samples_layout(TASK.shape, 4)
        assert count_of(file.layout) == 4
    found = blank_samples(TASK, 4, NAMES)
    read_samples(path, found)
    assert torch.equal(found.images, data.images)
    assert torch.equal(found.labels, data.labels)


@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_a_label_that_the_federation_has_not_is_refused(tmp_path: Path, label: int) -> None:
    path = tmp_path / "samples.safetensors"
    write_samples(path, images([0, label]))
    with pytest.raises(DataError, match=rf"has the label {label}, and the federation's are 0 to 2"):
        read_samples(path, blank_samples(TASK, 2, NAMES))


def test_other_samples_than_the_plan_speaks_of_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.safetensors"
    write_samples(path, images([0, 1]))
    with pytest.raises(DataError, match="not those that the plan speaks of: tensor"):
        read_samples(path, blank_samples(TASK, 3, NAMES))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="cut short or padded"):
        read_samples(path, blank_samples(TASK, 2, NAMES))


def test_the_flat_buffer_is_what_its_layout_says(tmp_path: Path) -> None:
    path = tmp_path / "samples.safetensors"
    write_samples(path, images([1, 2]))
    with WeightsFile(path) as file:
        content = file.read(0, file.nbytes)
    assert np.frombuffer(content, "<i8", 2).tolist() == [1, 2]
    assert set(content[16:25]) == {0}
    assert set(content[25:]) == {1}

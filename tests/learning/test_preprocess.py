"""Normalisation and augmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gptfl_dist.config.task import Task
from gptfl_dist.learning.augment import augment
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.preprocess import normalise


@given(
    arrays(np.uint8, (2, 3, 4, 4)),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.lists(st.floats(0.1, 2), min_size=3, max_size=3),
)
def test_normalise_is_pixel_minus_mean_over_std(images: np.ndarray, mean: list[float], std: list[float]) -> None:
    before = images.copy()
    result = normalise(torch.from_numpy(images), Task(size=4, channels=3, mean=mean, std=std))
    expected = (images / 255 - np.array(mean).reshape(1, 3, 1, 1)) / np.array(std).reshape(1, 3, 1, 1)
    assert result.dtype == torch.float32
    assert np.allclose(result.numpy(), expected, atol=1e-5)
    assert np.array_equal(images, before)


@given(arrays(np.uint8, (1, 3, 2, 2)))
def test_one_statistic_serves_all_channels(images: np.ndarray) -> None:
    pixels = torch.from_numpy(images)
    one = normalise(pixels, Task(channels=3, mean=[0.4], std=[0.2]))
    three = normalise(pixels, Task(channels=3, mean=[0.4] * 3, std=[0.2] * 3))
    assert torch.equal(one, three)


@pytest.mark.parametrize("shape", [(5, 1, 32, 32), (2, 3, 17, 24), (1, 1, 8, 8)])
def test_augment_keeps_shape_and_range(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    warped = augment(images, torch.Generator().manual_seed(1))
    assert warped.shape == images.shape
    assert images.min() <= warped.min()
    assert warped.max() <= images.max()


def test_augment_is_repeatable_and_differs_by_image_and_seed(digits: ImageSet) -> None:
    images = digits.images[:1].repeat(2, 1, 1, 1).float()
    first = augment(images, torch.Generator().manual_seed(1))
    assert torch.equal(first, augment(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(2)))
    assert not torch.equal(first[0], first[1])


def test_augment_leaves_the_global_generator_as_it_was() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    augment(torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    assert torch.equal(torch.rand(3), expected)


def test_augment_never_mirrors() -> None:
    """A bright left half stays on the left, in every one of many draws."""
    images = torch.zeros(200, 1, 32, 32)
    images[..., :16] = 1
    warped = augment(images, torch.Generator().manual_seed(0))
    left, right = warped[..., :16].mean(dim=(1, 2, 3)), warped[..., 16:].mean(dim=(1, 2, 3))
    assert bool((left > right).all())


def test_augment_is_mild(digits: ImageSet) -> None:
    """On average a digit keeps its ink and its place, within a tenth and a pixel."""
    images = digits.images[::5].float()
    warped = augment(images, torch.Generator().manual_seed(0))
    assert 0.9 < float(warped.sum() / images.sum()) < 1.1
    columns = torch.arange(32).float()

    def centre(batch: torch.Tensor) -> float:
        return float((batch.sum(dim=(0, 1, 2)) * columns).sum() / batch.sum())

    assert abs(centre(warped) - centre(images)) < 1

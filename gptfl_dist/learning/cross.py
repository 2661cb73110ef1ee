"""Cross-prediction: every image of a set is judged by a model that was trained without it, on the other folds.

So confident learning gets the probabilities by which it finds label errors (Northcutt, Jiang, Chuang 2021,
arXiv:1911.00068, section 3). Nothing but the set itself is needed. Most images must show their label: the models learn
from what they judge, and would learn an error that is the rule.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from gptfl_dist.config.task import Task
from gptfl_dist.config.training import Pretraining
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.evaluate import scores
from gptfl_dist.learning.pretrain import pretrain
from gptfl_dist.learning.seeding import derive_seed

FOLDS = 3
"""As many trainings, each on two thirds of the set. Five found no more of the labels that were changed for a test, in
twice the time; shorter trainings than those of pre-training are less sure, and lose more that is right."""


def cross_predict(
    build: Callable[[int], nn.Module],
    data: ImageSet,
    settings: Pretraining,
    task: Task,
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> np.ndarray:
    """The probability of every label for every image, float32 (N, L); each row comes from the model of its fold.

    `build` gives a new model for a seed. `progress(done, total)` counts batches over all folds. Sets torch's threads
    and global seeds like `pretrain`, and raises what it raises.
    """
    fold_of = folds(data.labels.numpy(), derive_seed(seed, "folds"))
    answers = np.empty((len(data), len(data.label_names)), dtype=np.float32)
    for fold in range(FOLDS):
        mine = np.flatnonzero(fold_of == fold)
        others = np.flatnonzero(fold_of != fold)
        model = build(derive_seed(seed, "model", fold))

        def report(done: int, total: int, fold: int = fold) -> None:
            progress(fold * total + done, FOLDS * total)

        pretrain(model, data.subset(others), settings, task, seed=derive_seed(seed, "fold", fold), progress=report)
        answers[mine] = scores(model, data.images[mine], task, device=settings.device).softmax(dim=1).numpy()
    return answers


def folds(labels: np.ndarray, seed: int) -> np.ndarray:
    """The fold of each image, 0 to FOLDS - 1, drawn by `seed`: of equal size, and so is each label's part of it.

    Equal means that two differ by at most one.
    """
    generator = np.random.default_rng(seed)
    # One label after the other is dealt out like cards, and each goes on where the one before it ended.
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold_of = np.empty(len(labels), dtype=np.int64)
    fold_of[order] = np.arange(len(labels)) % FOLDS
    return fold_of

"""What weights are measured by: the definitions written out over all samples at once, and scikit-learn's macro-F1."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch import nn

from gptfl_dist.config.task import Task
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.evaluate import BATCH_SIZE, Evaluation, evaluate
from gptfl_dist.learning.measures import BINS, macro_f1

LABELS = 4
TASK = Task(size=1, mean=[0.0], std=[1 / 255])


class Table(nn.Module):
    """Answers a picture whose one pixel is i with row i of a table of logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[images[:, 0, 0, 0].round().long()]


def evaluated(logits: torch.Tensor, truth: torch.Tensor) -> Evaluation:
    """Of samples with these logits, (N, L) with at most 256 different rows."""
    rows, pixels = logits.unique(dim=0, return_inverse=True)
    images = pixels.to(torch.uint8).reshape(-1, 1, 1, 1)
    names = tuple(str(label) for label in range(logits.shape[1]))
    return evaluate(Table(rows), ImageSet(images, truth, names), TASK, device="cpu")


def reference(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """The calibration error as Guo et al. define it, bin by bin."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    error = 0.0
    for b in range(1, BINS + 1):
        within = (confidence > (b - 1) / BINS) & (confidence <= b / BINS)
        if within.any():
            error += within.mean() * abs(right[within].mean() - confidence[within].mean())
    return error


@given(st.integers(1, 2 * BATCH_SIZE + 3), st.integers(2, 6), st.sampled_from([0.1, 1.0, 5.0]), st.integers(0, 2**32))
def test_measures_are_those_of_all_samples_at_once(count: int, labels: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(min(count, 250), labels, generator=generator) * spread)[torch.arange(count) % 250]
    truth = torch.randint(0, labels, (count,), generator=generator)
    measures = evaluated(logits, truth).measures
    answers = logits.argmax(dim=1)
    assert measures.accuracy == pytest.approx(float((answers == truth).double().mean()))
    assert measures.loss == pytest.approx(
        float(nn.functional.cross_entropy(logits.double(), truth)), abs=1e-5, rel=1e-5
    )
    assert measures.calibration_error == pytest.approx(reference(logits.double().softmax(1).numpy(), truth.numpy()))
    assert measures.macro_f1 == pytest.approx(f1_score(truth, answers, average="macro", zero_division=0))


def test_calibration_by_hand() -> None:
    """Four samples at 80 % of which three are right, and two at 60 % of which none is."""
    probabilities = torch.tensor([[0.8, 0.2]] * 4 + [[0.4, 0.6]] * 2, dtype=torch.float64)
    measures = evaluated(probabilities.log().float(), torch.tensor([0, 0, 0, 1, 0, 0])).measures
    assert measures.calibration_error == pytest.approx(4 / 6 * 0.05 + 2 / 6 * 0.6)


def test_who_is_sure_and_right_is_calibrated() -> None:
    truth = torch.arange(9) % 3
    measures = evaluated(nn.functional.one_hot(truth, 3).float() * 1000, truth).measures
    assert (measures.accuracy, measures.macro_f1, measures.calibration_error, measures.loss) == (1, 1, 0, 0)


@pytest.mark.parametrize(
    ("confusion", "expected"),
    [
        ([[2, 0, 0], [0, 3, 0], [0, 0, 0]], 1.0),  # nobody has the last label, and nothing was called so
        ([[2, 0, 0], [0, 2, 1], [0, 0, 0]], (1 + 0.8 + 0) / 3),  # nobody has it, but something was called so
        ([[2, 0, 0], [0, 2, 0], [0, 1, 0]], (1 + 0.8 + 0) / 3),  # who has it was never found
    ],
)
def test_a_label_without_samples_counts_only_if_something_was_called_so(
    confusion: list[list[int]], expected: float
) -> None:
    matrix = np.array(confusion)
    assert macro_f1(matrix) == pytest.approx(expected)
    true, answered = np.nonzero(matrix)
    samples = matrix[true, answered]
    theirs = f1_score(np.repeat(true, samples), np.repeat(answered, samples), average="macro", zero_division=0)
    assert macro_f1(matrix) == pytest.approx(theirs)


def test_weights_that_answer_with_nan_have_an_accuracy_and_no_more() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measures = evaluated(torch.full((5, LABELS), torch.nan), torch.zeros(5, dtype=torch.int64)).measures
    assert 0 <= measures.accuracy <= 1
    assert np.isnan(measures.loss)
    assert np.isnan(measures.calibration_error)

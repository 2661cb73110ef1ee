"""How good weights are on test data, in four numbers. Nothing here needs torch, so the coordinator can hold them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15
"""Bins of confidence, of equal width, as in the paper that `calibration_error` names."""


@dataclass(frozen=True, slots=True)
class Measures:
    """`accuracy`, `macro_f1` and `calibration_error` are of 0 to 1, `loss` is the mean cross entropy.

    Those that come of the probabilities, the last two, are NaN where the model answers with NaN.
    """

    accuracy: float
    macro_f1: float
    calibration_error: float
    loss: float


def macro_f1(confusion: np.ndarray) -> float:
    """The mean over labels of 2 TP / (2 TP + FP + FN); `confusion` (L, L) has a row for each true label.

    A label that no sample has and that was never answered has no F1 and is left out; one that no sample has but that
    was answered counts as 0. So do scikit-learn and torchmetrics.
    """
    right = confusion.diagonal()
    seen = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float(np.mean(2 * right[seen > 0] / seen[seen > 0]))


def calibration_error(samples: np.ndarray, right: np.ndarray, confidence: np.ndarray) -> float:
    """The expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3): sum_b n_b/n |acc(b) - conf(b)|.

    For each bin, (BINS,): how many samples it has, how many of them are right, and the sum of their confidence, which
    is the probability that the model gives to its answer.
    """
    return float(np.abs(right - confidence).sum() / samples.sum())

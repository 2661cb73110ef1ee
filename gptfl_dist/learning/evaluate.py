"""How good a model is on a data set: every sample counts once, the last batch too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gptfl_dist.config.task import Task
from gptfl_dist.errors import DataError
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.device import resolve_device
from gptfl_dist.learning.group import ALONE, Group
from gptfl_dist.learning.measures import BINS, Measures, calibration_error, macro_f1
from gptfl_dist.learning.models import logits
from gptfl_dist.learning.preprocess import normalise

BATCH_SIZE = 128


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `measures` say, of how many samples, and `confusion` int64 (L, L) with a row for each true label."""

    measures: Measures
    samples: int
    confusion: np.ndarray

    @property
    def accuracy(self) -> float:
        return self.measures.accuracy

    @property
    def loss(self) -> float:
        return self.measures.loss


def evaluate(model: nn.Module, data: ImageSet, task: Task, *, device: str, group: Group = ALONE) -> Evaluation:
    """Runs the model in evaluation mode over `data`. The model stays on the device, its mode is put back.

    A group's ranks share out the batches; each has the result. Of every batch only sums are kept.
    """
    if len(data) == 0:
        raise DataError("there is no sample to evaluate on", hint="give a data set with at least one image")
    labels = len(data.label_names)
    loss = torch.zeros(1, dtype=torch.float64)
    confusion = torch.zeros(labels * labels, dtype=torch.float64)
    bins = torch.zeros(3, BINS, dtype=torch.float64)
    truths = torch.split(data.labels, BATCH_SIZE)[group.rank :: group.size]
    batches = torch.split(data.images, BATCH_SIZE)[group.rank :: group.size]
    for images, truth in zip(batches, truths, strict=True):
        found = scores(model, images, task, device=device)
        answer = found.argmax(dim=1)
        loss += float(F.cross_entropy(found, truth, reduction="sum"))
        confusion += torch.bincount(truth * labels + answer, minlength=labels * labels)
        bins += _by_confidence(found, answer == truth)
    total = group.sum(torch.cat([loss, bins.view(-1), confusion])).numpy()
    mean_loss, by_bin = float(total[0]) / len(data), total[1 : 1 + 3 * BINS].reshape(3, BINS)
    matrix = total[1 + 3 * BINS :].astype(np.int64).reshape(labels, labels)
    accuracy = float(matrix.trace() / len(data))
    measures = Measures(accuracy, macro_f1(matrix), calibration_error(*by_bin), mean_loss)
    return Evaluation(measures, len(data), matrix)


def _by_confidence(found: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(3, BINS) For each bin the samples, those that are right, and the sum of confidence; `found` are logits (N, L).

    Bin b, from 1, holds a confidence above (b - 1) / BINS and up to b / BINS; NaN lies in the first.
    """
    confidence = found.double().softmax(dim=1).amax(dim=1)
    place = (confidence * BINS).ceil().nan_to_num(1).clamp(1, BINS).long() - 1
    weights = torch.stack([torch.ones_like(confidence), right.double(), confidence])
    return torch.stack([torch.bincount(place, row, minlength=BINS) for row in weights])


def scores(model: nn.Module, images: torch.Tensor, task: Task, *, device: str) -> torch.Tensor:
    """The model's logits for uint8 images (N, C, H, W): float32 (N, L) on the CPU.

    The model runs in evaluation mode and stays on the device; its mode is put back.
    """
    target = resolve_device(device)
    model.to(target)
    training = model.training
    model.eval()
    with torch.inference_mode():
        parts = [
            logits(model, normalise(batch.to(target), task)).float().cpu() for batch in torch.split(images, BATCH_SIZE)
        ]
    model.train(training)
    return torch.cat(parts)

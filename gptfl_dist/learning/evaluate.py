"""How good a model is on a data set: every sample counts once, the last batch too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gptfl_dist.config.federation import Task
from gptfl_dist.errors import DataError
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.device import resolve_device
from gptfl_dist.learning.group import ALONE, Group
from gptfl_dist.learning.models import logits
from gptfl_dist.learning.preprocess import normalise

BATCH_SIZE = 128


@dataclass(frozen=True, eq=False)
class Evaluation:
    """`accuracy` of 0 to 1, mean cross entropy `loss`, and `confusion` int64 (L, L) with a row for each true label."""

    accuracy: float
    loss: float
    samples: int
    confusion: np.ndarray


def evaluate(model: nn.Module, data: ImageSet, task: Task, *, device: str, group: Group = ALONE) -> Evaluation:
    """Runs the model in evaluation mode over `data`. The model stays on the device, its mode is put back.

    A group's ranks share out the batches; each has the result.
    """
    if len(data) == 0:
        raise DataError("there is no sample to evaluate on", hint="give a data set with at least one image")
    labels = len(data.label_names)
    loss = 0.0
    confusion = torch.zeros(labels * labels, dtype=torch.int64)
    truths = torch.split(data.labels, BATCH_SIZE)[group.rank :: group.size]
    batches = torch.split(data.images, BATCH_SIZE)[group.rank :: group.size]
    for images, truth in zip(batches, truths, strict=True):
        found = scores(model, images, task, device=device)
        loss += float(F.cross_entropy(found, truth, reduction="sum"))
        confusion += torch.bincount(truth * labels + found.argmax(dim=1), minlength=labels * labels)
    total = group.sum(torch.tensor([loss, *confusion.tolist()], dtype=torch.float64))
    loss, matrix = float(total[0]), total[1:].to(torch.int64).view(labels, labels).numpy()
    return Evaluation(float(matrix.trace() / len(data)), loss / len(data), len(data), matrix)


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

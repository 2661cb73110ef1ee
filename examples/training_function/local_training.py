"""A silo's own local training: Adam, and a term that keeps the weights near those received (FedProx).

`code.function` of the silo file names it. It is called once a round, in place of gptfl_dist.learning.local.train and
with the same arguments; only the model's weights, the number of samples and the metrics that it returns go on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gptfl_dist.config.plan import LocalTraining
from gptfl_dist.config.task import Task
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.preprocess import normalise
from gptfl_dist.learning.seeding import deterministic

PROXIMAL = 0.1
LEARNING_RATE = 2e-3


def train_proximal(
    model: nn.Module,
    data: ImageSet,
    settings: LocalTraining,
    task: Task,
    *,
    seed: int,
    device: str,
    progress: Callable[[int, int], None],
) -> dict[str, float]:
    """Trains `model` in place. Returns metrics; the silo's policy decides which of them may leave."""
    deterministic(seed, settings.threads)
    model.to(device).train()
    received = [parameter.detach().clone() for parameter in model.parameters()]
    loader = DataLoader(TensorDataset(data.images, data.labels), batch_size=settings.batch_size, shuffle=True)
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    total, done, losses, distance = settings.epochs * len(loader), 0, 0.0, torch.zeros(())
    for _ in range(settings.epochs):
        for images, labels in loader:
            loss = F.cross_entropy(model(normalise(images.to(device), task)), labels.to(device))
            distance = sum(
                (parameter - start).square().sum()
                for parameter, start in zip(model.parameters(), received, strict=True)
            )
            optimiser.zero_grad()
            (loss + PROXIMAL / 2 * distance).backward()
            optimiser.step()
            losses += loss.item()
            done += 1
            progress(done, total)
    return {"train_loss": losses / total, "distance": distance.item() ** 0.5}

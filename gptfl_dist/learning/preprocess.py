"""From stored pixels to what a model sees. Pre-training, every silo and every evaluation come through here."""

from __future__ import annotations

import torch

from gptfl_dist.config.task import Task
from gptfl_dist.learning.augment import augment
from gptfl_dist.learning.augment_audio import augment_spectrograms


def normalise(images: torch.Tensor, task: Task) -> torch.Tensor:
    """uint8 (N, C, H, W) to float32 of the same shape: (pixel / 255 - mean) / std, the task's statistics a channel."""
    mean = torch.tensor(task.mean, dtype=torch.float32, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(task.std, dtype=torch.float32, device=images.device).view(1, -1, 1, 1)
    return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def augmented(images: torch.Tensor, task: Task, generator: torch.Generator, *, batch: int, part: slice) -> torch.Tensor:
    """What `augmentation: true` makes of normalised images, the `part` of a `batch`: see `augment`."""
    change = augment if task.kind == "image" else augment_spectrograms
    return change(images, generator, batch=batch, part=part)

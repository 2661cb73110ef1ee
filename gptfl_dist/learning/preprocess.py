"""From stored pixels to what a model sees. Pre-training, every silo and every evaluation come through here."""

from __future__ import annotations

import torch

from gptfl_dist.config.federation import Task


def normalise(images: torch.Tensor, task: Task) -> torch.Tensor:
    """uint8 (N, C, H, W) to float32 of the same shape: (pixel / 255 - mean) / std, the task's statistics a channel."""
    mean = torch.tensor(task.mean, dtype=torch.float32, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(task.std, dtype=torch.float32, device=images.device).view(1, -1, 1, 1)
    return images.to(torch.float32).div_(255).sub_(mean).div_(std)

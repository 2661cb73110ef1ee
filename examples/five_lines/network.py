"""The hospital's network. The training script builds it, and the federation file names it under model.source."""

from __future__ import annotations

import torch
from torch import nn


class Network(nn.Module):
    """From float32 (N, 1, 8, 8) to the scores (N, labels)."""

    def __init__(self, labels: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(32 * 4 * 4, labels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images).flatten(1))


def build(label_count: int, task: object) -> nn.Module:
    """What model.source and code.model name: both sides of a federation call it with these two keywords."""
    return Network(label_count)

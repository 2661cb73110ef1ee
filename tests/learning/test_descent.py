"""The step of a silo's training is torch.optim.SGD's, without what that loads."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gptfl_dist.learning.descent import Descent


def sparse() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("make", "weight_decay"), [(dense, 0.0), (dense, 1e-2), (sparse, 0.0)])
def test_each_step_is_that_of_torch_bit_for_bit(make, momentum, weight_decay):
    torch.manual_seed(0)
    model = make()
    other = copy.deepcopy(model)
    rates = {"momentum": momentum, "weight_decay": weight_decay}
    ours = Descent(list(model.parameters()), learning_rate=0.1, **rates)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1, **rates)
    for step in range(6):
        data = torch.randint(0, 9, (8, 3))
        data = data if make is sparse else data.float()
        labels = torch.randint(0, 3, (8,))
        for each, optimiser in ((model, ours), (other, theirs)):
            optimiser.zero_grad()
            F.cross_entropy(each(data), labels).backward()
            if step == 2:
                next(iter(each.parameters())).grad = None  # a parameter that a batch does not reach stands still
            optimiser.step()
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_training_loads_no_compiler():
    program = """
import sys, torch
from gptfl_dist.config.task import Task
from gptfl_dist.config.plan import LocalTraining
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.local import train
images, labels = torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
rates = dict(learning_rate=0.1, momentum=0.9, weight_decay=0.01)
settings = LocalTraining(epochs=1, batch_size=4, augmentation=False, threads=1, clip_norm=1.0, **rates)
train(model, ImageSet(images, labels, ("left", "right")), settings, Task(size=4, channels=1), seed=0, device="cpu",
      progress=lambda done, total: None)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)

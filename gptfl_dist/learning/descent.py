"""Stochastic gradient descent by torch's own step, bit for bit that of `torch.optim.SGD`.

The first `torch.optim` object of a process loads torch's compiler, which nothing here uses: as much time and memory as
torch itself, in every silo's trainer. The step alone, a function, does without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.sgd import sgd


class Descent:
    """What an optimiser of these parameters does, from a step without momentum on."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, learning_rate: float, momentum: float, weight_decay: float
    ) -> None:
        self._parameters = parameters
        self._learning_rate = learning_rate
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._moving: dict[nn.Parameter, torch.Tensor | None] = dict.fromkeys(parameters)

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step down the gradients that are there."""
        moved = [parameter for parameter in self._parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
        moving = [self._moving[parameter] for parameter in moved]
        sgd(
            list[torch.Tensor](moved),
            gradients,
            moving,
            has_sparse_grad=any(gradient.is_sparse for gradient in gradients),
            lr=self._learning_rate,
            momentum=self._momentum,
            weight_decay=self._weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        self._moving.update(zip(moved, moving, strict=True))

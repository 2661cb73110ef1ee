"""FedProx (arXiv:1812.06127): a silo's training is pulled back to the weights that it received."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class Proximal:
    """Adds the gradient of mu / 2 * ||w - w_received||^2 (equation 2)."""

    def __init__(self, parameters: Sequence[nn.Parameter], strength: float) -> None:
        """`parameters` are as they were received."""
        self._parameters = parameters
        self._strength = strength
        self._received = [parameter.detach().clone() for parameter in parameters]

    def add(self) -> None:
        for parameter, anchor in zip(self._parameters, self._received, strict=True):
            pull = (parameter.detach() - anchor) * self._strength
            parameter.grad = pull if parameter.grad is None else parameter.grad + pull

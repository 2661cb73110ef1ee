"""SCAFFOLD at a silo (arXiv:1910.06378, algorithm 1, option II): its steps are corrected for where the others go.

The silo has a control variate c_i, an estimate of its own mean gradient; the server's, c, is that of all silos. Each of
the K local steps of rate eta is

    y <- y - eta (g(y) - c_i + c)         and afterwards         c_i+ = c_i - c + (x - y) / (K eta)

which is the mean gradient that the silo met, since plain SGD walks from x to y by its gradients. A gradient that is
clipped is clipped before the correction, so that this stays so. What is not trained in a round (the layers before the
head, buffers) keeps its c_i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gptfl_dist.weights import Layout
from gptfl_dist.weights.beside import control_places


class Control:
    """A silo's control variate in one training. `ours` is c and `own` c_i, float32, each a number for each of the
    model's; after the training `own` is c_i+."""

    def __init__(self, model: nn.Module, layout: Layout, ours: torch.Tensor, own: torch.Tensor) -> None:
        """`layout` is that of the model alone."""
        self.ours, self.own = ours, own
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._places = dict(control_places(layout))

    def start(self, parameters: Sequence[nn.Parameter]) -> None:
        """Before the first step, with the weights as they were received."""
        self._parameters = [(parameter, self._places[self._names[id(parameter)]]) for parameter in parameters]
        self._received = [parameter.detach().clone() for parameter in parameters]
        self._steps = 0

    def correct(self) -> None:
        """Corrects the gradients of one step."""
        self._steps += 1
        for parameter, place in self._parameters:
            correction = (self.ours[place] - self.own[place]).view(parameter.shape).to(parameter.dtype)
            parameter.grad = correction if parameter.grad is None else parameter.grad + correction

    def finish(self, rate: float) -> None:
        """After the last step: `own` becomes c_i+."""
        for (parameter, place), received in zip(self._parameters, self._received, strict=True):
            walked = (received - parameter.detach()).float().reshape(-1) / (self._steps * rate)
            self.own[place] += walked - self.ours[place]

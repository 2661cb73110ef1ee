"""MOON (arXiv:2103.16049): what a silo's model sees in an image is to be like what the received model sees in it, and
unlike what the silo's own model of its last round saw.

With z the features of the model that is trained, z_glob those of the received one and z_prev those of the model that
this silo came to last (section 3.3; mu times this is added to the loss):

    -log( exp(sim(z, z_glob) / tau) / (exp(sim(z, z_glob) / tau) + exp(sim(z, z_prev) / tau)) )

Features are what the last layer is given, whatever the model: the paper's projection head would be one more layer of
it. A silo that has no model of an earlier round trains without the term, which is what the paper's comes to where both
models are the same.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from gptfl_dist.learning.models import head_of, logits


class Features:
    """What a model's last layer was given when the model was called last: (N, D). A context manager."""

    def __init__(self, model: nn.Module) -> None:
        head = head_of(model)
        layer = head
        if isinstance(head, nn.ModuleList):  # which is never called itself
            layer = [child for child in head if next(child.parameters(), None) is not None][-1]
        self._hook = layer.register_forward_pre_hook(self._take)
        self._found: torch.Tensor | None = None

    def _take(self, module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        self._found = given[0].flatten(1)

    @property
    def found(self) -> torch.Tensor:
        assert self._found is not None
        return self._found

    def __enter__(self) -> Features:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._found = None


class Contrast:
    """The term of one training. A context manager: what it hooks into the models is removed at its end."""

    def __init__(self, model: nn.Module, previous: nn.Module, strength: float, temperature: float) -> None:
        """`model` is as it was received; `previous` is the silo's own of its last round."""
        self._received = copy.deepcopy(model).eval()
        self._previous = previous.eval()
        self._strength = strength
        self._temperature = temperature
        self._features = [Features(each) for each in (model, self._received, self._previous)]

    def loss(self, images: torch.Tensor) -> torch.Tensor:
        """mu times the mean over a batch that the model was called with last."""
        with torch.no_grad():
            for other in (self._received, self._previous):
                logits(other, images)
        ours, received, previous = (features.found for features in self._features)
        return self._strength * contrast(ours, received, previous, self._temperature)

    def __enter__(self) -> Contrast:
        return self

    def __exit__(self, *_: object) -> None:
        for features in self._features:
            features.__exit__()


def contrast(ours: torch.Tensor, received: torch.Tensor, previous: torch.Tensor, temperature: float) -> torch.Tensor:
    """The mean of the term over features (N, D) of the three models."""
    alike = [F.cosine_similarity(ours, other, dim=1) / temperature for other in (received, previous)]
    choices = torch.stack(alike, dim=1)
    return F.cross_entropy(choices, torch.zeros(len(choices), dtype=torch.int64, device=choices.device))

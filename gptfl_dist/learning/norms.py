"""FedBN (arXiv:2102.07623): a silo's normalisation layers are its own, for they hold the statistics of its data.

Their parameters and buffers are never sent: in an update they stand still. The paper keeps batch norms; here they are
all layers that normalise.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from gptfl_dist.errors import ModelError

_KINDS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class Norms:
    """The tensors of a model's normalisation layers. Raises ModelError where it has none."""

    def __init__(self, model: nn.Module) -> None:
        found = [tensor for module in model.modules() if isinstance(module, _KINDS) for tensor in _tensors(module)]
        self._tensors = list({id(tensor): tensor for tensor in found}.values())
        if not self._tensors:
            raise ModelError(
                "training.private_norms is true, and the model has no normalisation layer",
                hint="leave it out, or take a model with such layers (convnet has group norms)",
            )

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def save(self) -> torch.Tensor:
        """A copy of their content, uint8."""
        return torch.cat([tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in self._tensors])

    def load(self, content: torch.Tensor) -> None:
        """Puts back what `save` gave."""
        parts = torch.split(content, [tensor.nbytes for tensor in self._tensors])
        with torch.no_grad():
            for tensor, part in zip(self._tensors, parts, strict=True):
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]

"""What a silo keeps from one of its updates to the next, as strategies ask for it (`kept` of the plan), on its device.

It lies in a weights file of three flat tensors at most: `control`, c_i of SCAFFOLD; `previous`, MOON's local model, as
the bytes of its flat buffer; `norms`, the silo's own normalisation layers (FedBN), likewise. Which file is the right
one: see `weights.kept`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptfl_dist.config.plan import Kept
from gptfl_dist.learning.group import Group
from gptfl_dist.learning.norms import Norms
from gptfl_dist.learning.scaffold import Control
from gptfl_dist.weights.beside import CONTROL
from gptfl_dist.weights.flat import FlatModel, layout_of


def bind(model: nn.Module, kept: Sequence[Kept]) -> FlatModel:
    """The model bound to its flat buffer, with what travels beside it."""
    if "control" not in kept:
        return FlatModel(model)
    device = next(model.parameters()).device
    return FlatModel(model, {CONTROL: torch.zeros(layout_of(model).parameters, device=device)})


class Keeping:
    """What one silo keeps. In each round: `read`, `share`, `terms`, and after the training `note`, `save`."""

    def __init__(self, flat: FlatModel, kept: Sequence[Kept]) -> None:
        """`flat` is made by `bind`. Raises ModelError where the model has nothing of what is to be kept."""
        self._flat = flat
        self._model_layout = layout_of(flat.model)
        self._norms = Norms(flat.model) if "norms" in kept else None
        tensors = {}
        if "control" in kept:
            tensors["control"] = torch.zeros_like(flat.beside[CONTROL])
        if "previous" in kept:
            tensors["previous"] = torch.zeros_like(flat.buffer)
        if self._norms is not None:
            tensors["norms"] = torch.zeros_like(self._norms.save())
        self._kept = FlatModel(nn.Module(), tensors)
        self._known = False  # whether something was kept of an earlier update

    def read(self, path: Path | None) -> None:
        """Takes what was kept of the last update; None: nothing was. Raises ModelError where it is of another model."""
        self._known = path is not None
        if path is not None:
            self._kept.load(path)

    def share(self, group: Group) -> None:
        """Passes on to all ranks what rank 0 read, and puts the silo's own layers into the model as it was received."""
        self._known = group.tell({"known": self._known} if group.leader else None)["known"]
        if self._known:
            group.copy(self._kept.buffer)
        else:
            self._kept.buffer.zero_()
        if self._norms is not None:
            self._received_norms = self._norms.save()
            if self._known:
                self._norms.load(self._kept.beside["norms"])

    def terms(self) -> dict[str, Any]:
        """What the training is given of it: `control`, and `previous` where there is such a model."""
        kept, given = self._kept.beside, dict[str, Any]()
        if "control" in kept:
            ours = self._flat.beside[CONTROL]
            self._own = kept["control"].clone()
            given["control"] = Control(self._flat.model, self._model_layout, ours, kept["control"])
        if "previous" in kept and self._known:
            previous = FlatModel(copy.deepcopy(self._flat.model), copy.deepcopy(self._flat.beside))
            previous.take(kept["previous"])
            given["previous"] = previous.model
        return given

    def note(self) -> None:
        """Keeps what the training came to, and leaves in the model what is to be sent."""
        kept = self._kept.beside
        if "previous" in kept:
            kept["previous"].copy_(self._flat.buffer)
        if "control" in kept:
            ours = self._flat.beside[CONTROL].clone()
            self._flat.beside[CONTROL].add_(kept["control"] - self._own)  # the update is then the increase of c_i
            kept["control"].copy_(self._own + (self._flat.beside[CONTROL] - ours))  # by what is sent, to the last bit
        if self._norms is not None:
            kept["norms"].copy_(self._norms.save())
            self._norms.load(self._received_norms)

    def save(self, path: Path) -> str:
        """Writes what is kept; returns its BLAKE3 digest."""
        return self._kept.save(path)

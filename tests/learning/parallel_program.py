"""Trains small models in all ways, as one rank or one of several; rank 0 writes the weights to FILE (safetensors).

parallel_program.py FILE DEVICE
"""

from __future__ import annotations

import copy
import sys
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from gptfl_dist.config.plan import LocalTraining
from gptfl_dist.config.task import Model, Task
from gptfl_dist.config.training import Pretraining
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.device import resolve_device
from gptfl_dist.learning.group import Group, open_group
from gptfl_dist.learning.local import train
from gptfl_dist.learning.models import build_model
from gptfl_dist.learning.pretrain import pretrain
from gptfl_dist.learning.scaffold import Control
from gptfl_dist.weights.flat import layout_of

TASK = Task(size=16)
# 66 samples: the last batch of 32 has 2, fewer than three ranks.
SAMPLES = 66
LOCAL = LocalTraining(
    epochs=2, batch_size=32, learning_rate=0.05, momentum=0.9, weight_decay=0.01, proximal=0.1, clip_norm=1.0,
    augmentation=True, threads=1,
)  # fmt: skip


def quiet(done: int, total: int) -> None:
    """Progress that nobody watches."""


class Unused(nn.Sequential):
    """Has parameters that no input reaches, as some models have."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(TASK.size**2, 3), nn.Linear(2, 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self[1](self[0](images))
        return scores


def normed() -> nn.Module:
    """Two batch norms, over images and over features."""
    convolution = [nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*convolution, nn.Linear(196, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(), nn.Linear(8, 3))


def built(name: str) -> nn.Module:
    if name == "cnn":
        return build_model(Model(), TASK, 3, seed=0)
    torch.manual_seed(0)
    return normed() if name == "normed" else Unused()


def main(path: str, wanted: str, group: Group) -> None:
    device = str(resolve_device(group.device(wanted)))
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(SAMPLES) % 3
    images = torch.randint(0, 60, (SAMPLES, 1, 16, 16), generator=draw) + 60 * labels.view(-1, 1, 1, 1)
    data = ImageSet(images.to(torch.uint8), labels, ("a", "b", "c"))
    found: dict[str, torch.Tensor] = {}

    def note(name: str, model: nn.Module, *figures: float) -> None:
        found[name] = torch.cat([tensor.double().flatten().cpu() for tensor in model.state_dict().values()])
        found[f"{name}-figures"] = torch.tensor(figures)

    for name, trained in (("cnn", "all"), ("cnn", "head"), ("normed", "all"), ("normed", "head"), ("unused", "all")):
        model, settings = built(name), LOCAL.model_copy(update={"trained": trained})
        figures = train(model, data, settings, TASK, seed=1, device=device, progress=quiet, group=group)
        note(f"{name}-{trained}", model, figures["train_loss"], figures["samples"])
    for name in ("scaffold", "moon"):
        model = built("cnn")
        layout, previous = layout_of(model), copy.deepcopy(model).to(device)
        with torch.no_grad():
            for parameter in previous.parameters():
                parameter += (0.1 * torch.randn(parameter.shape, generator=draw)).to(device)
        ours, own = ((0.01 * torch.randn(layout.parameters, generator=draw)).to(device) for _ in range(2))
        control = Control(model, layout, ours, own) if name == "scaffold" else None
        settings = LOCAL.model_copy(update={"momentum": 0.0, "contrastive": 2.0})
        terms = {"control": control, "previous": None if control else previous}
        figures = train(model, data, settings, TASK, seed=1, device=device, progress=quiet, group=group, **terms)
        note(name, model, figures["train_loss"])
        found[f"{name}-own"] = own.cpu()
    model = built("cnn")
    central = Pretraining(epochs=2, batch_size=22, learning_rate=1e-3, threads=1, device=wanted)
    result = pretrain(model, data, central, TASK, seed=5, progress=quiet, group=group)
    note("pretrained", model, result.validation_loss, result.validation_accuracy, result.curve[0]["train_loss"])
    if group.leader:
        save_file(found, path)


if __name__ == "__main__":
    joined = open_group(timedelta(minutes=2))
    main(sys.argv[1], sys.argv[2], joined)
    joined.close()
    threads = [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]
    # The interpreter's end aborts the process now and then while such a thread is alive.
    assert not [name for name in threads if "gloo" in name], f"threads of the closed group live on: {threads}"

"""FedNCM (arXiv:2306.03937): a last layer that is made of the silos' class means in place of being trained.

With z what the last layer is given of a sample, a silo sends for each label the sum of z over its samples of it,
divided by the number of all its samples. The mean of that over silos, weighted by samples as that of any update, is in
proportion to the sum over all silos' samples. So it travels, is checked and is averaged as an update: as what is added
to the weight of the last layer. A label's row then becomes the direction of its sum, which is that of its mean, and
biases become 0: w_c = mu_c / |mu_c|. A label that no silo has gets a row of zeros.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gptfl_dist.config.task import Task
from gptfl_dist.errors import DataError, ModelError, first_line
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.evaluate import scores
from gptfl_dist.learning.models import head_of
from gptfl_dist.learning.seeding import deterministic


def add_sums(model: nn.Module, data: ImageSet, task: Task, *, device: str, threads: int) -> dict[str, float]:
    """Adds the sums of the samples to the last layer's weight, and changes nothing else.

    Returns `samples` and `seconds`. Raises ModelError where the last layer is none that class means can make, DataError
    where there is no data.
    """
    if len(data) == 0:
        raise DataError("there is no sample to take means of", hint="give a data set with at least one image")
    started = time.monotonic()
    deterministic(0, threads)
    layer = _last_layer(model, len(data.label_names))
    sums = torch.zeros(layer.weight.shape, dtype=torch.float64)
    done = 0

    def add(seen: torch.Tensor) -> None:
        nonlocal done
        sums.index_add_(0, data.labels[done : done + len(seen)], seen.cpu().double())
        done += len(seen)

    with _inputs_of(layer, add):
        scores(model, data.images, task, device=device)
    with torch.no_grad():
        layer.weight += (sums / len(data)).to(layer.weight)
    return {"samples": float(len(data)), "seconds": time.monotonic() - started}


def head_from_sums(model: nn.Module, summed: torch.Tensor, labels: int) -> None:
    """Makes the last layer of a model of what was added to its weight: `summed` is that weight afterwards."""
    layer = _last_layer(model, labels)
    with torch.no_grad():
        sums = summed.double() - layer.weight.double()
        lengths = sums.norm(dim=1, keepdim=True)
        layer.weight.copy_(torch.where(lengths > 0, sums / lengths, torch.zeros_like(sums)))
        if layer.bias is not None:
            layer.bias.zero_()


def last_weight(model: nn.Module, labels: int) -> torch.Tensor:
    """A copy of the last layer's weight, (labels, D). Raises ModelError where class means cannot make it."""
    return _last_layer(model, labels).weight.detach().clone()


def require_means(model: nn.Module, task: Task, labels: int) -> None:
    """Raises ModelError where class means cannot make the last layer: found out by two blank samples."""
    layer = _last_layer(model, labels)
    seen: list[tuple[int, ...]] = []
    trouble = ""
    with _inputs_of(layer, lambda given: seen.append(tuple(given.shape))):
        try:
            scores(model, torch.zeros((2, *task.shape), dtype=torch.uint8), task, device="cpu")
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            trouble = f" and fails: {first_line(error)}"
    expected = (2, layer.in_features)
    if trouble or seen != [expected]:
        found = " and ".join(map(str, seen)) or "nothing"
        raise ModelError(
            f"training.first_round is means, and the model gives its last layer {found} for 2 samples{trouble}, "
            f"expected {expected}, once",
            hint="give each sample one row of features and call the last layer once with them, or set "
            "training.first_round to train",
        )


@contextmanager
def _inputs_of(layer: nn.Linear, take: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Passes on what the layer is given, batch by batch, for as long as the block lasts."""
    hook = layer.register_forward_pre_hook(lambda _, given: take(given[0].detach()))
    try:
        yield
    finally:
        hook.remove()


def _last_layer(model: nn.Module, labels: int) -> nn.Linear:
    layers = [layer for layer in head_of(model).modules() if next(layer.parameters(recurse=False), None) is not None]
    layer = layers[-1] if layers else model
    if not isinstance(layer, nn.Linear) or layer.out_features != labels:
        raise ModelError(
            f"training.first_round is means, and the model's last layer is {type(layer).__name__}, expected a "
            f"Linear of {labels} outputs",
            hint="set training.first_round to train, and training.head_rounds to train the last layer first",
        )
    return layer

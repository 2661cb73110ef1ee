"""Data-parallel training: the ranks of a group share out each batch and come to what one rank would have come to.

A batch is drawn alike at every rank and cut into parts. Each rank's loss weighs as its part does, so that the mean
gradient, which DistributedDataParallel forms, is that of the whole batch. A batch smaller than the group is not cut:
all ranks train on the whole of it. Batch norms take their statistics over the whole batch; torch's SyncBatchNorm does
so on GPUs alone. What else a model draws or counts by the batch (dropout) differs by rank, as it does between seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from gptfl_dist.learning.group import Group


class Share:
    """One rank's share in the training of `network`, which is to be called in place of the model."""

    def __init__(self, network: nn.Module, group: Group) -> None:
        self.network = network
        self.whole = group.size == 1
        """Whether the part that was given last is the whole batch."""
        self.growth = 1.0
        """How many times as large as that part its batch is."""
        self._group = group

    def of(self, count: int) -> tuple[slice, float]:
        """This rank's part of a batch of so many samples, and the factor of its mean loss."""
        rank, size = self._group.rank, self._group.size
        self.whole = count < size or size == 1
        if self.whole:
            return slice(count), 1.0
        part = slice(rank * count // size, (rank + 1) * count // size)
        self.growth = count / (part.stop - part.start)
        return part, size / self.growth

    def mean(self, loss: torch.Tensor) -> float:
        """The mean loss of the whole batch, from what each rank has of it with its factor."""
        return float(self._group.sum(loss.detach().clone())) / self._group.size


@contextmanager
def shared(model: nn.Module, parameters: Sequence[nn.Parameter], group: Group) -> Iterator[Share]:
    """Trains `parameters` of the model, on its device, with the group for as long as the block lasts."""
    share = Share(model, group)
    if group.size == 1:
        yield share
        return
    trained = {id(parameter) for parameter in parameters}
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in trained]
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for parameter in others:
        parameter.requires_grad_(False)
    for norm in norms:
        norm.forward = partial(_normalise, norm, share, group)  # type: ignore[method-assign]  # for this block alone
    try:
        with group.unbroken():
            # A static graph may leave parameters out: some models have such that no input reaches.
            process_group = group.process_group(next(model.parameters()))
            share.network = DistributedDataParallel(model, process_group=process_group, static_graph=True)
            yield share
    finally:
        for norm in norms:
            del norm.forward
        for parameter in others:
            parameter.requires_grad_(True)


def _normalise(norm: _BatchNorm, share: Share, group: Group, images: torch.Tensor) -> torch.Tensor:
    """The forward of a batch norm, with the statistics of all ranks' parts."""
    if share.whole or not norm.training:
        return type(norm).forward(norm, images)
    values = images.float()
    axes = [0, *range(2, values.ndim)]
    shape = [1, -1, *[1] * (values.ndim - 2)]
    count = round(values.numel() // values.shape[1] * share.growth)
    mean = _sum(values.sum(axes), group) / count
    centred = values - mean.view(shape)
    variance = _sum(centred.square().sum(axes), group) / count
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            momentum = norm.momentum if norm.momentum is not None else 1 / int(norm.num_batches_tracked)
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(variance * (count / (count - 1)), momentum)
    normal = centred * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.affine:
        normal = normal * norm.weight.view(shape) + norm.bias.view(shape)
    return normal.to(images.dtype)


def _sum(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over all ranks, through which gradients flow back to each."""
    total: torch.Tensor = _Sum.apply(tensor, group)  # type: ignore[no-untyped-call]  # torch leaves it out
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return group.sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        group: Group = ctx.group
        return group.sum(gradients[0].clone()), None

"""What strategies add to a silo's training is what their papers say: SCAFFOLD, MOON, FedBN."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import ResNetConfig, ViTConfig

from gptfl_dist.config.plan import LocalTraining
from gptfl_dist.config.task import Model, Task
from gptfl_dist.errors import ModelError
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.local import train
from gptfl_dist.learning.models import build_model, logits
from gptfl_dist.learning.moon import Contrast, Features, contrast
from gptfl_dist.learning.norms import Norms
from gptfl_dist.learning.preprocess import normalise
from gptfl_dist.learning.scaffold import Control
from gptfl_dist.weights.flat import layout_of


def quiet(done: int, total: int) -> None:
    """Progress that nobody watches."""


def numbers(model: nn.Module, layout_names: list[str]) -> torch.Tensor:
    named = dict(model.named_parameters())
    return torch.cat([named[name].detach().flatten() for name in layout_names])


def gradient(model: nn.Module, data: ImageSet, task: Task, names: list[str]) -> torch.Tensor:
    loss = F.cross_entropy(logits(model, normalise(data.images, task)), data.labels)
    named = dict(model.named_parameters())
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, [named[name] for name in names])])


def move(model: nn.Module, names: list[str], by: torch.Tensor) -> None:
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, part in zip(names, torch.split(by, [named[name].numel() for name in names]), strict=True):
            named[name] += part.view(named[name].shape)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_scaffold_is_algorithm_1_with_option_2(
    digits: ImageSet, task: Task, settings: LocalTraining, clip: float | None
) -> None:
    """Three full-batch steps, written out; a gradient that is clipped is so before the correction."""
    data, rate, steps = digits.subset(range(0, 1500, 100)), 0.05, 3
    model = build_model(Model(), task, 10, seed=0)
    layout = layout_of(model)
    names = [tensor.name for tensor in layout.tensors]
    draw = torch.Generator().manual_seed(1)
    ours, own = (0.01 * torch.randn(layout.parameters, generator=draw) for _ in range(2))
    reference, before = copy.deepcopy(model), numbers(model, names)
    chosen = settings.model_copy(update={"epochs": steps, "learning_rate": rate, "clip_norm": clip})
    control = Control(model, layout, ours.clone(), own.clone())
    train(model, data, chosen, task, seed=1, device="cpu", progress=quiet, control=control)
    met = []
    for _ in range(steps):
        met.append(gradient(reference, data, task, names))
        if clip is not None:
            met[-1] *= clip / met[-1].norm()
        move(reference, names, -rate * (met[-1] - own + ours))
    torch.testing.assert_close(numbers(model, names), numbers(reference, names), atol=1e-5, rtol=1e-4)
    walked = (before - numbers(reference, names)) / (steps * rate)
    torch.testing.assert_close(control.own, own - ours + walked, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(control.own, torch.stack(met).mean(dim=0), atol=1e-4, rtol=1e-4)  # its mean gradient
    assert torch.equal(control.ours, ours)


def test_what_is_not_trained_in_a_round_keeps_its_control_variate(
    digits: ImageSet, task: Task, settings: LocalTraining
) -> None:
    model = build_model(Model(), task, 10, seed=0)
    layout = layout_of(model)
    own = torch.ones(layout.parameters)
    control = Control(model, layout, torch.zeros(layout.parameters), own)
    head = settings.model_copy(update={"trained": "head"})
    train(model, digits.subset(range(64)), head, task, seed=1, device="cpu", progress=quiet, control=control)
    changed = {name for name, place in control._places.items() if not (own[place] == 1).all()}
    assert changed == {"9.weight", "9.bias"}


@given(st.integers(0, 2**32), st.integers(1, 5), st.floats(0.1, 2.0))
def test_the_contrastive_loss_is_the_papers(seed: int, count: int, temperature: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    ours, received, previous = (torch.randn(count, 7, generator=draw, dtype=torch.float64) for _ in range(3))

    def alike(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.exp(float(a @ b / (a.norm() * b.norm())) / temperature)

    each = [
        -math.log(alike(z, g) / (alike(z, g) + alike(z, p))) for z, g, p in zip(ours, received, previous, strict=True)
    ]
    assert float(contrast(ours, received, previous, temperature)) == pytest.approx(sum(each) / count, rel=1e-9)


def test_moon_trains_by_both_losses(digits: ImageSet, task: Task, settings: LocalTraining) -> None:
    """One full-batch step, with the features taken out of the model by hand."""
    data = digits.subset(range(0, 1500, 100))
    model, previous = (build_model(Model(), task, 10, seed=seed) for seed in (0, 5))
    reference, received = copy.deepcopy(model), copy.deepcopy(model)
    chosen = settings.model_copy(update={"learning_rate": 0.1, "contrastive": 3.0, "temperature": 0.25})
    train(model, data, chosen, task, seed=1, device="cpu", progress=quiet, previous=previous)
    images = normalise(data.images, task)
    ours, theirs, old = (each[:-1](images) for each in (reference, received, previous))
    loss = F.cross_entropy(reference[-1](ours), data.labels) + 3 * contrast(ours, theirs.detach(), old.detach(), 0.25)
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    for mine, theirs_, step in zip(model.parameters(), reference.parameters(), gradients, strict=True):
        torch.testing.assert_close(mine.detach(), theirs_.detach() - 0.1 * step, atol=1e-5, rtol=1e-4)
    assert all(not module._forward_pre_hooks for each in (model, previous) for module in each.modules())


def test_a_silo_without_a_model_of_its_own_trains_without_the_contrast(
    digits: ImageSet, task: Task, settings: LocalTraining
) -> None:
    found = []
    for strength in (0.0, 5.0):
        model = build_model(Model(), task, 10, seed=0)
        chosen = settings.model_copy(update={"contrastive": strength})
        train(model, digits.subset(range(96)), chosen, task, seed=1, device="cpu", progress=quiet)
        found.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*found)


VIT = ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
    num_channels=1,
)  # fmt: skip
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_channels=1)


@pytest.mark.parametrize("model", ["cnn", "convnet", "vit", "resnet"])
def test_features_are_what_the_last_layer_is_given(model: str, tmp_path: Path) -> None:
    task = Task(size=16)
    chosen = Model(name=model) if model in ("cnn", "convnet") else None
    if chosen is None:
        {"vit": VIT, "resnet": RESNET}[model].save_pretrained(tmp_path)
        chosen = Model(name="transformers", source=str(tmp_path))
    network = build_model(chosen, task, 3, seed=0).eval()
    images = torch.rand(5, 1, 16, 16)
    with Features(network) as features, torch.no_grad():
        scores = logits(network, images)
        width = {"cnn": 64, "convnet": 512, "vit": 16, "resnet": 12}[model]
        assert features.found.shape == (5, width)
        last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
        torch.testing.assert_close(last(features.found), scores)


def test_the_contrast_pulls_features_towards_the_received_models() -> None:
    network = build_model(Model(), Task(size=16), 3, seed=0)
    other = build_model(Model(), Task(size=16), 3, seed=1)
    images = torch.rand(8, 1, 16, 16)
    with Contrast(network, other, 1.0, 0.5) as term:
        logits(network, images)
        at_the_start = float(term.loss(images).detach())
        with torch.no_grad():
            for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
                mine.copy_(theirs)
        logits(network, images)
        assert float(term.loss(images).detach()) > at_the_start


def test_norms_are_saved_and_put_back_whole() -> None:
    norms_ = [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.LayerNorm(784)]
    network = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), *norms_)
    norms = Norms(network)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    content = norms.save()
    draw = torch.Generator().manual_seed(0)
    found = network.train()(torch.rand(6, 1, 16, 16, generator=draw))
    (found * torch.rand(found.shape, generator=draw)).sum().backward()  # a plain sum of normed numbers never changes
    torch.optim.SGD(network.parameters(), 0.5).step()
    changed = {n for n, tensor in network.state_dict().items() if not torch.equal(tensor, before[n])}
    assert {"0.weight", "1.running_mean", "1.num_batches_tracked", "4.bias"} <= changed
    norms.load(content)
    left = {n for n, tensor in network.state_dict().items() if not torch.equal(tensor, before[n])}
    assert left == {"0.weight"}
    assert content.numel() == sum(before[n].nbytes for n in before if not n.startswith("0."))


def test_a_model_without_norms_keeps_none_private(task: Task) -> None:
    with pytest.raises(ModelError, match=r"training\.private_norms is true, and the model has no normalisation layer"):
        Norms(build_model(Model(), task, 10, seed=0))

"""Local training, evaluation and pre-training on real digits."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

from gptfl_dist.config.plan import LocalTraining
from gptfl_dist.config.task import Model, Task
from gptfl_dist.config.training import Pretraining
from gptfl_dist.errors import ConfigError, DataError, TrainerError
from gptfl_dist.learning.data import ImageSet, split
from gptfl_dist.learning.device import resolve_device
from gptfl_dist.learning.evaluate import evaluate
from gptfl_dist.learning.local import train
from gptfl_dist.learning.models import build_model
from gptfl_dist.learning.preprocess import normalise
from gptfl_dist.learning.pretrain import pretrain


def quiet(done: int, total: int) -> None:
    """Progress that nobody watches."""


def test_real_digits_are_learnt(digits: ImageSet, task: Task, settings: LocalTraining) -> None:
    training, held_out = split(digits, 0.2, seed=0)
    model = build_model(Model(), task, 10, seed=0)
    before = evaluate(model, held_out, task, device="cpu")
    assert before.accuracy < 0.4
    result = train(
        model, training, settings.model_copy(update={"epochs": 12}), task, seed=1, device="cpu", progress=quiet
    )
    after = evaluate(model, held_out, task, device="cpu")
    assert after.accuracy > 0.85
    assert after.loss < before.loss
    assert result["samples"] == len(training)
    assert 0 < result["train_loss"] < before.loss
    assert result["seconds"] > 0


def test_training_is_plain_sgd(digits: ImageSet, task: Task, settings: LocalTraining) -> None:
    """Two full-batch steps with momentum and decay, against the formula."""
    data = digits.subset(range(0, 1500, 100))
    rate, momentum, decay = 0.05, 0.5, 0.01
    model = build_model(Model(), task, 10, seed=0)
    reference = copy.deepcopy(model)
    chosen = settings.model_copy(
        update={"epochs": 2, "learning_rate": rate, "momentum": momentum, "weight_decay": decay}
    )
    train(model, data, chosen, task, seed=1, device="cpu", progress=quiet)
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for _ in range(2):
        loss = F.cross_entropy(reference(normalise(data.images, task)), data.labels)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for parameter, speed, gradient in zip(reference.parameters(), velocity, gradients, strict=True):
                speed.mul_(momentum).add_(gradient + decay * parameter)
                parameter.sub_(rate * speed)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_a_clipped_gradient_makes_steps_of_bounded_length(
    digits: ImageSet, task: Task, settings: LocalTraining
) -> None:
    model = build_model(Model(), task, 10, seed=0)
    before = parameters_to_vector(model.parameters()).detach().clone()
    clipped = settings.model_copy(update={"epochs": 1, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.01})
    train(model, digits, clipped, task, seed=1, device="cpu", progress=lambda done, total: None)
    moved = float((parameters_to_vector(model.parameters()).detach() - before).norm())
    steps = -(-len(digits) // clipped.batch_size)
    assert 0 < moved <= clipped.learning_rate * 0.01 * steps * 1.001


def test_the_head_alone_is_trained_and_the_rest_runs_as_in_evaluation(
    digits: ImageSet, settings: LocalTraining, tmp_path: Path
) -> None:
    from transformers import ResNetConfig

    ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_channels=1
    ).save_pretrained(tmp_path)
    data = digits.subset(range(0, 1500, 10))
    head_only = settings.model_copy(update={"trained": "head"})
    task = Task(size=32)
    for description in (Model(name="transformers", source=str(tmp_path)), Model(), Model(name="convnet")):
        model = build_model(description, task, 10, seed=0)
        before = copy.deepcopy(model.state_dict())
        train(model, data, head_only, task, seed=1, device="cpu", progress=quiet)
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        last = list(before)[-1].removesuffix("bias")
        assert changed == {f"{last}weight", f"{last}bias"}
        # The next round trains everything again.
        train(model, data, settings, task, seed=1, device="cpu", progress=quiet)
        assert all(
            not torch.equal(tensor, before[name]) for name, tensor in model.named_parameters() if tensor.ndim > 1
        )


def test_the_proximal_term_is_that_of_fedprox(digits: ImageSet, task: Task, settings: LocalTraining) -> None:
    """Two full-batch steps against the formula; the first one does not feel the term yet."""
    data = digits.subset(range(0, 1500, 100))
    rate, strength = 0.05, 3.0
    model = build_model(Model(), task, 10, seed=0)
    reference, received = copy.deepcopy(model), copy.deepcopy(model)
    chosen = settings.model_copy(update={"epochs": 2, "learning_rate": rate, "proximal": strength})
    train(model, data, chosen, task, seed=1, device="cpu", progress=quiet)
    for _ in range(2):
        pairs = zip(reference.parameters(), received.parameters(), strict=True)
        distance = sum((parameter - anchor.detach()).square().sum() for parameter, anchor in pairs)
        loss = F.cross_entropy(reference(normalise(data.images, task)), data.labels) + strength / 2 * distance
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
                parameter.sub_(rate * gradient)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_no_state_between_rounds(digits: ImageSet, task: Task, settings: LocalTraining) -> None:
    data = digits.subset(range(0, 1500, 15))
    chosen = settings.model_copy(update={"momentum": 0.9, "learning_rate": 0.02})
    start = build_model(Model(), task, 10, seed=0)
    first, second = copy.deepcopy(start), copy.deepcopy(start)
    train(first, data, chosen, task, seed=1, device="cpu", progress=quiet)
    train(second, data, chosen, task, seed=1, device="cpu", progress=quiet)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    train(second, data, chosen, task, seed=2, device="cpu", progress=quiet)
    third = copy.deepcopy(first)
    train(third, data, chosen, task, seed=2, device="cpu", progress=quiet)
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), third.parameters(), strict=True))


class Recorder(nn.Module):
    """Looks at the batches that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.batches: list[list[int]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append([round(value) for value in (images.reshape(len(images), -1)[:, 0] * 255).tolist()])
        return images.reshape(len(images), -1)[:, :2] * self.scale


@pytest.mark.parametrize(("samples", "sizes"), [(7, [3, 4]), (8, [3, 3, 2]), (9, [3, 3, 3]), (2, [2]), (1, [1])])
def test_each_epoch_sees_every_sample_once_in_a_new_order(
    settings: LocalTraining, samples: int, sizes: list[int]
) -> None:
    numbers = torch.arange(samples, dtype=torch.uint8).reshape(-1, 1, 1, 1).repeat(1, 1, 2, 2)
    data = ImageSet(numbers, torch.zeros(samples, dtype=torch.int64), ("a", "b"))
    model, seen = Recorder(), list[tuple[int, int]]()
    chosen = settings.model_copy(update={"epochs": 2, "batch_size": 3})
    task = Task(size=2, mean=[0.0], std=[1.0])
    train(model, data, chosen, task, seed=1, device="cpu", progress=lambda *step: seen.append(step))
    assert [len(batch) for batch in model.batches] == sizes * 2
    epochs = [list(itertools.chain(*each)) for each in (model.batches[: len(sizes)], model.batches[len(sizes) :])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(samples))
    assert samples < 7 or epochs[0] != epochs[1]
    assert seen == [(done + 1, 2 * len(sizes)) for done in range(2 * len(sizes))]


def test_a_loss_that_is_not_finite_is_told(digits: ImageSet, task: Task, settings: LocalTraining) -> None:
    model = build_model(Model(), task, 10, seed=0)
    with pytest.raises(TrainerError, match=r"learning_rate is 1e\+20") as failure:
        train(
            model,
            digits,
            settings.model_copy(update={"learning_rate": 1e20}),
            task,
            seed=1,
            device="cpu",
            progress=quiet,
        )
    assert "batch" in failure.value.hint
    assert not any(letter.isdigit() for letter in failure.value.message)  # which alone travels: no batch is counted


def test_batch_norm_survives_a_single_leftover(digits: ImageSet, settings: LocalTraining, tmp_path: Path) -> None:
    from transformers import ResNetConfig

    ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4] * 4, depths=[1] * 4, layer_type="basic"
    ).save_pretrained(tmp_path)
    task = Task(size=32)
    model = build_model(Model(name="transformers", source=str(tmp_path)), task, 10, seed=0)
    result = train(model, digits.subset(range(33)), settings, task, seed=1, device="cpu", progress=quiet)
    assert result["samples"] == 33


class Reader(nn.Module):
    """Predicts the label that the first pixel names."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.one_hot(images[:, 0, 0, 0].round().long(), 3).float() * 50


def test_evaluation_counts_every_sample() -> None:
    """300 samples, so that there is a last batch; a third of label 1 is taken for 2."""
    truth = torch.arange(300) % 3
    predicted = truth.clone()
    predicted[(truth == 1) & (torch.arange(300) % 9 == 1)] = 2
    images = (predicted.to(torch.uint8)).reshape(-1, 1, 1, 1)
    model = Reader().train()
    result = evaluate(
        model, ImageSet(images, truth, ("a", "b", "c")), Task(size=1, mean=[0.0], std=[1 / 255]), device="cpu"
    )
    assert result.samples == 300
    wrong = int((truth != predicted).sum())
    assert result.confusion.dtype == np.int64
    assert result.confusion.tolist() == [[100, 0, 0], [0, 100 - wrong, wrong], [0, 0, 100]]
    assert result.accuracy == pytest.approx((300 - wrong) / 300)
    assert result.loss == pytest.approx(50 * wrong / 300, rel=1e-4)
    assert model.training


def test_nothing_to_train_or_evaluate_on(digits: ImageSet, task: Task, settings: LocalTraining) -> None:
    model, nothing = build_model(Model(), task, 10, seed=0), digits.subset([])
    with pytest.raises(DataError):
        evaluate(model, nothing, task, device="cpu")
    with pytest.raises(DataError):
        train(model, nothing, settings, task, seed=0, device="cpu", progress=quiet)


def test_pretraining_learns_keeps_its_best_epoch_and_repeats_itself(digits: ImageSet, task: Task) -> None:
    training, unseen = split(digits, 0.4, seed=0)
    settings = Pretraining(epochs=8, batch_size=32, learning_rate=3e-3, validation_share=0.2, threads=1, device="cpu")
    steps: list[tuple[int, int]] = []

    def run() -> tuple[nn.Module, object]:
        model = build_model(Model(), task, 10, seed=0)
        return model, pretrain(model, training, settings, task, seed=5, progress=lambda *step: steps.append(step))

    model, result = run()
    assert steps[-1] == (steps[-1][1], steps[-1][1])
    assert evaluate(model, unseen, task, device="cpu").accuracy > 0.75
    assert result.epochs == len(result.curve) == 8
    best = min(result.curve, key=lambda entry: entry["validation_loss"])
    assert result.best_epoch == best["epoch"]
    assert result.validation_loss == best["validation_loss"]
    assert result.validation_accuracy == best["validation_accuracy"]
    again, repeated = run()
    assert repeated == result
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_pretraining_stops_early_and_restores_the_best_weights(digits: ImageSet, task: Task) -> None:
    """Labels drawn at random cannot be learnt: the held-out loss soon only climbs."""
    labels = torch.randint(0, 10, (400,), generator=torch.Generator().manual_seed(0))
    data = ImageSet(digits.images[:400], labels, digits.label_names)
    settings = Pretraining(
        epochs=40, batch_size=32, learning_rate=3e-3, augmentation=False, patience=2, threads=1, device="cpu"
    )
    model = build_model(Model(), task, 10, seed=0)
    result = pretrain(model, data, settings, task, seed=5, progress=quiet)
    assert result.epochs == result.best_epoch + 2 < 40
    best = result.curve[result.best_epoch - 1]
    assert best["validation_loss"] == result.validation_loss
    assert result.curve[-1]["validation_loss"] > result.validation_loss
    # The weights of the best epoch fit the training labels less than those of the last would.
    assert evaluate(model, data, task, device="cpu").loss > result.curve[-1]["train_loss"]


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="CUDA device"):
        resolve_device("cuda:99")

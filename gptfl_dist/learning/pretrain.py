"""Central training on the synthetic set: AdamW, warm-up and cosine, augmentation, stopped on held-out synthetic data.

Real data has no part in it: the epoch that is kept is the one with the lowest loss on the held-out synthetic images,
which are never augmented.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gptfl_dist.config.federation import Pretraining, Task
from gptfl_dist.errors import TrainerError
from gptfl_dist.learning.augment import augment
from gptfl_dist.learning.data import ImageSet, split
from gptfl_dist.learning.device import resolve_device
from gptfl_dist.learning.evaluate import evaluate
from gptfl_dist.learning.local import batch_count, batches
from gptfl_dist.learning.models import logits
from gptfl_dist.learning.preprocess import normalise
from gptfl_dist.learning.seeding import derive_seed, deterministic

WARM_UP_SHARE = 0.05


@dataclass(frozen=True)
class Pretrained:
    """How it went: `epochs` run, the `best_epoch` (from 1) whose weights were kept and its held-out accuracy and loss.

    `curve` has one entry an epoch: epoch, learning_rate, train_loss, validation_loss, validation_accuracy.
    """

    epochs: int
    best_epoch: int
    validation_accuracy: float
    validation_loss: float
    curve: list[dict[str, float]]


def pretrain(
    model: nn.Module,
    data: ImageSet,
    settings: Pretraining,
    task: Task,
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> Pretrained:
    """Trains `model` in place, leaves it on `settings.device` with the best epoch's weights.

    Sets torch's threads and global seeds (see `deterministic`). `progress(done, total)` counts batches of all epochs;
    early stopping ends it before `total`. Raises TrainerError where the loss is no longer finite.
    """
    deterministic(seed, settings.threads)
    training, held_out = split_synthetic(data, settings, seed)
    device = resolve_device(settings.device)
    model.to(device)
    optimiser = torch.optim.AdamW(_decayed(model, settings.weight_decay), lr=settings.learning_rate)
    per_epoch = batch_count(len(training), settings.batch_size)
    total = settings.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, total))
    shuffling = torch.Generator().manual_seed(derive_seed(seed, "shuffle"))
    warping = torch.Generator().manual_seed(derive_seed(seed, "augment"))
    curve: list[dict[str, float]] = []
    best: dict[str, float] | None = None
    best_weights: dict[str, torch.Tensor] = {}
    done = 0
    for epoch in range(1, settings.epochs + 1):
        model.train()
        epoch_loss = 0.0
        for chosen in batches(len(training), settings.batch_size, shuffling):
            images = normalise(training.images[chosen].to(device), task)
            if settings.augmentation:
                images = augment(images, warping)
            loss = F.cross_entropy(logits(model, images), training.labels[chosen].to(device))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            epoch_loss += float(loss.detach()) * len(chosen)
            done += 1
            progress(done, total)
        result = evaluate(model, held_out, task, device=settings.device)
        if not math.isfinite(epoch_loss + result.loss):
            raise TrainerError(
                f"the pre-training loss is no longer finite in epoch {epoch}",
                hint=f"pretraining.learning_rate is {settings.learning_rate:g}: lower it",
            )
        entry: dict[str, float] = {
            "epoch": epoch,
            "learning_rate": float(schedule.get_last_lr()[0]),
            "train_loss": epoch_loss / len(training),
            "validation_loss": result.loss,
            "validation_accuracy": result.accuracy,
        }
        curve.append(entry)
        if best is None or result.loss < best["validation_loss"]:
            best = entry
            best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        elif epoch - best["epoch"] >= settings.patience:
            break
    assert best is not None  # there is at least one epoch
    model.load_state_dict(best_weights)
    return Pretrained(
        epochs=len(curve),
        best_epoch=int(best["epoch"]),
        validation_accuracy=best["validation_accuracy"],
        validation_loss=best["validation_loss"],
        curve=curve,
    )


def split_synthetic(data: ImageSet, settings: Pretraining, seed: int) -> tuple[ImageSet, ImageSet]:
    """What `pretrain` trains on and what it holds out, for the same three arguments."""
    return split(data, settings.validation_share, derive_seed(seed, "validation"))


def _rate(step: int, total: int) -> float:
    """The share of the learning rate at `step`: a linear climb, then a cosine down to nothing."""
    warm_up = max(1, round(total * WARM_UP_SHARE))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def _decayed(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups: weights decay, biases and norms (one dimension) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]

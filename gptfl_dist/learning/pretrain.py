"""Central training on the synthetic set: AdamW, warm-up and cosine, augmentation, stopped on held-out synthetic data.

Real data has no part in it: the epoch that is kept is the one with the lowest loss on the held-out synthetic images,
which are never augmented. Several ranks train data-parallel (`shared`): on the batches of one rank, to the same weights
but for rounding. A GPU computes in bfloat16 where it can and else in float16 with scaled gradients; weights stay in
float32. After each epoch the whole state goes into a checkpoint, from which a training that was killed goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from gptfl_dist.config.plan import batch_count
from gptfl_dist.config.task import Task
from gptfl_dist.config.training import Pretraining
from gptfl_dist.errors import TrainerError
from gptfl_dist.learning.checkpoint import Checkpoint, State, unpack
from gptfl_dist.learning.data import ImageSet, split
from gptfl_dist.learning.device import resolve_device
from gptfl_dist.learning.evaluate import evaluate
from gptfl_dist.learning.group import ALONE, Group
from gptfl_dist.learning.local import batches
from gptfl_dist.learning.models import logits
from gptfl_dist.learning.parallel import shared
from gptfl_dist.learning.preprocess import augmented, normalise
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
    group: Group = ALONE,
    checkpoint: Checkpoint | None = None,
) -> Pretrained:
    """Trains `model` in place, leaves it on `settings.device` with the best epoch's weights.

    Every rank of the group calls it with the same arguments and has the same result; rank 0 alone reads and writes the
    checkpoint, whose removal is the caller's. Sets torch's threads and global seeds (see `deterministic`).
    `progress(done, total)` counts batches of all epochs; early stopping ends it before `total`. Raises TrainerError
    where the loss is no longer finite.
    """
    threads = group.threads(settings.threads)
    deterministic(seed, threads)
    training, held_out = split_synthetic(data, settings, seed)
    device = resolve_device(group.device(settings.device))
    model.to(device)
    precision = _mixed_precision(device)
    run = _Run(
        model=model,
        optimiser=torch.optim.AdamW(_decayed(model, settings.weight_decay), lr=settings.learning_rate),
        scaler=torch.amp.GradScaler("cuda", enabled=precision is torch.float16),
        shuffling=torch.Generator().manual_seed(derive_seed(seed, "shuffle")),
        warping=torch.Generator().manual_seed(derive_seed(seed, "augment")),
    )
    if checkpoint is not None:
        content = group.share(checkpoint.read() if group.leader else None)
        if content:
            run.restore(unpack(content))
    per_epoch = batch_count(len(training), settings.batch_size)
    total = settings.epochs * per_epoch
    done = len(run.curve) * per_epoch
    for parameters in run.optimiser.param_groups:
        parameters["initial_lr"] = settings.learning_rate  # which a schedule that starts in mid-training wants to find
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimiser, lambda step: _rate(step, total), last_epoch=done - 1)
    with shared(model, list(model.parameters()), group) as share:
        for epoch in range(len(run.curve) + 1, settings.epochs + 1):
            if run.curve and epoch - 1 - run.best["epoch"] >= settings.patience:
                break
            # By epoch and rank, so that a model that draws (dropout) goes on from a checkpoint as if undisturbed.
            deterministic(derive_seed(seed, "epoch", epoch, group.rank), threads)
            model.train()
            losses: list[torch.Tensor] = []  # read once an epoch: who reads one waits for the GPU
            for chosen in batches(len(training), settings.batch_size, run.shuffling):
                part, factor = share.of(len(chosen))
                images = normalise(training.images[chosen[part]].to(device), task)
                if settings.augmentation:
                    images = augmented(images, task, run.warping, batch=len(chosen), part=part)
                labels = training.labels[chosen[part]].to(device)
                with _autocast(precision):
                    loss = F.cross_entropy(logits(share.network, images), labels) * factor
                run.optimiser.zero_grad()
                run.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it out
                run.scaler.step(run.optimiser)
                run.scaler.update()
                schedule.step()
                losses.append(loss.detach() * len(chosen))
                done += 1
                progress(done, total)
            epoch_loss = float(group.sum(torch.stack(losses).cpu().double().sum())) / group.size
            result = evaluate(model, held_out, task, device=str(device), group=group)
            if not math.isfinite(epoch_loss + result.loss):
                raise TrainerError(
                    f"the pre-training loss is no longer finite in epoch {epoch}",
                    hint=f"pretraining.learning_rate is {settings.learning_rate:g}: lower it",
                )
            run.curve.append(
                {
                    "epoch": epoch,
                    "learning_rate": float(schedule.get_last_lr()[0]),
                    "train_loss": epoch_loss / len(training),
                    "validation_loss": result.loss,
                    "validation_accuracy": result.accuracy,
                }
            )
            if run.best["epoch"] == epoch:
                run.best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            if checkpoint is not None and group.leader:
                checkpoint.write(run.state())
    model.load_state_dict(run.best_weights)
    return Pretrained(
        epochs=len(run.curve),
        best_epoch=int(run.best["epoch"]),
        validation_accuracy=run.best["validation_accuracy"],
        validation_loss=run.best["validation_loss"],
        curve=run.curve,
    )


@dataclass
class _Run:
    """What a training carries from one epoch to the next."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    shuffling: torch.Generator
    warping: torch.Generator
    curve: list[dict[str, float]] = field(default_factory=list)
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def best(self) -> dict[str, float]:
        """The curve's entry of the epoch that is best so far, the first of equal ones."""
        return min(self.curve, key=lambda entry: entry["validation_loss"])

    def state(self) -> State:
        """For a checkpoint. The rate is left out, which follows from the number of steps."""
        tensors = {"shuffling": self.shuffling.get_state(), "warping": self.warping.get_state()}
        tensors |= {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best/{name}": value for name, value in self.best_weights.items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{index}/{name}": value for name, value in values.items()}
        return tensors, {"curve": self.curve, "scaler": self.scaler.state_dict()}

    def restore(self, state: State) -> None:
        """Puts back what `state` gave."""
        tensors, facts = state
        self.shuffling.set_state(tensors["shuffling"])
        self.warping.set_state(tensors["warping"])
        self.model.load_state_dict(_below("model/", tensors))
        self.best_weights = _below("best/", tensors)
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in _below("optimiser/", tensors).items():
            index, _, name = key.partition("/")
            moments.setdefault(int(index), {})[name] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.scaler.load_state_dict(facts["scaler"])
        self.curve = facts["curve"]


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _mixed_precision(device: torch.device) -> torch.dtype | None:
    """What a GPU computes the forward and backward pass in; None elsewhere, where float32 is the fastest."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _autocast(precision: torch.dtype | None) -> AbstractContextManager[None]:
    return nullcontext() if precision is None else torch.autocast("cuda", dtype=precision)


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

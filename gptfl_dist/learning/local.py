"""A silo's local training in one round: SGD from the weights it was given.

Nothing outlives the call but the weights: a new optimiser each time, every draw from the seed. With
`settings.trained` at `head`, the last layer alone is trained and the rest runs as in evaluation. A silo of several
ranks trains data-parallel (`shared`): on the batches of one rank, to the same weights but for rounding.

Strategies add terms of their own, each in a module: `proximal` to the gradient, `moon` to the loss, `scaffold` to the
gradient once it was clipped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import nn

from gptfl_dist.config.plan import LocalTraining, batch_count
from gptfl_dist.config.task import Task
from gptfl_dist.errors import DataError, TrainerError
from gptfl_dist.learning.data import ImageSet
from gptfl_dist.learning.descent import Descent
from gptfl_dist.learning.device import resolve_device
from gptfl_dist.learning.group import ALONE, Group
from gptfl_dist.learning.models import head_of, logits
from gptfl_dist.learning.moon import Contrast
from gptfl_dist.learning.parallel import shared
from gptfl_dist.learning.preprocess import augmented, normalise
from gptfl_dist.learning.proximal import Proximal
from gptfl_dist.learning.scaffold import Control
from gptfl_dist.learning.seeding import derive_seed, deterministic


def train(
    model: nn.Module,
    data: ImageSet,
    settings: LocalTraining,
    task: Task,
    *,
    seed: int,
    device: str,
    progress: Callable[[int, int], None],
    group: Group = ALONE,
    control: Control | None = None,
    previous: nn.Module | None = None,
) -> dict[str, float]:
    """Trains `model` in place and leaves it on the device: `settings.epochs` epochs over `data`, shuffled by `seed`.

    Every rank of the group calls it with the same model and data and has the same result.
    Sets torch's threads and global seeds (see `deterministic`). `progress(done, total)` counts batches. `control` is
    SCAFFOLD's, which is brought up to date; `previous` the silo's own model of its last round, for MOON.
    Returns `train_loss` (mean of the last epoch), `samples` (of the data set) and `seconds`.
    Raises TrainerError where the loss is no longer finite, DataError where there is no data.
    """
    if len(data) == 0:
        raise DataError("there is no sample to train on", hint="give a data set with at least one image")
    started = time.monotonic()
    deterministic(derive_seed(seed, "rank", group.rank) if group.rank else seed, settings.threads)
    target = resolve_device(device)
    model.to(target)
    trained = model if settings.trained == "all" else head_of(model)
    model.eval()
    trained.train()
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    proximal = Proximal(parameters, settings.proximal) if settings.proximal else None
    if control is not None:
        control.start(parameters)
    optimiser = Descent(
        parameters,
        learning_rate=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    shuffling = torch.Generator().manual_seed(derive_seed(seed, "shuffle"))
    warping = torch.Generator().manual_seed(derive_seed(seed, "augment"))
    total = settings.epochs * batch_count(len(data), settings.batch_size)
    done = 0
    with ExitStack() as stack:
        contrast = None
        if previous is not None and settings.contrastive and settings.trained == "all":
            contrast = stack.enter_context(Contrast(model, previous, settings.contrastive, settings.temperature))
        share = stack.enter_context(shared(model, parameters, group))
        for _ in range(settings.epochs):
            epoch_loss = 0.0
            for chosen in batches(len(data), settings.batch_size, shuffling):
                part, factor = share.of(len(chosen))
                images = normalise(data.images[chosen[part]].to(target), task)
                if settings.augmentation:
                    images = augmented(images, task, warping, batch=len(chosen), part=part)
                labels = data.labels[chosen[part]].to(target)
                loss = F.cross_entropy(logits(share.network, images), labels) * factor
                if contrast is not None:
                    loss = loss + contrast.loss(images) * factor
                value = share.mean(loss)
                if not math.isfinite(value):
                    raise TrainerError(
                        f"the training loss became {value}",
                        # The hint stays at the silo: by the batch one could tell how much synthetic data it mixed in.
                        hint=f"it did in batch {done + 1}, and training.learning_rate is {settings.learning_rate:g}: "
                        "lower it; if it was the first batch, the received weights are at fault",
                    )
                optimiser.zero_grad()
                loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]  # torch leaves it out
                if proximal is not None:
                    proximal.add()
                if settings.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
                if control is not None:
                    control.correct()
                optimiser.step()
                epoch_loss += value * len(chosen)
                done += 1
                progress(done, total)
    if control is not None:
        control.finish(settings.learning_rate)
    return {
        "train_loss": epoch_loss / len(data),
        "samples": float(len(data)),
        "seconds": time.monotonic() - started,
    }


def batches(samples: int, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """int64 indices, every sample once, shuffled. The last batch is kept; a single leftover joins the one before it.

    A batch norm cannot train on one sample, and with it a silo of 33 samples could not take part.
    """
    order = torch.randperm(samples, generator=generator)
    count = batch_count(samples, batch_size)
    for index in range(count):
        stop = samples if index == count - 1 else (index + 1) * batch_size
        yield order[index * batch_size : stop]

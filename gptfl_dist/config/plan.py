"""What the coordinator tells a silo: the plan of the run, once, and the settings of each training.

Both travel as JSON and are validated again on arrival, by the same types as the files.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gptfl_dist.config.base import Name, Section
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.mixing import HandedOut
from gptfl_dist.config.strategy import Momentum
from gptfl_dist.config.task import Model, Task
from gptfl_dist.config.training import Training
from gptfl_dist.config.wire import Compression

Kept = Literal["control", "previous", "norms"]
"""What silos keep from one of their updates to the next: the control variate (SCAFFOLD), the model that they came to
(MOON), their own normalisation layers (FedBN)."""


class Plan(Section):
    """What a silo must know before it can build the model and read its data."""

    federation: Name
    seed: NonNegativeInt
    labels: list[str] = Field(min_length=2)
    task: Task
    model: Model
    compression: Compression = Compression()
    kept: list[Kept] = Field(default=[])
    samples: HandedOut | None = None
    class_means: bool = False

    @classmethod
    def of(cls, file: FederationFile, samples: HandedOut | None = None) -> Plan:
        """The plan of a federation file; `samples` are the synthetic ones that silos are given."""
        kept: dict[Kept, bool] = {
            "control": file.strategy.rule == "scaffold",
            "previous": file.training.contrastive > 0,
            "norms": file.training.private_norms,
        }
        return cls(
            federation=file.name,
            seed=file.seed,
            labels=file.labels,
            task=file.task,
            model=file.model,
            compression=file.compression,
            kept=[name for name, wanted in kept.items() if wanted],
            samples=samples,
            class_means=file.training.first_round == "means",
        )


class LocalTraining(Section):
    """One round's local training at a silo: `training` of the federation file as it stands in that round."""

    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    momentum: Momentum
    weight_decay: NonNegativeFloat
    proximal: NonNegativeFloat = 0.0
    contrastive: NonNegativeFloat = 0.0
    temperature: PositiveFloat = 0.5
    clip_norm: PositiveFloat | None = None
    augmentation: bool
    threads: PositiveInt
    trained: Literal["all", "head", "means"] = "all"

    @classmethod
    def of(cls, file: FederationFile, learning_rate: float, round_: int) -> LocalTraining:
        """The local training that a federation file asks for in a round (from 1), at one learning rate of its grid."""
        training = file.training
        shared = cls.model_fields.keys() & Training.model_fields.keys()
        trained = "head" if round_ <= training.head_rounds else "all"
        if round_ < training.first_trained:
            trained = "means"
        return cls(
            **{
                **training.model_dump(include=shared),
                "learning_rate": learning_rate * rate_factor(training, round_, file.federation.rounds),
                "trained": trained,
            }
        )


def batch_count(samples: int, batch_size: int) -> int:
    """How many batches an epoch has. A single leftover joins the batch before it: a batch norm cannot train on it."""
    return max(1, samples // batch_size + (samples % batch_size > 1))


def rate_factor(training: Training, round_: int, rounds: int) -> float:
    """What the learning rate is multiplied by in a round from 1 to `rounds`: above 0, at most 1.

    The rate climbs linearly over the warm-up rounds; with `cosine` it falls along half a wave over all rounds (SGDR
    without restarts, arXiv:1608.03983, equation 5, counted in rounds), and the last round still trains. Rounds beyond
    `rounds`, as of a longer trial, train at the last round's rate.
    """
    climb = min(1.0, round_ / (training.warm_up_rounds + 1))
    if training.schedule == "constant":
        return climb
    left = rounds - min(round_, rounds) + 1
    return climb * math.sin(0.5 * math.pi * left / rounds) ** 2  # = (1 + cos(pi * (round - 1) / rounds)) / 2, never 0

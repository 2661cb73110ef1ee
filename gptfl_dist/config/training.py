"""The sections `pretraining`, `training` and `tuning`: how the coordinator trains, how the silos do, at which rate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gptfl_dist.config.base import Device, Section, Share
from gptfl_dist.config.strategy import Momentum


class Pretraining(Section):
    """Central training on the synthetic set. The held-out part that stops it is synthetic too."""

    epochs: PositiveInt = 60
    batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 2e-3
    weight_decay: NonNegativeFloat = 0.05
    augmentation: bool = True
    validation_share: Share = 0.1
    patience: PositiveInt = 15
    device: Device = "auto"
    threads: NonNegativeInt = 0


class Training(Section):
    """A silo's local training in each round. Several learning rates make a grid that `tuning` chooses from.

    `schedule`, `warm_up_rounds`, `first_round` and `head_rounds` count the arm's rounds: they say how one round differs
    from another.
    """

    epochs: PositiveInt = 1
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat | Annotated[list[PositiveFloat], Field(min_length=1)] = 0.2
    schedule: Literal["constant", "cosine"] = "constant"
    warm_up_rounds: NonNegativeInt = 3
    first_round: Literal["train", "means"] = "train"
    head_rounds: NonNegativeInt = 0
    momentum: Momentum = 0.0
    weight_decay: NonNegativeFloat = 0.0
    proximal: NonNegativeFloat = 0.0
    contrastive: NonNegativeFloat = 0.0
    temperature: PositiveFloat = 0.5
    private_norms: bool = False
    clip_norm: PositiveFloat | None = 1.0
    augmentation: bool = False
    threads: PositiveInt = 1

    @property
    def learning_rates(self) -> list[float]:
        """The grid, of one rate or several."""
        return self.learning_rate if isinstance(self.learning_rate, list) else [self.learning_rate]

    @property
    def first_trained(self) -> int:
        """The first round that silos train in."""
        return 2 if self.first_round == "means" else 1


class Tuning(Section):
    """How a learning rate is chosen from the grid: a short federated run of each rate, judged on validation data."""

    rounds: PositiveInt = 5

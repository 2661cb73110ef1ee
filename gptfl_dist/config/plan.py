"""What the coordinator tells a silo: the plan of the run, once, and the settings of each training.

Both travel as JSON and are validated again on arrival, by the same types as the files.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gptfl_dist.config.base import Name, Section
from gptfl_dist.config.federation import FederationFile, Model, Task


class Plan(Section):
    """What a silo must know before it can build the model and read its data."""

    federation: Name
    seed: NonNegativeInt
    labels: list[str] = Field(min_length=2)
    task: Task
    model: Model

    @classmethod
    def of(cls, file: FederationFile) -> Plan:
        """The plan of a federation file."""
        return cls(federation=file.name, seed=file.seed, labels=file.labels, task=file.task, model=file.model)


class LocalTraining(Section):
    """One round's local training at a silo: `training` of the federation file with the learning rate decided."""

    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NonNegativeFloat
    clip_norm: PositiveFloat | None = None
    augmentation: bool
    threads: PositiveInt

    @classmethod
    def of(cls, file: FederationFile, learning_rate: float) -> LocalTraining:
        """The local training that a federation file asks for, at one learning rate of its grid."""
        return cls(**{**file.training.model_dump(), "learning_rate": learning_rate})

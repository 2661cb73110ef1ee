"""The experiment file: a matrix of federations that differ in one thing at a time, and how each is tuned.

A cell is one federation: a split of the data over silos, a start, a strategy, which silos take part, a seed. Its
settings are those of `federation`, over which those of its start, its strategy and its point of the grid are laid; all
are settings of a federation file. Paths in the file are relative to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gptfl_dist.config.base import Name, Section
from gptfl_dist.config.federation import Arm, FederationFile
from gptfl_dist.config.silo import Data

Settings = dict[str, Any]
"""Settings of a federation file, or a part of them."""

Silos = Literal["all", "alone", "pooled"] | PositiveInt
"""Who takes part: all silos in each round, so many drawn anew in each, each by itself, or one with the data of all."""

_OURS = (
    "name", "seed", "run_folder", "arms", "silos", "test_data", "tuning", "labels", "federation.cohort",
    "federation.deadline", "synthesis.folder",
)  # fmt: skip


class Split(Section):
    """How the training data are shared out over silos; drawn anew for each seed.

    `without` are keys whose samples no silo gets; `test_data` stands in place of the experiment's.
    """

    kind: Literal["dirichlet", "shards", "quantity", "key"] = "dirichlet"
    silos: PositiveInt | None = None
    alpha: PositiveFloat | None = None
    minimum: NonNegativeInt = 2
    shards: PositiveInt | None = None
    key: str | None = None
    without: list[str] = Field(default=[])
    test_data: Path | None = None

    @model_validator(mode="after")
    def _what_the_kind_needs(self) -> Self:
        needs = {
            "dirichlet": ("silos", "alpha"),
            "shards": ("silos", "shards"),
            "quantity": ("silos", "alpha"),
            "key": ("key",),
        }
        for name in ("silos", "alpha", "shards", "key"):
            if name in needs[self.kind] and getattr(self, name) is None:
                raise ValueError(f"kind is {self.kind}, which needs {name}")
            if name not in needs[self.kind] and getattr(self, name) is not None:
                raise ValueError(f"kind is {self.kind}, which takes no {name}")
        if self.without and self.kind != "key":
            raise ValueError(f"kind is {self.kind}, which takes no without")
        return self


class Start(Section):
    """The weights that a federation begins with: random ones, those of a public checkpoint, or those that were trained
    on synthetic data, from random ones or from a checkpoint.

    `checkpoint` is a folder or hub id of a `transformers` model, which is the federation's model then.
    """

    arm: Literal["random", "checkpoint", "synthetic"]
    checkpoint: str | None = None
    settings: Settings = Field(default={})

    @model_validator(mode="after")
    def _checkpoint_where_one_is_meant(self) -> Self:
        if self.arm == "checkpoint" and self.checkpoint is None:
            raise ValueError("arm is checkpoint, so checkpoint must name a folder or hub id of a transformers model")
        if self.arm == "random" and self.checkpoint is not None:
            raise ValueError("arm is random, which takes no checkpoint: set arm to checkpoint, or to synthetic")
        if self.checkpoint is not None and "model" in self.settings:
            raise ValueError("checkpoint names the model: leave it out, or settings.model")
        return self

    @property
    def model(self) -> Settings:
        """The settings that make a checkpoint the federation's model; none where there is none."""
        if self.checkpoint is None:
            return {}
        return {"model": {"name": "transformers", "source": self.checkpoint, "pretrained": True}}

    @property
    def random(self) -> bool:
        """Whether nothing was learnt before: no synthetic data, no public checkpoint. Nothing but a start names one."""
        return self.arm == "random" and not self.settings.get("model", {}).get("pretrained", False)

    @property
    def federated_arm(self) -> Arm:
        return "gptfl" if self.arm == "synthetic" else "fedavg_random"


class Method(Section):
    """A strategy: its settings, and the points of its grid, of which each is tried alike."""

    settings: Settings = Field(default={})
    grid: list[Settings] | None = Field(default=None, min_length=1)


class Trials(Section):
    """How a point of the grid is chosen: a short federation of each on the first seed, judged on validation data."""

    rounds: PositiveInt = 5
    grid: list[Settings] = Field(default=[{}], min_length=1)


class Block(Section):
    """A part of the matrix: every combination of what it names."""

    splits: list[Name] = Field(min_length=1)
    starts: list[Name] = Field(min_length=1)
    strategies: list[Name] = Field(min_length=1)
    silos: list[Silos] = Field(default=["all"], min_length=1)


class ExperimentFile(Section):
    """The whole experiment file."""

    name: Name
    folder: Path = Path("results")
    seeds: list[NonNegativeInt] = Field(default=[0, 1, 2], min_length=1)
    labels: list[str] = Field(min_length=2)
    data: Data
    test_data: Path
    federation: Settings = Field(default={})
    splits: dict[Name, Split] = Field(min_length=1)
    starts: dict[Name, Start] = Field(default={"random": Start(arm="random"), "synthetic": Start(arm="synthetic")})
    strategies: dict[Name, Method] = Field(default={"fedavg": Method()}, min_length=1)
    tuning: Trials = Trials()
    cells: list[Block] = Field(min_length=1)

    @model_validator(mode="after")
    def _only_names_that_are_there(self) -> Self:
        for block in self.cells:
            for what in ("splits", "starts", "strategies"):
                unknown = [name for name in getattr(block, what) if name not in getattr(self, what)]
                if unknown:
                    known = ", ".join(getattr(self, what))
                    raise ValueError(f"cells name {', '.join(unknown)}, expected one of {what}: {known}")
        return self

    @model_validator(mode="after")
    def _each_seed_once(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {', '.join(map(str, self.seeds))}, expected each once")
        return self

    @model_validator(mode="after")
    def _equal_tuning(self) -> Self:
        """A comparison in which one method was tried more often than another says nothing."""
        for name, method in self.strategies.items():
            if method.grid is not None and len(method.grid) != len(self.tuning.grid):
                raise ValueError(
                    f"strategies.{name}.grid has {len(method.grid)} points, expected {len(self.tuning.grid)} as in "
                    "tuning.grid: every method is tuned alike"
                )
        return self

    @model_validator(mode="after")
    def _nothing_that_the_matrix_says(self) -> Self:
        parts = {"federation": [self.federation]}
        parts |= {f"starts.{name}.settings": [start.settings] for name, start in self.starts.items()}
        parts["tuning.grid"] = self.tuning.grid
        for name, method in self.strategies.items():
            parts[f"strategies.{name}"] = [method.settings, *(method.grid or [])]
        for where, settings in parts.items():
            taken = [key for one in settings for key in _keys_of(one) if key in _OURS]
            if taken:
                raise ValueError(f"{where} sets {', '.join(sorted(set(taken)))}, which the experiment sets itself")
            flat = [key for one in settings for key in one if _is_section(key) and not isinstance(one[key], dict)]
            if flat:
                raise ValueError(f"{where} sets {flat[0]} to a single value, expected a section of keys")
            models = [model for one in settings if isinstance(model := one.get("model"), dict)]
            if not where.startswith("starts.") and any("pretrained" in model for model in models):
                raise ValueError(
                    f"{where} sets model.pretrained, which says whether a start is random: set it in the settings of a "
                    "start, or name the checkpoint of one"
                )
        return self


def _keys_of(settings: Settings) -> list[str]:
    """The settings' names, and of sections those in them too."""
    inner = [f"{name}.{key}" for name, value in settings.items() if isinstance(value, dict) for key in value]
    return [*settings, *inner]


def _is_section(key: str) -> bool:
    """Whether a federation file has a section under this key, whose settings are laid over each other one by one."""
    field = FederationFile.model_fields.get(key)
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Section)


@dataclass(frozen=True, slots=True)
class Group:
    """What cells of several seeds have in common; a row of a table."""

    split: str
    start: str
    strategy: str
    silos: Silos

    @property
    def path(self) -> PurePosixPath:
        """Where its cells lie."""
        return PurePosixPath(self.split, self.start, self.strategy, str(self.silos))

    def __str__(self) -> str:
        return str(self.path)

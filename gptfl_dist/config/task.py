"""The sections `task` and `model`: what the model sees, and so the shape of a sample; and which model it is."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from gptfl_dist.config.base import Section
from gptfl_dist.config.units import Duration


class Task(Section):
    """What the model sees, normalised alike in every arm: images of one size, or clips of one length as spectrograms.

    `size` and `channels` are of kind image, all but `mean` and `std` of the rest are of kind audio.
    """

    kind: Literal["image", "audio"] = "image"
    size: PositiveInt = 32
    channels: Literal[1, 3] = 1
    sample_rate: Annotated[int, Field(ge=1000, le=192_000)] = 16_000
    duration: Annotated[Duration, Field(le=600.0)] = 1.0
    window: Duration = 0.025
    hop: Duration = 0.01
    bins: Annotated[int, Field(ge=1, le=512)] = 128
    depth: Annotated[float, Field(gt=0, le=120)] = 60.0
    mean: list[float] = Field(default=[0.5])
    std: list[PositiveFloat] = Field(default=[0.5])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the model sees; of a clip 1, its bins and its windows."""
        if self.kind == "image":
            return self.channels, self.size, self.size
        return 1, self.bins, 1 + (self.clip_samples - self.window_samples) // self.hop_samples

    @property
    def samples(self) -> str:
        """What messages call several samples."""
        return "images" if self.kind == "image" else "clips"

    @property
    def clip_samples(self) -> int:
        return round(self.duration * self.sample_rate)

    @property
    def window_samples(self) -> int:
        return round(self.window * self.sample_rate)

    @property
    def hop_samples(self) -> int:
        return round(self.hop * self.sample_rate)

    @model_validator(mode="after")
    def _settings_of_the_kind(self) -> Self:
        others = _OF_AUDIO if self.kind == "image" else _OF_IMAGES
        for name in others:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is not of kind {self.kind}: leave it out, or set kind")
        return self

    @model_validator(mode="after")
    def _windows_in_a_clip(self) -> Self:
        if self.hop_samples < 1:
            raise ValueError(f"hop is less than one sample at sample_rate {self.sample_rate}")
        if not 2 <= self.window_samples <= self.clip_samples:
            raise ValueError(
                f"window has {self.window_samples} samples at sample_rate {self.sample_rate}, expected 2 to the "
                f"{self.clip_samples} of duration"
            )
        return self

    @model_validator(mode="after")
    def _one_statistic_a_channel(self) -> Self:
        channels = self.shape[0]
        for field, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ValueError(f"{field} has {len(values)} values, expected 1 or {channels} (one a channel)")
        return self


_OF_IMAGES = ("size", "channels")
_OF_AUDIO = ("sample_rate", "duration", "window", "hop", "bins", "depth")


class Model(Section):
    """The downstream model. Three are built in; `transformers` names a config, folder or hub id."""

    name: Literal["cnn", "convnet", "conv1d-gru", "transformers", "function"] = "cnn"
    source: str | None = None
    pretrained: bool = False

    @model_validator(mode="after")
    def _source_where_needed(self) -> Self:
        if self.name == "transformers" and not self.source:
            raise ValueError("model.name is transformers, so model.source must name a model folder or a hub id")
        if self.name == "function" and not self.source:
            raise ValueError("model.name is function, so model.source must name it as package.module:function")
        if self.name in ("cnn", "convnet", "conv1d-gru") and self.source is not None:
            raise ValueError(f"model.name is {self.name}, which takes no model.source")
        if self.pretrained and self.name != "transformers":
            raise ValueError("model.pretrained is for model.name transformers alone")
        return self

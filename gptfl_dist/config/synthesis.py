"""The section `synthesis`: generators, prompts and filters, and the candidates that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from gptfl_dist.config.base import Device, Name, Section

Engine = Literal["espeak-ng", "flite", "hibari"]

_FILLED_IN = ("templates", "styles")


class Prompts(Section):
    """How labels become prompts: every template with every style, `{label}` and `{style}` filled in.

    Or a prompt set in `file`, a YAML file of `label: [prompt, ...]` that `gptfl prompts` makes and people edit.
    """

    templates: list[str] = Field(default=["a handwritten digit {label}"], min_length=1)
    styles: list[str] = Field(default=[])
    file: Path | None = None

    @model_validator(mode="after")
    def _file_stands_alone(self) -> Self:
        given = [name for name in _FILLED_IN if name in self.model_fields_set]
        if self.file is not None and given:
            raise ValueError(f"file holds the prompts themselves: give it without {' and '.join(given)}")
        return self

    @model_serializer(mode="wrap")
    def _without_what_file_replaces(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in whole(self).items() if self.file is None or name not in _FILLED_IN}

    @model_validator(mode="after")
    def _placeholders(self) -> Self:
        for template in self.templates:
            if "{label}" not in template:
                raise ValueError(f"the template {template!r} has no {{label}}")
            if "{style}" in template and not self.styles:
                raise ValueError(f"the template {template!r} has {{style}}, but prompts.styles is empty")
        return self


class Generator(Section):
    """A `diffusers` pipeline and how to sample from it, or the text-to-speech `engines` (`source: tts`).

    `source: embedded` is the pipeline that ships with the package.
    """

    source: str = "embedded"
    engines: Annotated[list[Engine], Field(min_length=1)] = Field(default=["espeak-ng", "flite", "hibari"])
    guidance: NonNegativeFloat | Annotated[list[NonNegativeFloat], Field(min_length=1)] = 2.0
    steps: PositiveInt = 10
    scheduler: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: Device = "auto"
    batch_size: PositiveInt = 50
    size: PositiveInt | None = None

    @model_validator(mode="after")
    def _engines_of_speech(self) -> Self:
        if self.source != "tts" and self.engines != type(self).model_fields["engines"].default:
            raise ValueError(f"engines are of source tts, and source is {self.source}")
        twice = sorted({name for name in self.engines if self.engines.count(name) > 1})
        if twice:
            raise ValueError(f"engines names {', '.join(twice)} twice")
        return self


class Filter(Section):
    """Which images are kept to train on: those on whose label a judge agrees, and at most a quota a label."""

    judge: Literal["cross", "classifier", "encoder"] = "cross"
    source: str | None = None
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.5
    keep_per_label: PositiveInt | None = None

    @model_validator(mode="after")
    def _source_where_needed(self) -> Self:
        if self.judge == "cross" and self.source is not None:
            raise ValueError("filter.judge is cross, which takes no filter.source")
        if self.judge != "cross" and not self.source:
            raise ValueError(f"filter.judge is {self.judge}, so filter.source must name a model folder or a hub id")
        return self


class Candidate(Section):
    """A generator, prompts or a filter that may be the better ones; what it leaves out is as in `synthesis`."""

    generator: Generator | None = None
    prompts: Prompts | None = None
    filter: Filter | None = None


class Synthesis(Section):
    """The synthetic data set: which generator, which prompts, how many images, where it is kept, which are used."""

    generator: Generator = Generator()
    prompts: Prompts = Prompts()
    images_per_label: PositiveInt = 200
    shard_size: PositiveInt = 100
    folder: Path = Path("synthetic")
    threads: NonNegativeInt = 0
    filter: Filter | None = None
    candidates: dict[Name, Candidate] = Field(default={})
    choose_by: Literal["silos", "synthetic"] = "silos"

    @model_validator(mode="after")
    def _a_choice_of_several(self) -> Self:
        if len(self.candidates) == 1:
            raise ValueError("candidates names one candidate, expected two or more (or none)")
        return self

    def of_candidate(self, name: str) -> Synthesis:
        """The settings of one candidate, whose set is kept in a folder of its own."""
        candidate = self.candidates[name]
        return self.model_copy(
            update={
                "generator": candidate.generator or self.generator,
                "prompts": candidate.prompts or self.prompts,
                "filter": candidate.filter or self.filter,
                "candidates": {},
                "folder": self.folder / name,
            }
        )

    @model_validator(mode="before")
    @classmethod
    def _templates_of_the_generator(cls, settings: Any) -> Any:
        """Templates that are left out fit the generator: the embedded one knows but one kind of prompt."""
        if not isinstance(settings, dict):
            return settings
        generator, prompts = settings.get("generator"), settings.get("prompts", {})
        source = generator.get("source", "embedded") if isinstance(generator, dict) else "embedded"
        if source == "embedded" or not isinstance(prompts, dict) or {"templates", "file"} & prompts.keys():
            return settings
        template = "{label}" if source == "tts" else "a photo of a {label}"
        return {**settings, "prompts": {"templates": [template], **prompts}}

"""One adapter for every `diffusers` pipeline that makes pictures or sounds from prompts or from class labels.

The signature of the pipeline's `__call__` decides what it is given: prompts if it takes `prompt`, class indices if it
takes `class_labels`, the length of a clip by the name that it has for it. Weights are safetensors only; code that lies
in a folder is never run. Noise is drawn on the CPU by one generator a sample, so a sample does not depend on the device
that the noise is moved to. It does on the number format: torch before 2.13 or so draws other noise in half precision
(2.11 does, 2.13 does not). torch's CPU generator uses the lower 32 bits of a seed.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptfl_dist.audio.clip import resampled, trimmed
from gptfl_dist.config.synthesis import Generator
from gptfl_dist.errors import GeneratorError, first_line
from gptfl_dist.synthesis.samples import Sample

_LENGTHS = ("audio_length_in_s", "audio_end_in_s", "audio_duration_s", "duration")
_RATES = ("sampling_rate", "sample_rate")


@dataclass(frozen=True)
class GeneratorFolder:
    """A pipeline on this machine: its name for people, where it lies, and the BLAKE3 digest of what is loaded."""

    id: str
    folder: Path
    digest: str


@dataclass(frozen=True)
class Placement:
    """Where a generator runs and in which number format, with `auto` decided."""

    device: str
    dtype: str


def load_pipeline(settings: Generator, found: GeneratorFolder, placement: Placement) -> PipelineGenerator:
    """Load the pipeline that `settings` name, with their scheduler, on their device.

    Raises GeneratorError with what is wrong: no pipeline, no safetensors, an unknown scheduler, or a setting that this
    pipeline cannot follow.
    """
    import torch

    try:
        pipeline = pipeline_class().from_pretrained(
            str(found.folder),
            dtype=getattr(torch, placement.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        if settings.scheduler is not None:
            pipeline.scheduler = _scheduler_class(settings.scheduler).from_config(pipeline.scheduler.config)
        pipeline = pipeline.to(placement.device)
    except GeneratorError:
        raise
    except Exception as error:  # the loaders of two libraries raise nearly every type there is
        raise GeneratorError(
            f"the generator {found.id} cannot be loaded: {first_line(error)}",
            hint="The folder must hold a whole pipeline as diffusers saves it, with safetensors weights"
            " (pipeline.save_pretrained(folder)).",
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return PipelineGenerator(pipeline, found, settings, placement)


class PipelineGenerator:
    """A loaded pipeline behind one call."""

    def __init__(self, pipeline: Any, found: GeneratorFolder, settings: Generator, placement: Placement) -> None:
        """Use `load_pipeline`. Raises GeneratorError where the pipeline cannot follow a setting."""
        self._pipeline = pipeline
        self._found = found
        self._settings = settings
        self._placement = placement
        self._parameters = inspect.signature(pipeline.__call__).parameters
        kind = type(pipeline).__name__
        if not {"prompt", "class_labels"} & self._parameters.keys():
            raise GeneratorError(
                f"the generator {found.id} is a {kind}, which takes neither prompts nor class labels",
                hint="Use a text-to-image or a class-conditional pipeline.",
            )
        if isinstance(settings.guidance, list) and not self.takes_guidance:
            raise GeneratorError(
                f"generator.guidance is a list, but {found.id} is a {kind}, which has no guidance scale",
                hint="Give generator.guidance as one number, which such a pipeline ignores.",
            )
        if settings.size is not None and not {"height", "width"} <= self._parameters.keys():
            raise GeneratorError(
                f"generator.size is {settings.size}, but {found.id} is a {kind}, whose size is fixed",
                hint="Leave generator.size out; pictures are resized to task.size in any case.",
            )

    @property
    def takes_guidance(self) -> bool:
        """Whether this pipeline has a guidance scale at all."""
        return "guidance_scale" in self._parameters

    def describe(self) -> dict[str, str]:
        """`id` (for a hub id with its commit) and `digest` (BLAKE3 of the pipeline's files), for the manifest."""
        return {"id": self._found.id, "digest": self._found.digest}

    def images(self, samples: Sequence[Sample], labels: Sequence[str]) -> np.ndarray:
        """The pictures of one batch as uint8 (N, H, W, C), C 1 or 3, at the pipeline's own size.

        All samples share one guidance scale. Raises GeneratorError if the pipeline fails or its output is unusable.
        """
        arguments: dict[str, Any] = {"output_type": "np"}
        if self._settings.size is not None:
            arguments |= {"height": self._settings.size, "width": self._settings.size}
        return self._checked(self._run(samples, labels, arguments), len(samples))

    def clips(self, samples: Sequence[Sample], labels: Sequence[str], rate: int, seconds: float) -> list[np.ndarray]:
        """The clips of one batch, each float32 at `rate`, of `seconds` less the silence at both ends.

        All samples share one guidance scale. Raises GeneratorError if the pipeline fails or its output is unusable.
        """
        arguments: dict[str, Any] = {name: seconds for name in _LENGTHS if name in self._parameters}
        if "output_type" in self._parameters:
            arguments["output_type"] = "np"
        sounds = self._checked_sounds(self._run(samples, labels, arguments), len(samples))
        own = self._sample_rate()
        return [trimmed(resampled(sound, own, rate), rate) for sound in sounds]

    def _run(self, samples: Sequence[Sample], labels: Sequence[str], arguments: dict[str, Any]) -> Any:
        """The pipeline's output for one batch."""
        import torch

        generators = [torch.Generator("cpu").manual_seed(sample.seed) for sample in samples]
        arguments |= {"num_inference_steps": self._settings.steps, "generator": generators}
        if "prompt" in self._parameters:
            arguments["prompt"] = [sample.prompt for sample in samples]
        else:
            classes = self._classes(labels)
            arguments["class_labels"] = [classes[sample.label] for sample in samples]
        if "batch_size" in self._parameters:
            arguments["batch_size"] = len(samples)
        if self.takes_guidance:
            arguments["guidance_scale"] = samples[0].guidance

        device = torch.device(self._placement.device)
        try:
            # Some pipelines give their scheduler no generator, and it then draws from torch's global one.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(samples[0].seed)
                return self._pipeline(**arguments)
        except torch.OutOfMemoryError as error:
            raise GeneratorError(
                f"the generator {self._found.id} ran out of memory on {device} with {len(samples)} samples at a time",
                hint="Lower generator.batch_size (and delete the synthetic folder, which holds the old setting).",
            ) from error
        except Exception as error:  # whatever a foreign pipeline raises
            raise GeneratorError(
                f"the generator {self._found.id} failed: {first_line(error)}",
                hint="Check that it fits generator.steps, generator.scheduler, generator.size and generator.dtype.",
            ) from error

    def _classes(self, labels: Sequence[str]) -> list[int]:
        """The pipeline's class of each label: by name where the pipeline names its classes, else by position."""
        named: dict[str, int] = getattr(self._pipeline, "labels", None) or {}
        if named:
            unknown = [label for label in labels if label not in named]
            if unknown:
                raise GeneratorError(
                    f"the generator {self._found.id} has no class named {', '.join(unknown)}",
                    hint=f"Its {len(named)} classes are {_shortened(', '.join(named))}; name the labels so.",
                )
            return [named[label] for label in labels]
        count = self._class_count()
        if count is not None and count < len(labels):
            raise GeneratorError(
                f"the generator {self._found.id} knows {count} classes, but the federation has {len(labels)} labels",
                hint="Use a generator with at least as many classes as the federation has labels, in the same order.",
            )
        return list(range(len(labels)))

    def _class_count(self) -> int | None:
        for component in self._pipeline.components.values():
            config = getattr(component, "config", None)
            for field in ("num_class_embeds", "num_embeds_ada_norm"):
                count = getattr(config, field, None)
                if isinstance(count, int):
                    return count
        return None

    def _checked(self, output: Any, count: int) -> np.ndarray:
        pictures = np.asarray(getattr(output, "images", None))
        if pictures.ndim != 4 or len(pictures) != count or pictures.shape[-1] not in (1, 3):
            raise GeneratorError(
                f"the generator {self._found.id} returned {pictures.dtype} of shape {pictures.shape}"
                f" for {count} pictures, expected ({count}, height, width, 1 or 3)",
                hint="Use a pipeline that makes pictures; those for video or latents do not fit, those for sound fit"
                " task.kind audio.",
            )
        self._require_numbers(pictures)
        if any(getattr(output, "nsfw_content_detected", None) or ()):
            raise GeneratorError(
                f"the safety checker of {self._found.id} blackened pictures, which would be trained on",
                hint="Reword prompts.templates, or save the pipeline without its safety checker.",
            )
        return np.asarray((pictures.clip(0, 1) * 255).round(), dtype=np.uint8)

    def _checked_sounds(self, output: Any, count: int) -> np.ndarray:
        """The sounds of an output as float32 (N, samples), the mean of their channels, at most 1 in size."""
        sounds = np.asarray(getattr(output, "audios", None))
        if sounds.ndim == 3:  # (N, channels, samples)
            sounds = sounds.mean(axis=1)
        if sounds.ndim != 2 or len(sounds) != count or not sounds.shape[1]:
            raise GeneratorError(
                f"the generator {self._found.id} returned {sounds.dtype} of shape {sounds.shape} for {count} clips,"
                f" expected ({count}, samples) or ({count}, channels, samples)",
                hint="Use a pipeline that makes sounds; those for pictures fit task.kind image.",
            )
        self._require_numbers(sounds)
        largest = np.abs(sounds).max(axis=1, keepdims=True)
        return np.asarray(sounds / np.maximum(largest, 1), dtype=np.float32)

    def _require_numbers(self, values: np.ndarray) -> None:
        if not np.isfinite(values).all():
            raise GeneratorError(
                f"the generator {self._found.id} made values that are no numbers in {self._placement.dtype}",
                hint="Set generator.dtype to float32 or bfloat16: many models overflow in float16.",
            )

    def _sample_rate(self) -> int:
        """The rate of the pipeline's sounds, which its last part knows: a vocoder, a decoder, or the model itself."""
        parts = self._pipeline.components
        for part in [parts.get(name) for name in ("vocoder", "vae", "unet")]:
            for field in _RATES:
                rate = getattr(getattr(part, "config", None), field, None)
                if isinstance(rate, int):
                    return rate
        raise GeneratorError(
            f"the generator {self._found.id} does not say at which rate its sounds are",
            hint="Use a pipeline whose vocoder or decoder has sampling_rate in its configuration.",
        )


def _scheduler_class(name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        known = [other for other in dir(diffusers) if other.endswith("Scheduler")]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise GeneratorError(
            f"generator.scheduler is {name}, which is no scheduler of diffusers {diffusers.__version__}",
            hint=f"Did you mean {' or '.join(near)}?" if near else "Give a class name such as DDIMScheduler.",
        )
    return found


def pipeline_class() -> Any:
    """`DiffusionPipeline`, with the progress bars and warnings of its libraries kept out of ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    from diffusers import DiffusionPipeline  # after that: its import warns too

    return DiffusionPipeline


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[:limit] + "..."

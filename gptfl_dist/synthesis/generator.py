"""One adapter for every `diffusers` pipeline that makes pictures from prompts or from class labels.

The signature of the pipeline's `__call__` decides what it is given: prompts if it takes `prompt`, class indices if it
takes `class_labels`. A pipeline comes from a local folder, the hub or this package (`embedded`), as safetensors only;
code that lies in a folder is never run. Noise is drawn on the CPU by one generator an image, so a picture does not
depend on the device that the noise is moved to; torch's CPU generator uses the lower 32 bits of a seed.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptfl_dist.config.federation import Generator
from gptfl_dist.errors import GeneratorError, first_line
from gptfl_dist.synthesis.samples import Sample
from gptfl_dist.synthesis.source import files_digest

EMBEDDED = Path(__file__).parent / "glyphs"
EMBEDDED_LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EMBEDDED_WORDS = frozenset(
    (*EMBEDDED_LABELS, *["a", "handwritten", "digit", "thin", "bold", "slanted", "upright", "leaning", "left"])
)  # of the captions that it was trained on
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SOURCES = "Give generator.source as `embedded`, a folder that holds model_index.json, or a hub id such as owner/name."


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


def find_generator(settings: Generator) -> GeneratorFolder:
    """Find the folder of a generator, fetching it from the hub where it is a hub id. Loads no weights.

    Raises GeneratorError if there is none, or the folder is no pipeline.
    """
    source = settings.source
    if source == "embedded":
        return GeneratorFolder(source, EMBEDDED, _folder_digest(EMBEDDED, source))
    folder = Path(source).expanduser()
    if folder.is_dir():
        return GeneratorFolder(source, folder, _folder_digest(folder, source))
    if not HUB_ID.fullmatch(source) or folder.exists():
        what = "is a file" if folder.exists() else "does not exist"
        raise GeneratorError(f"generator.source is {source}, which {what}; expected a folder", hint=_SOURCES)
    folder = _download(source)
    return GeneratorFolder(f"{source}@{folder.name}", folder, _folder_digest(folder, source))


def require_known_labels(settings: Generator, labels: Sequence[str]) -> None:
    """Raises GeneratorError where the embedded generator is to draw what it has never seen.

    Its text encoder knows few words; of others it makes a digit of its own choice, which would train the model wrongly.
    """
    unknown = [label for label in labels if label not in EMBEDDED_LABELS]
    if settings.source == "embedded" and unknown:
        raise GeneratorError(
            f"the embedded generator draws the labels {', '.join(EMBEDDED_LABELS)}; it does not know "
            f"{', '.join(unknown)}",
            hint="name another pipeline under synthesis.generator.source: a folder or a hub id",
        )


def unknown_words(settings: Generator, prompts: Iterable[str]) -> list[str]:
    """Words of the prompts that the embedded generator has never read: it draws a digit of its own choice for them.

    None for any other generator, of which nobody knows.
    """
    if settings.source != "embedded":
        return []
    found = dict.fromkeys(word for prompt in prompts for word in re.findall(r"[^\W_]+", prompt.lower()))
    return [word for word in found if word not in EMBEDDED_WORDS]


def place(settings: Generator) -> Placement:
    """Decide device and dtype: `auto` is the GPU where torch sees one, and float16 there, float32 elsewhere.

    Raises GeneratorError for a device that torch does not have.
    """
    import torch

    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise GeneratorError(
            f"generator.device is {device}, but torch finds no such device here",
            hint="Set generator.device to auto or cpu, or install a torch build for this accelerator.",
        )
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "float16" if kind == "cuda" else "float32"
    return Placement(device, dtype)


def load_generator(settings: Generator, found: GeneratorFolder | None = None) -> ImageGenerator:
    """Load the pipeline that `settings` name, with their scheduler, on their device.

    `found` is the answer of `find_generator`, where the caller already has it. Raises GeneratorError with what is
    wrong: no pipeline, no safetensors, an unknown scheduler, or a setting that this pipeline cannot follow.
    """
    import torch

    found = found or find_generator(settings)
    placement = place(settings)
    try:
        pipeline = _pipeline_class().from_pretrained(
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
    return ImageGenerator(pipeline, found, settings, placement)


class ImageGenerator:
    """A loaded pipeline behind one call."""

    def __init__(self, pipeline: Any, found: GeneratorFolder, settings: Generator, placement: Placement) -> None:
        """Use `load_generator`. Raises GeneratorError where the pipeline cannot follow a setting."""
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
        import torch

        generators = [torch.Generator("cpu").manual_seed(sample.seed) for sample in samples]
        arguments: dict[str, Any] = {
            "num_inference_steps": self._settings.steps,
            "generator": generators,
            "output_type": "np",
        }
        if "prompt" in self._parameters:
            arguments["prompt"] = [sample.prompt for sample in samples]
        else:
            classes = self._classes(labels)
            arguments["class_labels"] = [classes[sample.label] for sample in samples]
        if "batch_size" in self._parameters:
            arguments["batch_size"] = len(samples)
        if self.takes_guidance:
            arguments["guidance_scale"] = samples[0].guidance
        if self._settings.size is not None:
            arguments |= {"height": self._settings.size, "width": self._settings.size}

        device = torch.device(self._placement.device)
        try:
            # Some pipelines give their scheduler no generator, and it then draws from torch's global one.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(samples[0].seed)
                output = self._pipeline(**arguments)
        except torch.OutOfMemoryError as error:
            raise GeneratorError(
                f"the generator {self._found.id} ran out of memory on {device} with {len(samples)} pictures at a time",
                hint="Lower generator.batch_size (and delete the synthetic folder, which holds the old setting).",
            ) from error
        except Exception as error:  # whatever a foreign pipeline raises
            raise GeneratorError(
                f"the generator {self._found.id} failed: {first_line(error)}",
                hint="Check that it fits generator.steps, generator.scheduler, generator.size and generator.dtype.",
            ) from error
        return self._checked(output, len(samples))

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
                hint="Use a pipeline that makes pictures; those for video, sound or latents do not fit.",
            )
        if not np.isfinite(pictures).all():
            raise GeneratorError(
                f"the generator {self._found.id} made values that are no numbers in {self._placement.dtype}",
                hint="Set generator.dtype to float32 or bfloat16: many models overflow in float16.",
            )
        if any(getattr(output, "nsfw_content_detected", None) or ()):
            raise GeneratorError(
                f"the safety checker of {self._found.id} blackened pictures, which would be trained on",
                hint="Reword prompts.templates, or save the pipeline without its safety checker.",
            )
        return np.asarray((pictures.clip(0, 1) * 255).round(), dtype=np.uint8)


def _folder_digest(folder: Path, source: str) -> str:
    """BLAKE3 over the names and contents of model_index.json and the folders of the components that it names."""
    index = folder / "model_index.json"
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(name for name, value in components.items() if isinstance(value, list))
    except FileNotFoundError as error:
        raise GeneratorError(
            f"generator.source is {source}, a folder without model_index.json: no diffusers pipeline", hint=_SOURCES
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise GeneratorError(f"{index} cannot be read as JSON: {first_line(error)}", hint=_SOURCES) from error
    files = [index, *(path for name in names for path in sorted((folder / name).rglob("*")) if path.is_file())]
    try:
        return files_digest(folder, files)
    except OSError as error:
        raise GeneratorError(str(error), hint="Check its permissions.") from error


def _download(source: str) -> Path:
    try:
        return Path(_pipeline_class().download(source, use_safetensors=True, trust_remote_code=False))
    except Exception as error:  # the hub client, its HTTP library and diffusers raise unrelated types
        raise GeneratorError(
            f"generator.source is {source}: there is no such folder, and the hub gave no such pipeline:"
            f" {first_line(error)}",
            hint="Check the name and the connection (a gated model also needs `hf auth login`), or download it"
            " elsewhere and name its folder.",
        ) from error


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


def _pipeline_class() -> Any:
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

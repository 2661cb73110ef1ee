"""Which generator `synthesis.generator` names: a `diffusers` pipeline or text-to-speech engines.

A pipeline comes from a local folder, the hub or this package (`embedded`), and is known again by a digest of its files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from gptfl_dist.config.synthesis import Generator
from gptfl_dist.errors import GeneratorError, first_line
from gptfl_dist.synthesis.pipeline import GeneratorFolder, PipelineGenerator, Placement, load_pipeline, pipeline_class
from gptfl_dist.synthesis.source import files_digest
from gptfl_dist.synthesis.speech import Engines, SpeechGenerator, find_engines

EMBEDDED = Path(__file__).parent / "glyphs"
EMBEDDED_LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EMBEDDED_WORDS = frozenset(
    (*EMBEDDED_LABELS, *["a", "handwritten", "digit", "thin", "bold", "slanted", "upright", "leaning", "left"])
)  # of the captions that it was trained on
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SOURCES = (
    "Give generator.source as `embedded`, `tts`, a folder that holds model_index.json, or a hub id such as owner/name."
)


def find_generator(settings: Generator) -> GeneratorFolder | Engines:
    """Find the folder of a generator, fetching it from the hub where it is a hub id, or its engines. Loads no weights.

    Raises GeneratorError if there is none, or the folder is no pipeline.
    """
    source = settings.source
    if source == "tts":
        return find_engines(settings.engines)
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

    Engines speak on the CPU. Raises GeneratorError for a device that torch does not have.
    """
    if settings.source == "tts":
        return Placement("cpu", "float32")
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


def load_generator(
    settings: Generator, found: GeneratorFolder | Engines | None = None
) -> PipelineGenerator | SpeechGenerator:
    """Load the pipeline or the engines that `settings` name.

    `found` is the answer of `find_generator`, where the caller already has it. Raises GeneratorError as
    `load_pipeline` does.
    """
    found = found or find_generator(settings)
    if isinstance(found, Engines):
        return SpeechGenerator(found)
    return load_pipeline(settings, found, place(settings))


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
        return Path(pipeline_class().download(source, use_safetensors=True, trust_remote_code=False))
    except Exception as error:  # the hub client, its HTTP library and diffusers raise unrelated types
        raise GeneratorError(
            f"generator.source is {source}: there is no such folder, and the hub gave no such pipeline:"
            f" {first_line(error)}",
            hint="Check the name and the connection (a gated model also needs `hf auth login`), or download it"
            " elsewhere and name its folder.",
        ) from error

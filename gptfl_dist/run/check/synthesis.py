"""What of the pre-flight is about the synthetic set: the prompts, the generator, the filter.

Models that lie on this machine are loaded. One of the hub is only asked for, with a short patience: generation would
download it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.synthesis import Filter, Generator
from gptfl_dist.errors import GeneratorError, first_line
from gptfl_dist.observe.wording import size
from gptfl_dist.run.check.findings import Checklist, Doubt
from gptfl_dist.run.filter import FILTER_SOURCE, load_judge

_PATIENCE = 5.0  # seconds for an answer of the hub


def check_synthesis(checks: Checklist, file: FederationFile, whose: str) -> None:
    """Prompts, generator and filter of a file, or of one of its candidates."""
    checks.run(f"prompts{whose}", lambda: _prompts(file))
    checks.run(f"generator{whose}", lambda: _generator(file.synthesis.generator, file.labels))
    settings = file.synthesis.filter
    if settings is not None:
        checks.run(f"filter{whose}", lambda: _filter(file, settings))


def _prompts(file: FederationFile) -> str:
    from gptfl_dist.synthesis.generator import unknown_words
    from gptfl_dist.synthesis.prompts import build_prompts

    prompts = build_prompts(file.synthesis.prompts, file.labels)
    unknown = unknown_words(file.synthesis.generator, (text for texts in prompts.values() for text in texts))
    if unknown:
        raise Doubt(
            f"the embedded generator has never read {', '.join(unknown[:8])}{' ...' if unknown[8:] else ''}, and draws "
            "a digit of its own choice for what it does not understand",
            hint='keep to "a handwritten digit {label}" with the styles of its model card, or name another generator',
        )
    counts = [len(texts) for texts in prompts.values()]
    source = file.synthesis.prompts.file or "templates and styles"
    return f"{min(counts)} to {max(counts)} a label, from {source}"


def _generator(settings: Generator, labels: Sequence[str]) -> str:
    """Loads the generator from its folder. One of the hub is only asked for: it may have many gigabytes."""
    from gptfl_dist.synthesis.generator import load_generator, require_known_labels

    require_known_labels(settings, labels)
    source = settings.source
    if source == "embedded" or Path(source).expanduser().exists() or source.count("/") != 1 or source.startswith("."):
        described = load_generator(settings).describe()
        return f"{described['id']} loads, digest {described['digest'][:12]}"
    return _hub_generator(settings)


def _hub_generator(settings: Generator) -> str:
    from huggingface_hub import try_to_load_from_cache

    from gptfl_dist.synthesis.generator import load_generator

    cached = try_to_load_from_cache(settings.source, "model_index.json")
    if isinstance(cached, str):
        load_generator(settings.model_copy(update={"source": str(Path(cached).parent)}))
        return f"{settings.source} loads from this machine's cache of the hub"
    return _on_hub(settings.source, "generator.source", "model_index.json", "diffusers pipeline")


def _filter(file: FederationFile, settings: Filter) -> str:
    """Loads the judge from its folder. One of the hub is only asked for, unless it is in this machine's cache."""
    from huggingface_hub import try_to_load_from_cache

    from gptfl_dist.learning.cross import FOLDS
    from gptfl_dist.synthesis.source import find_model, is_folder_name

    source = settings.source
    if source is None:
        return f"cross: the model is trained {FOLDS} times, to judge the part of the images that it has not seen"
    if not is_folder_name(source) and not Path(source).is_dir():
        cached = try_to_load_from_cache(source, "config.json")
        if not isinstance(cached, str):
            return _on_hub(source, FILTER_SOURCE, "config.json", "transformers model")
        source = str(Path(cached).parent)
    found = find_model(source, FILTER_SOURCE)
    load_judge(file, settings, {label: [label] for label in file.labels}, found)
    return f"the {settings.judge} {settings.source} loads and judges by {len(file.labels)} labels"


def _on_hub(source: str, setting: str, index: str, kind: str) -> str:
    """Asks the hub for a model that is known by its file `index`. Raises GeneratorError: generation would end so."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(source, timeout=_PATIENCE, files_metadata=True).siblings or []
    except Exception as error:  # the hub client and its HTTP library raise unrelated types
        raise GeneratorError(
            f"{setting} is {source}: there is no such folder, it is not in this machine's cache of the "
            f"hub, and the hub cannot be asked ({first_line(error)}): gptfl generate would fail to download it",
            hint="check the name and the connection, or download it elsewhere and name its folder",
        ) from error
    total = sum(file.size or 0 for file in files if not file.rfilename.endswith((".bin", ".ckpt", ".msgpack")))
    if index not in {file.rfilename for file in files}:
        raise GeneratorError(
            f"{setting} is {source}, which the hub has without {index}: no {kind}", hint=f"name a {kind}"
        )
    return f"{source} is on the hub; gptfl generate will download up to {size(total)}"

"""The judge that `synthesis.filter` of a federation file names, and what it keeps of the synthetic set."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.synthesis import Filter
from gptfl_dist.observe.progress import progress
from gptfl_dist.synthesis.selection import Judge, Selection, known_selection, select_images
from gptfl_dist.synthesis.store import complete_manifest

if TYPE_CHECKING:
    import numpy as np

    from gptfl_dist.learning.judge import Classifier, Encoder
    from gptfl_dist.synthesis.source import ModelFolder

FILTER_SOURCE = "synthesis.filter.source"


def filter_images(file: FederationFile, folder: Path) -> Selection | None:
    """Selects from the finished synthetic set of `file`, which lies in `folder`; None where it has no filter.

    Raises what the judge and the store raise; too few images of a label are the caller's to refuse.
    """
    settings = file.synthesis.filter
    if settings is None:
        return None
    prompts = complete_manifest(file.synthesis.folder).request.prompts
    return select_images(file.synthesis.folder, settings, _judge(file, settings, prompts, folder))


def selected_images(file: FederationFile, folder: Path) -> Selection | None:
    """The selection that `filter_images` made of the same set by the same settings. Raises DataError if none."""
    settings = file.synthesis.filter
    if settings is None:
        return None
    manifest = complete_manifest(file.synthesis.folder)
    judge = _judge(file, settings, manifest.request.prompts, folder)
    return known_selection(file.synthesis.folder, manifest, settings, judge.request)


def load_judge(
    file: FederationFile, settings: Filter, prompts: Mapping[str, Sequence[str]], found: ModelFolder
) -> Classifier | Encoder:
    """The judge that lies in a folder, on the device of the generator. Raises ModelError, GeneratorError (device)."""
    from gptfl_dist.learning.judge import Classifier, Encoder
    from gptfl_dist.synthesis.generator import place

    device = place(file.synthesis.generator).device
    if settings.judge == "classifier":
        return Classifier(found, file.labels, device)
    return Encoder(found, {label: prompts[label] for label in file.labels}, device)


def _judge(file: FederationFile, settings: Filter, prompts: Mapping[str, Sequence[str]], folder: Path) -> Judge:
    return _cross(file, folder) if settings.source is None else _foreign(file, settings, settings.source, prompts)


def _cross(file: FederationFile, folder: Path) -> Judge:
    """Models of the federation's own kind, trained with the settings of pre-training."""
    from gptfl_dist.learning.cross import FOLDS, cross_predict
    from gptfl_dist.learning.seeding import derive_seed

    def ask(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        import torch

        from gptfl_dist.learning.data import ImageSet
        from gptfl_dist.learning.models import build_model

        sys.path.insert(0, str(folder.absolute()))  # for a model.source that names a module there
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        data = ImageSet(pixels, torch.from_numpy(labels), tuple(file.labels))
        with progress("filter", 0, "batches") as bar:
            return cross_predict(
                lambda seed: build_model(file.model, file.task, len(file.labels), seed),
                data,
                file.pretraining,
                file.task,
                seed=derive_seed(file.seed, "filter"),
                progress=bar.callback,
            )

    request = {
        "kind": "cross",
        "folds": FOLDS,
        "labels": file.labels,
        "seed": file.seed,
        "task": file.task.model_dump(mode="json"),
        "model": file.model.model_dump(mode="json"),
        "pretraining": file.pretraining.model_dump(mode="json"),
    }
    return Judge(request, file.task, ask)


def _foreign(file: FederationFile, settings: Filter, source: str, prompts: Mapping[str, Sequence[str]]) -> Judge:
    """A classifier or an encoder that somebody else trained."""
    from gptfl_dist.synthesis.source import find_model

    found = find_model(source, FILTER_SOURCE)

    def ask(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        import torch

        from gptfl_dist.learning.seeding import usable_cores

        torch.set_num_threads(file.synthesis.threads or usable_cores())
        judge = load_judge(file, settings, prompts, found)
        with progress("filter", 0, "batches") as bar:
            return judge.probabilities(images, bar.callback)

    request = {"kind": settings.judge, "source": found.id, "digest": found.digest, "labels": file.labels}
    return Judge(request, file.task, ask)

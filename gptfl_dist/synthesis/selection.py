"""Which images of a finished set are trained on: those on whose label a judge agrees, and of them a quota a label.

`selection.json` beside the shards holds what the judge said of each image and what follows from it; the shards are
never altered. Asking is costly, so the answers are used again as long as set and judge are the same: another threshold
or quota is decided from them at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from blake3 import blake3
from pydantic import ValidationError

from gptfl_dist.config.base import Section
from gptfl_dist.config.synthesis import Filter
from gptfl_dist.config.task import Task
from gptfl_dist.errors import DataError, GeneratorError, ModelError
from gptfl_dist.files import write_file
from gptfl_dist.synthesis import store
from gptfl_dist.synthesis.store import ClipRequest, Manifest

SELECTION = "selection.json"
LEAST_SHARE = 0.1
"""Of a label's images, that must pass: with fewer the judge does not know the label, or the generator does not."""

_DIGITS = 4  # of a probability in the file, by which it is decided, so that the file alone explains itself


@dataclass(frozen=True)
class Judge:
    """Who says what images show.

    `request` is all that decides the answers, as JSON values. `ask` gives for images uint8 (N, H, W, C), which are the
    samples as `task` shows them, and the labels int64 (N,) that they were asked for the probability of each label,
    floats (N, L). A row may sum to less than 1: the rest is that of everything that is no label.
    """

    request: dict[str, Any]
    task: Task
    ask: Callable[[np.ndarray, np.ndarray], np.ndarray]


class Answers(Section):
    """What a judge said, a value an image in storage order.

    `asked` is the label that the image was made for and `probability` that of it; `judged` is what the judge finds most
    likely and `certainty` that likelihood. Labels are positions; `judged` is None where it is no label at all.
    """

    asked: list[int]
    probability: list[float]
    judged: list[int | None]
    certainty: list[float]


class Selection(Section):
    """`selection.json`: set, judge and settings; how many of each label were made, passed and are kept; each image."""

    format: int = 1
    samples: Literal["images", "clips"] = "images"
    labels: list[str]
    shards: list[str]
    judge: dict[str, Any]
    threshold: float
    keep_per_label: int | None
    made: list[int]
    passed: list[int]
    kept: list[int]
    answers: Answers
    keeps: list[bool]

    @property
    def digest(self) -> str:
        """BLAKE3 of which images are kept."""
        return blake3(bytes(self.keeps)).hexdigest()

    @property
    def count(self) -> int:
        """How many images are kept."""
        return sum(self.kept)

    def rejected(self, label: int) -> list[int]:
        """The positions of the images of a label that are below the threshold, the least probable first."""
        answers = self.answers
        mine = [
            at
            for at, (asked, probability) in enumerate(zip(answers.asked, answers.probability, strict=True))
            if asked == label and probability < self.threshold
        ]
        return sorted(mine, key=lambda at: answers.probability[at])

    def in_words(self) -> str:
        """One line for people, such as: 1,871 of 2,000 images kept (cross, threshold 0.5); least: eight 171; ..."""
        quota = "" if self.keep_per_label is None else f", at most {self.keep_per_label} a label"
        least = min(range(len(self.labels)), key=lambda label: self.kept[label])
        agreed = sum(asked == judged for asked, judged in zip(self.answers.asked, self.answers.judged, strict=True))
        return (
            f"{self.count:,} of {sum(self.made):,} {self.samples} kept ({self.judge['kind']}, threshold "
            f"{self.threshold:g}{quota}); least: {self.labels[least]} {self.kept[least]}; "
            f"the judge reads {100 * agreed / len(self.keeps):.0f} % as asked"
        )

    def require_every_label(self, sheet: Path) -> None:
        """Raise GeneratorError where too few images of a label passed; `sheet` is the picture of those that did not."""
        least = [max(2, math.ceil(LEAST_SHARE * made)) for made in self.made]  # one to train on, one held out
        short = [
            f"{self.passed[label]} of {self.made[label]} of {name} (at least {least[label]})"
            for label, name in enumerate(self.labels)
            if self.passed[label] < least[label]
        ]
        if short:
            raise GeneratorError(
                f"too few synthetic {self.samples} pass the filter ({self.judge['kind']}, threshold "
                f"{self.threshold:g}): {'; '.join(short)}",
                hint=f"{sheet} shows what the judge took them for: lower synthesis.filter.threshold, name another "
                "judge, or change the generator or its prompts",
            )


def select(labels: np.ndarray, probability: np.ndarray, threshold: float, keep_per_label: int | None) -> np.ndarray:
    """Which images are kept, bool (N,): probability at least `threshold`, the first `keep_per_label` of each label.

    The first and not the most probable, which are alike: a model that was trained on 50 or 100 of a digit did worse on
    faces that neither it nor the generator had seen. The draws of a set are independent of their order, so the first
    that pass are as varied as all that pass.
    """
    keeps = probability >= threshold
    if keep_per_label is not None:
        for label in np.unique(labels):
            passing = np.flatnonzero(keeps & (labels == label))
            keeps[passing[keep_per_label:]] = False
    return keeps


def select_images(folder: Path, settings: Filter, judge: Judge) -> Selection:
    """Decide on the images of the finished set in `folder`, and write it down there where it is not the same already.

    The judge is asked only where it was not yet asked about this set. Raises StorageError, ModelError.
    """
    with store.locked(folder):
        manifest = store.complete_manifest(folder)
        earlier = _read(folder)
        if earlier is not None and _same_answers(earlier, manifest, judge.request):
            answers = earlier.answers
        else:
            answers = _answers(folder, manifest, judge)
        selection = _decide(manifest, settings, judge.request, answers)
        if selection != earlier:
            write_file(folder / SELECTION, selection.model_dump_json())
        return selection


def known_selection(folder: Path, manifest: Manifest, settings: Filter, request: dict[str, Any]) -> Selection:
    """The selection that was made before, of this set, by these settings and this judge. Raises DataError if none."""
    selection = _read(folder)
    if (
        selection is None
        or not _same_answers(selection, manifest, request)
        or (selection.threshold, selection.keep_per_label) != (settings.threshold, settings.keep_per_label)
    ):
        found = "there is none" if selection is None else "it is of another set, another judge or other settings"
        raise DataError(
            f"{folder / SELECTION}: expected the selection of synthesis.filter, but {found}",
            hint="make it with: gptfl generate FEDERATION_FILE",
        )
    return selection


def _read(folder: Path) -> Selection | None:
    """The selection of a folder; None where there is none that this release can read: it is made anew then."""
    path = folder / SELECTION
    with store.storing(path):
        if not path.exists():
            return None
        text = path.read_bytes()
    try:
        return Selection.model_validate_json(text)
    except ValidationError:
        return None


def _same_answers(selection: Selection, manifest: Manifest, request: dict[str, Any]) -> bool:
    return selection.judge == request and selection.shards == [shard.digest for shard in manifest.shards]


def _answers(folder: Path, manifest: Manifest, judge: Judge) -> Answers:
    images: list[np.ndarray] = []
    asked: list[int] = []
    for shard in manifest.shards:
        pictures, labels = store.read_shard(folder, shard, judge.task)
        images += pictures
        asked += labels
    answer = np.asarray(judge.ask(np.stack(images), np.asarray(asked, dtype=np.int64)), dtype=np.float64)
    if not np.isfinite(answer).all():
        raise ModelError(
            f"the judge {judge.request['kind']} of synthesis.filter answers with values that are no numbers",
            hint="name another judge",
        )
    judged, certainty = answer.argmax(axis=1), answer.max(axis=1)
    rest = 1 - answer.sum(axis=1)
    return Answers(
        asked=asked,
        probability=answer[np.arange(len(asked)), asked].round(_DIGITS).tolist(),
        judged=[None if other > most else int(at) for at, most, other in zip(judged, certainty, rest, strict=True)],
        certainty=np.maximum(certainty, rest).round(_DIGITS).tolist(),
    )


def _decide(manifest: Manifest, settings: Filter, request: dict[str, Any], answers: Answers) -> Selection:
    labels = manifest.request.labels
    asked, probability = np.asarray(answers.asked), np.asarray(answers.probability)
    keeps = select(asked, probability, settings.threshold, settings.keep_per_label)

    def counted(chosen: np.ndarray) -> list[int]:
        counts: list[int] = np.bincount(asked[chosen], minlength=len(labels)).tolist()
        return counts

    return Selection(
        samples="clips" if isinstance(manifest.request.task, ClipRequest) else "images",
        labels=labels,
        shards=[shard.digest for shard in manifest.shards],
        judge=request,
        threshold=settings.threshold,
        keep_per_label=settings.keep_per_label,
        made=counted(np.ones(len(asked), dtype=bool)),
        passed=counted(probability >= settings.threshold),
        kept=counted(keeps),
        answers=answers,
        keeps=keeps.tolist(),
    )

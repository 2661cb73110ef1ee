"""The stages before the federation, each a function: synthetic data, then pre-training on them.

Each finds what an earlier call finished and goes on from there. They run in a process of their own (`run_stage`), so
that the coordinator's stays small and Ctrl-C ends them at once. Several ranks can carry one out together.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.errors import DataError, GeneratorError, ModelError, StageFailed, StorageError
from gptfl_dist.files import storage_error, write_file
from gptfl_dist.launch.channel import error_from_message
from gptfl_dist.launch.lifeline import Child
from gptfl_dist.learning.group import ALONE, Group
from gptfl_dist.observe.progress import progress
from gptfl_dist.observe.wording import choice_text
from gptfl_dist.run.at_rest import use_at_rest
from gptfl_dist.run.candidates import (
    CONTACT_SHEET,
    DROPPED_SHEET,
    PRETRAINED_FACTS,
    PRETRAINED_WEIGHTS,
    PRETRAINING_COST,
    PRETRAINING_STATE,
    adopt,
    asks_silos,
    candidate_files,
)
from gptfl_dist.run.cost import COST, Meter, hardware_of
from gptfl_dist.run.settings import from_folder
from gptfl_dist.run.synthetic import pretraining_seed, synthetic_images, synthetic_parts
from gptfl_dist.weights import WeightsFile

if TYPE_CHECKING:
    from gptfl_dist.synthesis.selection import Selection
    from gptfl_dist.synthesis.synthesize import SyntheticSet


Stage = Literal["generate", "pretrain"]
STAGES: tuple[Stage, ...] = ("generate", "pretrain")


def stages_of(file: FederationFile) -> list[Stage]:
    """The stages that the arms of a file, and what else it uses synthetic data for, need."""
    if file.pretrains:
        return list(STAGES)
    return ["generate"] if file.synthesises else []


@dataclass(frozen=True)
class Generated:
    """How many images the synthetic set has, how many are trained on, and what its filter did, None without one."""

    images: int
    kept: int
    filter: str | None


def generate(file: FederationFile, folder: Path, group: Group = ALONE) -> Generated | None:
    """Makes the synthetic set, selects from it where the file has a filter, and draws the contact sheets.

    Does so for every candidate, where the file has some, and returns the sums. `folder` is where the federation file
    lies. All ranks of the group make the sets; the rest is rank 0's, and the others return None. Raises GeneratorError,
    also where the filter keeps too few of a label.
    """
    candidates = candidate_files(file)
    sets = {
        name: _synthesize(one, f"generate {name}".rstrip(), group) for name, one in (candidates or {"": file}).items()
    }
    if not group.leader:
        return None
    if not candidates:
        return _select(file, folder, sets[""])
    made = {name: _select(one, folder, sets[name]) for name, one in candidates.items()}
    filtered = "; ".join(f"{name}: {one.filter}" for name, one in made.items() if one.filter is not None)
    return Generated(sum(one.images for one in made.values()), sum(one.kept for one in made.values()), filtered or None)


def _synthesize(file: FederationFile, title: str, group: Group) -> SyntheticSet:
    import torch

    from gptfl_dist.learning.seeding import usable_cores
    from gptfl_dist.synthesis.generator import place
    from gptfl_dist.synthesis.synthesize import synthesize

    if group.leader:
        try:
            file.run_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, file.run_folder) from None
    settings = file.synthesis
    generator = settings.generator.model_copy(update={"device": group.device(settings.generator.device)})
    settings = settings.model_copy(update={"generator": generator})
    total = settings.images_per_label * len(file.labels)
    meter = Meter(
        settings.folder / COST,
        devices=group.size,
        hardware=lambda: hardware_of(torch.device(place(generator).device), settings.threads or usable_cores()),
        goes_on=True,
    )
    with _shown(group, title, total, file.task.samples) as report:
        report = meter.beside(report) if group.leader else report
        made = synthesize(settings, file.task, file.labels, file.seed, settings.folder, report, group)
    if meter.begun:
        meter.note()
    return made


def _select(file: FederationFile, folder: Path, made: SyntheticSet) -> Generated:
    from gptfl_dist.run.filter import filter_images
    from gptfl_dist.synthesis.contact_sheet import contact_sheet, dropped_sheet

    selection = filter_images(file, folder)
    contact_sheet(file.synthesis.folder, file.run_folder / CONTACT_SHEET, selection)
    dropped = file.run_folder / DROPPED_SHEET
    if selection is None or not dropped_sheet(file.synthesis.folder, dropped, selection):
        dropped.unlink(missing_ok=True)
    if selection is None:
        return Generated(made.count, made.count, None)
    selection.require_every_label(dropped)
    return Generated(made.count, selection.count, selection.in_words())


def pretrain(file: FederationFile, folder: Path, group: Group = ALONE) -> dict[str, Any] | None:
    """Trains the model on the synthetic set, of which the file's filter may have kept a part.

    Writes the weights into the run folder and returns how it went. Where the file has candidates, a model of each is
    trained: the answer has `candidates`, by name, and `choice`, a line where held-out images chose (else the silos do
    later, and it is None). `folder` is where the federation file lies, for a model.source that names a module there.
    All ranks of the group train, each reads the synthetic set; rank 0 alone writes, and the others return None.

    Reused where the synthetic set, the model and every setting are the same and the weights are whole; one that was
    stopped goes on after its last whole epoch. Raises DataError, ModelError.
    """
    use_at_rest(file.at_rest, file.run_folder)
    candidates = candidate_files(file)
    facts = {
        name: _pretrain(one, folder, f"pretrain {name}".rstrip(), group)
        for name, one in (candidates or {"": file}).items()
    }
    if not group.leader:
        return None
    if not candidates:
        return facts[""]
    return {"candidates": facts, "choice": None if asks_silos(file) else _choose_on_held_out(file, folder)}


def _pretrain(file: FederationFile, folder: Path, title: str, group: Group) -> dict[str, Any]:
    """What rank 0 learns of a model's pre-training; nothing at other ranks."""
    from gptfl_dist.learning.checkpoint import Checkpoint
    from gptfl_dist.learning.device import resolve_device
    from gptfl_dist.learning.models import build_model
    from gptfl_dist.learning.pretrain import pretrain as train
    from gptfl_dist.run.filter import selected_images
    from gptfl_dist.weights.flat import FlatModel

    selection = selected_images(file, folder)
    if selection is not None:
        selection.require_every_label(file.run_folder / DROPPED_SHEET)
    request = _request(file, folder, selection)
    facts, weights = file.run_folder / PRETRAINED_FACTS, file.run_folder / PRETRAINED_WEIGHTS
    known = _known(facts, weights, request) if group.leader else None
    if group.tell({"known": known is not None} if group.leader else None)["known"]:
        if group.leader:
            print(f"{title}: {weights} is there and is reused", file=sys.stderr, flush=True)
        return known or {}
    data = synthetic_images(file, selection)
    sys.path.insert(0, str(folder.absolute()))
    model = build_model(file.model, file.task, len(file.labels), file.seed)
    settings = file.pretraining
    checkpoint = Checkpoint(file.run_folder / PRETRAINING_STATE, json.dumps(request))
    meter = Meter(
        file.run_folder / PRETRAINING_COST,
        devices=group.size,
        hardware=lambda: hardware_of(resolve_device(group.device(settings.device)), group.threads(settings.threads)),
        goes_on=group.leader and bool(checkpoint.read()),  # one of another request is not gone on from
    )
    with _shown(group, title, 0, "batches") as report:
        result = train(
            *(model, data, settings, file.task),
            seed=pretraining_seed(file),
            progress=meter.beside(report) if group.leader else report,
            group=group,
            checkpoint=checkpoint,
        )
    if not group.leader:
        return {}
    meter.note()
    digest = FlatModel(model.cpu()).save(weights)
    filtered = None if selection is None else selection.in_words()
    known = {"request": request, "digest": digest, "images": len(data), "filter": filtered, "ranks": group.size}
    known |= asdict(result)
    write_file(facts, json.dumps(known, indent=1))
    checkpoint.remove()
    return known


def is_generated(file: FederationFile, folder: Path) -> bool:
    """Whether `generate` has nothing left to do for a file without candidates, without beginning it."""
    from gptfl_dist.run.filter import selected_images
    from gptfl_dist.synthesis.synthesize import is_synthesized

    settings = file.synthesis
    if settings.candidates:
        return False
    try:
        if not is_synthesized(settings, file.task, file.labels, file.seed, settings.folder):
            return False
        selection = selected_images(file, folder)
        if selection is not None:
            selection.require_every_label(file.run_folder / DROPPED_SHEET)
    except (DataError, GeneratorError, StorageError):  # it is for `generate` to make it anew, or to say what is wrong
        return False
    return True


def is_pretrained(file: FederationFile, folder: Path) -> bool:
    """Whether `pretrain` has nothing left to do for a file without candidates, without beginning it."""
    from gptfl_dist.run.filter import selected_images

    if file.synthesis.candidates or not (file.run_folder / PRETRAINED_WEIGHTS).exists():
        return False
    try:
        request = _request(file, folder, selected_images(file, folder))
    except (DataError, StorageError):  # the set is not complete, or not selected from
        return False
    return _known(file.run_folder / PRETRAINED_FACTS, file.run_folder / PRETRAINED_WEIGHTS, request) is not None


def _request(file: FederationFile, folder: Path, selection: Selection | None) -> dict[str, Any]:
    """All that decides the pre-trained weights."""
    from gptfl_dist.learning.seeding import usable_cores
    from gptfl_dist.synthesis.store import complete_manifest

    return {
        "shards": [shard.digest for shard in complete_manifest(file.synthesis.folder).shards],
        "selection": None if selection is None else selection.digest,
        "model": from_folder(file.model.model_dump(mode="json"), folder),
        "task": file.task.model_dump(mode="json"),
        "labels": file.labels,
        "seed": file.seed,
        "pretraining": file.pretraining.model_dump(mode="json"),
        "threads": file.pretraining.threads or usable_cores(),
    }


def _known(facts: Path, weights: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier pre-training wrote; None where it was another one, or its weights are not whole."""
    if not (facts.exists() and weights.exists()):
        return None
    known: dict[str, Any] = json.loads(facts.read_text())
    return known if known["request"] == request and known.get("digest") == _digest_of(weights) else None


@contextlib.contextmanager
def _shown(group: Group, title: str, total: int, unit: str) -> Iterator[Callable[[int, int], None]]:
    """The progress of a stage, which rank 0 shows for all."""
    if not group.leader:
        yield lambda done, total: None
        return
    with progress(title, total, unit) as bar:
        yield bar.callback


def _choose_on_held_out(file: FederationFile, folder: Path) -> str:
    """Adopts the candidate whose model does best on what every candidate held out, each set counting alike.

    Its own set alone would favour a generator whose images are all alike. Returns a line that says how it was chosen.
    """
    from gptfl_dist.learning.evaluate import evaluate
    from gptfl_dist.learning.models import build_model
    from gptfl_dist.weights.flat import FlatModel

    candidates = candidate_files(file)
    sys.path.insert(0, str(folder.absolute()))
    model = FlatModel(build_model(file.model, file.task, len(file.labels), file.seed))
    held_out = [synthetic_parts(candidate, folder)[1] for candidate in candidates.values()]
    accuracy = {}
    for name, candidate in candidates.items():
        model.load(candidate.run_folder / PRETRAINED_WEIGHTS)
        found = [evaluate(model.model, images, file.task, device="cpu").accuracy for images in held_out]
        accuracy[name] = sum(found) / len(found)
    return choice_text(adopt(file, accuracy))


def _digest_of(weights: Path) -> str | None:
    """BLAKE3 of a weights file; None where it cannot be read as one."""
    try:
        with WeightsFile(weights) as file:
            return file.digest()
    except (ModelError, StorageError):
        return None


async def run_stage(stage: Stage, path: Path) -> dict[str, Any]:
    """Runs a stage of the federation file at `path` in a process of its own; returns what its command prints as JSON.

    Raises its error, or StageFailed.
    """
    with tempfile.TemporaryFile() as answer:
        command = [sys.executable, "-m", "gptfl_dist", stage, os.fspath(path), "--quiet", "--format", "json"]
        child = Child(command, output=None, answer=answer)
        try:
            code = await asyncio.to_thread(child.process.wait)
        finally:
            child.stop()
        return answer_of(stage, code, answer)


def answer_of(what: str, code: int, answer: IO[bytes]) -> dict[str, Any]:
    """What a command printed as JSON, which ended with this exit code. Raises its error, or StageFailed."""
    answer.seek(0)
    try:
        told: dict[str, Any] = json.loads(answer.read())
    except ValueError:  # it met a defect, and printed that itself
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise StageFailed(f"{what} {how}", hint="the same command goes on from there") from None
    if code == 0:
        return told
    raise error_from_message({"kind": told["error"], "message": told["message"], "hint": told["hint"]})

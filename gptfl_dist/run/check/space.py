"""What a run needs of the disk: an upper estimate of all that it keeps, by file system, against what is free."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from gptfl_dist.aggregation.server import moment_names
from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.plan import Plan
from gptfl_dist.errors import StorageError
from gptfl_dist.observe.wording import size
from gptfl_dist.run.check.common import built_model, nearest
from gptfl_dist.weights.samples import samples_layout


def enough_space(path: Path, file: FederationFile) -> str:
    """Compares free space with an upper estimate of what the whole run keeps, by file system."""
    from gptfl_dist.run.result import federated_arms
    from gptfl_dist.weights.flat import layout_of

    model = layout_of(built_model(path, file)).nbytes
    rates = len(file.training.learning_rates)
    arms = len(federated_arms(file))
    runs = arms * (1 + (rates if rates > 1 else 0))
    kept = 3 * runs + 1  # start, best, newest of each; the next being written
    if file.federation.keep == "all":
        kept += arms * file.federation.rounds
    if file.federation.mode == "asynchronous" or file.federation.late == "carry":
        kept += len(file.silos)  # what the open orders of earlier rounds start from
    control = file.strategy.rule == "scaffold"
    # The strategy's state of each newest, and the next one.
    kept += (runs + 1) * (len(moment_names(file.strategy)) + control)
    sets = len(file.synthesis.candidates) or 1
    named = 2 * arms + 2 + 2 * sets  # models/ARM, models/ARM-final; random, pretrained; each candidate's and its start
    spools = len(file.silos)
    encoded = [name for name in (file.compression.up, file.compression.down) if name != "none"]
    owed = 2 if file.compression.up != "none" and file.compression.error_feedback else 0  # the last, and the next
    # Of silos run here the received weights and the update, each in its encoded form too, and what encoding lost.
    owed += 2 * len(Plan.of(file).kept)  # likewise what the strategy keeps at a silo
    silos = (2 + len(encoded) + owed) * sum(entry.file is not None for entry in file.silos)
    spools += len(encoded) + control  # what is handed out is made once for all silos
    spools, silos = spools * (1 + control), silos * (1 + control)  # the control variate goes where the weights go
    wanted = {file.run_folder: model * (kept + named + spools + silos)}
    wanted[file.run_folder] += handed_out(file) * (1 + sum(entry.file is not None for entry in file.silos))
    if file.synthesises:
        task = file.task
        sample = math.prod(task.shape) if task.kind == "image" else 2 * task.clip_samples
        wanted[file.synthesis.folder] = sets * file.synthesis.images_per_label * len(file.labels) * sample
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, most in wanted.items():
        there = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
        place = nearest(folder)
        first, sum_ = by_disk.get(place.stat().st_dev, (place, 0))
        by_disk[place.stat().st_dev] = (first, sum_ + max(0, most - there))
    told = []
    for place, needed in by_disk.values():
        free = shutil.disk_usage(place).free
        if free < needed:
            raise StorageError(
                f"{size(free)} free at {place}, and the run may need {size(needed)} more",
                hint="free some space, or set run_folder and synthesis.folder to a larger disk",
            )
        told.append(f"{size(free)} free at {place}, at most {size(needed)} more needed")
    return "; ".join(told)


def handed_out(file: FederationFile) -> int:
    """How many bytes of synthetic samples a silo is given at most."""
    if file.mixing.samples == "none":
        return 0
    each = min(file.mixing.per_label, file.synthesis.images_per_label)
    return samples_layout(file.task.shape, each * len(file.labels)).nbytes

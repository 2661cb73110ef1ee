"""The synthetic set as later stages use it: what is trained on, what is held out, and what of it silos are given.

What is held out by pre-training is so throughout: no model is trained on it, at the coordinator or at a silo, so it can
judge them. It is not untouched, though: pre-training keeps the epoch that is best on it, which favours the start of the
arm `gptfl` a little.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.config.mixing import HandedOut
from gptfl_dist.config.silo import Data
from gptfl_dist.errors import DataError, StorageError
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.weights import WeightsFile
from gptfl_dist.weights.samples import count_of

if TYPE_CHECKING:
    from gptfl_dist.learning.data import ImageSet
    from gptfl_dist.synthesis.selection import Selection

SAMPLES = "samples.safetensors"
"""The synthetic samples that silos are given, in the run folder."""


def pretraining_seed(file: FederationFile) -> int:
    """The seed of the training on synthetic data, and of the choice of what it holds out."""
    from gptfl_dist.learning.seeding import derive_seed

    return derive_seed(file.seed, "pretrain")


def synthetic_images(file: FederationFile, selection: Selection | None) -> ImageSet:
    """The synthetic images that the filter kept, or all. Raises DataError."""
    import numpy as np

    from gptfl_dist.learning.data import load_images

    folder = file.synthesis.folder
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no synthetic set", hint="make it with: gptfl generate FEDERATION_FILE")
    data = load_images(Data(path=folder, format="parquet"), file.task, file.labels)
    return data if selection is None else data.subset(np.flatnonzero(selection.keeps))


def synthetic_parts(file: FederationFile, folder: Path) -> tuple[ImageSet, ImageSet]:
    """What pre-training trains on and what it holds out; `folder` is where the federation file lies.

    Raises DataError where the set is not there, or not filtered yet.
    """
    from gptfl_dist.learning.pretrain import split_synthetic
    from gptfl_dist.run.filter import selected_images

    data = synthetic_images(file, selected_images(file, folder))
    return split_synthetic(data, file.pretraining, pretraining_seed(file))


def samples_for_silos(file: FederationFile, folder: Path) -> ImageSet:
    """What of the synthetic set silos are given, the same whenever it is drawn. Raises DataError."""
    from gptfl_dist.learning.mixing import drawn
    from gptfl_dist.learning.seeding import derive_seed

    trained, _ = synthetic_parts(file, folder)
    return drawn(trained, file.mixing.per_label, derive_seed(file.seed, "mixing"))


def open_samples(file: FederationFile, ledger: Ledger) -> tuple[WeightsFile, HandedOut]:
    """Opens the synthetic samples that silos are given; with what the plan tells of them.

    Raises ModelError, and StorageError where they are not those that the run began with.
    """
    mixing = file.mixing
    assert mixing.samples != "none"
    samples = WeightsFile(ledger.folder / SAMPLES)
    digest, count = samples.digest(), count_of(samples.layout)
    if digest != (known := ledger.fact("samples") or digest):
        samples.close()
        raise StorageError(
            f"{ledger.folder / SAMPLES} does not hold the synthetic samples that the run began with: their "
            f"BLAKE3 is {digest}, expected {known}",
            hint="delete it, and it is drawn again from the synthetic set; where that was made anew since, put the "
            "old set back, or begin anew with --fresh",
        )
    ledger.set_fact("samples", digest)
    return samples, HandedOut(digest=digest, count=count, use=mixing.samples, per_label=mixing.per_label)

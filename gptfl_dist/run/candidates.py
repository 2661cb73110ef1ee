"""Several generators, prompts or filters to choose from: a candidate is a federation file with a run folder of its own.

So the stages before the federation treat a candidate as they treat a file without any. The one that is chosen, by the
silos or on held-out synthetic images, is adopted: what the stages made of it is copied to where later stages and the
report look for it, and `choice.json` says why.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from gptfl_dist.config.federation import FederationFile
from gptfl_dist.files import storage_error, write_file
from gptfl_dist.observe.summary import Choice

CONTACT_SHEET = "synthetic.png"
DROPPED_SHEET = "dropped.png"
PRETRAINED_WEIGHTS = "pretrained.safetensors"
PRETRAINED_FACTS = "pretrained.json"
PRETRAINING_STATE = "pretraining.safetensors"
"""The checkpoint of a pre-training that is not finished."""
PRETRAINING_COST = "pretraining-cost.json"
"""What the pre-training took."""
CHOICE = "choice.json"
CANDIDATES = "candidates"
"""The folder of the candidates' run folders."""


def candidate_files(file: FederationFile) -> dict[str, FederationFile]:
    """The federation file of each candidate, by name; none where the file has no candidates."""
    return {
        name: file.model_copy(
            update={"synthesis": file.synthesis.of_candidate(name), "run_folder": file.run_folder / CANDIDATES / name}
        )
        for name in file.synthesis.candidates
    }


def asks_silos(file: FederationFile) -> bool:
    """Whether the silos choose among candidates."""
    return bool(file.synthesis.candidates) and file.synthesis.choose_by == "silos"


def adopt(file: FederationFile, accuracy: Mapping[str, float]) -> Choice:
    """Makes the candidate of the highest accuracy (0 to 1) the run's; of equal ones the first.

    Raises StorageError.
    """
    best = max(accuracy, key=lambda name: accuracy[name])
    source = file.run_folder / CANDIDATES / best
    try:
        for name in (CONTACT_SHEET, DROPPED_SHEET, PRETRAINED_FACTS, PRETRAINED_WEIGHTS):
            (file.run_folder / name).unlink(missing_ok=True)
            if (source / name).exists():
                shutil.copyfile(source / name, file.run_folder / name)
    except OSError as error:
        raise storage_error(error, file.run_folder) from None
    choice = Choice(chosen=best, by=file.synthesis.choose_by, accuracy=dict(accuracy))
    write_file(file.run_folder / CHOICE, choice.model_dump_json())
    return choice

"""Models out of a run folder: of any arm, after any round whose weights are still kept.

The weights are copied block by block, whole or not at all, and their digest is checked on the way. Where the model is
one of `transformers`, it can be written as a folder that its `from_pretrained` loads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from gptfl_dist.config.federation import Arm, FederationFile
from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import ConfigError, ModelError, StorageError, first_line
from gptfl_dist.ledger.reader import LedgerReader, read
from gptfl_dist.ledger.records import ArmRecord
from gptfl_dist.run.arm import best_round
from gptfl_dist.run.at_rest import use_at_rest
from gptfl_dist.run.candidates import PRETRAINED_FACTS, PRETRAINED_WEIGHTS
from gptfl_dist.run.result import federated_arms
from gptfl_dist.weights import BLOCK, WeightsFile, write_weights


@dataclass(frozen=True, slots=True)
class Exported:
    """Which model it is: `round` is None for the pre-trained model; `digest` is BLAKE3 of the weights, in hex."""

    arm: str
    round: int | None
    digest: str
    out: Path | None
    transformers: Path | None


def export(
    path: Path, *, arm: Arm | None, which: str, out: Path | None, transformers: Path | None, force: bool
) -> Exported:
    """Writes a model of the federation file at `path`, as safetensors and as a folder of `transformers`.

    `arm` is the last of the file that was begun if None; `synthetic_only` is the pre-trained model. `which` is `best`
    (on validation data, so far), `final` (the newest) or the number of a round, 0 for the start. Raises ConfigError
    where there is no such model any more, StorageError where it is damaged or cannot be written, ModelError.
    """
    file = load_federation(path)
    if out is None and transformers is None:
        raise ConfigError("nothing says where to", hint="give --out FILE, --transformers FOLDER or both")
    if transformers is not None and file.model.name != "transformers":
        raise ConfigError(
            f"model.name is {file.model.name}, which makes no folder of transformers", hint="leave out --transformers"
        )
    if out is not None and out.exists() and not force:
        raise ConfigError(f"{out} exists", hint="name another file, or overwrite it with --force")
    if transformers is not None and transformers.exists() and any(transformers.iterdir()):
        raise ConfigError(f"{transformers} is not empty", hint="name a folder that is new or empty")
    use_at_rest(file.at_rest, file.run_folder)
    name, round_, source, digest = _pretrained(file) if arm == "synthetic_only" else _federated(file, arm, which)
    if out is not None:
        told = {"format": "pt", "federation": file.name, "arm": name, "round": str(round_ or 0), "blake3": digest}
        with WeightsFile(source) as weights:
            write_weights(out, weights.layout, _checked(weights, digest), metadata=told, sealed=False)
    if transformers is not None:
        _as_transformers(file, path.parent, source, digest, transformers)
    return Exported(name, round_, digest, out, transformers)


def _pretrained(file: FederationFile) -> tuple[str, None, Path, str]:
    """What `export` needs of the pre-trained model: its arm, no round, file and digest."""
    source, facts = file.run_folder / PRETRAINED_WEIGHTS, file.run_folder / PRETRAINED_FACTS
    if not source.exists() or not facts.exists():
        raise ConfigError(f"{source} does not exist: nothing was pre-trained", hint="gptfl pretrain makes it")
    return "synthetic_only", None, source, str(json.loads(facts.read_bytes())["digest"])


def _federated(file: FederationFile, arm: Arm | None, which: str) -> tuple[str, int, Path, str]:
    """The same of a federated arm's model."""
    record = _record_of(file, arm)
    round_ = _round_of(record, which)
    digest = record.weights_of(round_)
    source = _weights(file, digest)
    if not source.exists():
        raise _not_kept(file, record, round_)
    return record.arm, round_, source, digest


def _weights(file: FederationFile, digest: str) -> Path:
    return file.run_folder / "weights" / f"{digest}.safetensors"


def _record_of(file: FederationFile, arm: Arm | None) -> ArmRecord:
    """The record of an arm; of the last that was begun where none is named."""

    def ask(ledger: LedgerReader) -> list[ArmRecord]:
        return [record for name in federated_arms(file) if (record := ledger.arm(name)) is not None]

    begun = read(file.run_folder, ask) or []
    wanted = [record for record in begun if arm in (None, record.arm)]
    if not wanted:
        which = f"the arm {arm}" if arm else "no federated arm"
        there = ", ".join(record.arm for record in begun) or "none"
        raise ConfigError(f"{file.run_folder}: {which} was {'not ' if arm else ''}begun", hint=f"begun were: {there}")
    return wanted[-1]


def _round_of(record: ArmRecord, which: str) -> int:
    if which == "final":
        return record.finished_rounds
    if which == "best":
        return best_round(record) if record.best_round is None else record.best_round
    if int(which) > record.finished_rounds:
        raise ConfigError(
            f"{record.arm} has no round {which}", hint=f"it has finished {record.finished_rounds}; 0 is its start"
        )
    return int(which)


def _not_kept(file: FederationFile, record: ArmRecord, round_: int) -> ConfigError:
    kept = [
        str(number)
        for number in range(record.finished_rounds + 1)
        if _weights(file, record.weights_of(number)).exists()
    ]
    return ConfigError(
        f"the weights of {record.arm} after round {round_} are not kept any more; kept are those of round "
        f"{', '.join(kept) or 'none'}",
        hint="federation.keep: all keeps those of every round that is still to come",
    )


def _checked(weights: WeightsFile, digest: str) -> Iterator[bytes]:
    """The flat buffer in blocks. Raises StorageError after the last where it is not what was asked for."""
    hasher = blake3()
    for offset in range(0, weights.nbytes, BLOCK):
        block = weights.read(offset, min(BLOCK, weights.nbytes - offset))
        hasher.update(block)
        yield block
    if hasher.hexdigest() != digest:
        raise _damaged(weights.path)


def _damaged(path: Path) -> StorageError:
    return StorageError(f"{path} is damaged: its content is not what was written", hint="export another round")


def _as_transformers(file: FederationFile, folder: Path, source: Path, digest: str, target: Path) -> None:
    """Writes config and weights as the library does; labels are those of the federation."""
    from gptfl_dist.learning.models import build_model
    from gptfl_dist.weights.flat import FlatModel

    sys.path.insert(0, str(folder.absolute()))
    model = build_model(file.model.model_copy(update={"pretrained": False}), file.task, len(file.labels), file.seed)
    flat = FlatModel(model)
    flat.load(source)
    with WeightsFile(source) as weights:
        if weights.digest() != digest:
            raise _damaged(source)
    flat.release()
    model.config.id2label = dict(enumerate(file.labels))  # type: ignore[union-attr]  # a model of transformers
    model.config.label2id = {label: number for number, label in enumerate(file.labels)}  # type: ignore[union-attr]  # a model of transformers
    try:
        model.eval().save_pretrained(target)  # type: ignore[operator]  # likewise
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{target}: the model cannot be written: {first_line(error)}") from None

"""The splits of an experiment, to be written for silos: for each the numbers of its samples, and a silo file.

No sample is copied: every silo file names the experiment's data, and the list of those that are this silo's.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptfl_dist.config.document import dump_yaml
from gptfl_dist.config.experiment import ExperimentFile, Split
from gptfl_dist.config.silo import Data
from gptfl_dist.errors import DataError
from gptfl_dist.files import write_file
from gptfl_dist.learning.partition import dirichlet_partition, key_partition, quantity_partition, shard_partition
from gptfl_dist.learning.seeding import derive_seed
from gptfl_dist.learning.sources import Kind, list_samples, numbers_in
from gptfl_dist.run.folder import make_folder

POOLED = "pooled"
"""The one silo that has the data of all."""

COUNTS = "split.json"


@dataclass(frozen=True)
class Shared:
    """A split: how many samples each silo has, and the texts of its files by name, which `write` puts into `folder`."""

    folder: Path
    samples: Mapping[str, int]
    files: Mapping[str, str]

    def write(self) -> None:
        """Raises StorageError."""
        make_folder(self.folder)
        for name, text in self.files.items():
            write_file(self.folder / name, text)

    def entries(self, *names: str) -> list[dict[str, Any]]:
        """Entries of `silos` in a federation file."""
        return [
            {"name": name, "max_samples": self.samples[name], "file": str(self.folder / f"{name}.yaml")}
            for name in names
        ]

    @property
    def silos(self) -> list[str]:
        """Those that share the data."""
        return [name for name in self.samples if name != POOLED]


def share_out(file: ExperimentFile, name: str, seed: int, folder: Path) -> Shared:
    """A split of the experiment's data for one seed, not written yet. Raises DataError."""
    kind: Kind = "audio" if file.federation.get("task", {}).get("kind") == "audio" else "image"
    whole = file.data.model_copy(update={"samples": None})
    labels = np.array([file.data.labels.get(label, label) for label in list_samples(whole, kind).labels])
    used = np.arange(len(labels))
    if file.data.samples is not None:
        used = np.array(sorted(numbers_in(file.data.samples, len(labels))))
    split = file.splits[name]
    keys = None if split.key is None else keys_of(whole, kind, split.key)
    if keys is not None and keys.shape != labels.shape:
        raise DataError(
            f"{file.data.path}: the array {split.key} has the shape {keys.shape}, expected a key for each of "
            f"{len(labels)} samples"
        )
    found = parts_of(split, labels[used], None if keys is None else keys[used], derive_seed(seed, "split", name))
    parts = {silo: used[part] for silo, part in found.items()}
    parts[POOLED] = np.sort(np.concatenate(list(parts.values())))
    files = {}
    for silo, numbers in parts.items():
        files[f"{silo}.txt"] = "\n".join(map(str, numbers.tolist())) + "\n"
        data = file.data.model_copy(update={"samples": Path(f"{silo}.txt")})
        content = {"name": silo, "data": _plain(data), "policy": {"class_means": True}}  # all data are of one owner
        files[f"{silo}.yaml"] = dump_yaml(content)
    counts = {silo: Counter(labels[numbers].tolist()) for silo, numbers in parts.items() if silo != POOLED}
    files[COUNTS] = json.dumps({silo: [each[label] for label in file.labels] for silo, each in counts.items()})
    return Shared(folder, {silo: len(numbers) for silo, numbers in parts.items()}, files)


def keys_of(data: Data, kind: Kind, key: str) -> np.ndarray:
    """Texts (N,) that tell which samples belong together. Raises DataError.

    `key` names an array of an .npz file; of other forms it is a regular expression, the first group of which is found
    in the name of each file.
    """
    if data.path.suffix == ".npz":
        with np.load(data.path, allow_pickle=False) as arrays:
            if key not in arrays:
                raise DataError(f"{data.path} has no array {key}, expected one of {', '.join(arrays)}")
            keys: np.ndarray = arrays[key].astype(str)
        return keys
    found = []
    for where, _ in list_samples(data, kind).raw:
        match = re.search(key, Path(where).name)
        if match is None or not match.groups():
            raise DataError(f"the key {key!r} is not found in {where}", hint="its first group is what is taken")
        found.append(match.group(1))
    return np.array(found)


def parts_of(split: Split, labels: np.ndarray, keys: np.ndarray | None, seed: int) -> dict[str, np.ndarray]:
    """The samples of each silo. `labels` (N,) are texts, as `keys` are where the split is by key."""
    if split.kind == "key":
        assert keys is not None
        found = key_partition(keys)
        silos = {key: part for key, part in found.items() if key not in split.without}
        if not silos or len(silos) + len(split.without) != len(found):
            without, known = ", ".join(split.without), ", ".join(found)
            raise DataError(f"without is {without}, expected some of the keys {known}, each once, and not all of them")
        return silos
    assert split.silos is not None
    if split.kind == "shards":
        assert split.shards is not None
        parts = shard_partition(labels, split.silos, split.shards, seed)
    else:
        assert split.alpha is not None
        draw = dirichlet_partition if split.kind == "dirichlet" else quantity_partition
        parts = draw(labels, split.silos, split.alpha, split.minimum, seed)
    width = len(str(split.silos))
    return {f"silo-{number:0{width}}": part for number, part in enumerate(parts, start=1)}


def _plain(data: Data) -> dict[str, Any]:
    settings: dict[str, Any] = data.model_dump(mode="json", exclude_defaults=True)
    return settings

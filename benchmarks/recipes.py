"""Fine-tuning recipes compared: how a silo's rate goes over the rounds, what it trains, and the server's optimiser.

    python benchmarks/recipes.py --seeds 0 --json runs/recipes/result.json

Two data sets of real digits, each split unevenly over four silos: MNIST as in the demo, and the 8 x 8 digits of
scikit-learn, which come from other writers and another scanner. Every recipe is run in both arms, FedAvg from random
weights and GPT-FL, each with the learning rate that the same grid gives it. The recipe to recommend is the one with the
best validation accuracy at the silos, averaged over data sets, arms and seeds; test accuracy is only reported. The
synthetic set is made once for each seed. An interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from gptfl_dist.learning.partition import dirichlet_partition
from gptfl_dist.run.demo import LABELS, prepare

ARMS = ("fedavg_random", "gptfl")
DATA = ("mnist", "digits")
SILOS = 4
# Changes to the demo's file before those of a recipe: six rates, each the same in every round, and no weight decay.
PLAIN: dict[str, dict[str, Any]] = {
    "training": {
        "learning_rate": [0.1, 0.2, 0.4, 0.8, 1.6, 3.2],
        "schedule": "constant",
        "warm_up_rounds": 0,
        "weight_decay": 0.0,
    },
    "tuning": {"rounds": 5},
}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "constant": {},
    "cosine": {"training": {"schedule": "cosine"}},
    "warm-up": {"training": {"warm_up_rounds": 3}},
    "cosine, warm-up": {"training": {"schedule": "cosine", "warm_up_rounds": 3}},
    "cosine, warm-up, weight decay": {"training": {"schedule": "cosine", "warm_up_rounds": 3, "weight_decay": 0.001}},
    "head first": {"training": {"head_rounds": 2}},
    "proximal": {"training": {"proximal": 0.1}},
    "weight decay": {"training": {"weight_decay": 0.001}},
    "server momentum": {"strategy": {"momentum": 0.9, "learning_rate": 0.3}},
    "server adam": {"strategy": {"optimizer": "adam", "momentum": 0.9, "learning_rate": 0.01}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path("runs/recipes"), help="where the runs go")
    parser.add_argument("--json", type=Path, default=Path("runs/recipes/result.json"))
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        for data in options.data:
            base = make_federation(options.folder / f"{data}-{seed}", data, seed, options.rounds)
            for recipe in options.recipes:
                rows += run(base, recipe, data, seed)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"recipes": RECIPES, "rows": rows, "means": table(rows)}, indent=1) + "\n")


def make_federation(folder: Path, data: str, seed: int, rounds: int) -> Path:
    """The demo's federation file, its data replaced where `data` says so, its synthetic set shared by all data sets."""
    path = prepare(folder, silos=SILOS, rounds=rounds, seed=seed, fresh=False)
    other = folder.with_name(f"{DATA[0]}-{seed}") / "synthetic"
    if other.exists() and not (folder / "synthetic").exists():
        shutil.copytree(other, folder / "synthetic")
    if data == "digits":
        write_digits(folder / "data", seed)
    return path


def write_digits(folder: Path, seed: int) -> None:
    """scikit-learn's 1,797 digits as 32 x 32 pictures: 30 a label for the test, the rest split over the silos."""
    digits = load_digits()
    small = (digits.images * (255 / 16)).astype(np.uint8)
    images = np.zeros((len(small), 32, 32), np.uint8)
    for number, picture in enumerate(small):
        images[number, 4:28, 4:28] = np.asarray(Image.fromarray(picture).resize((24, 24), Image.Resampling.BICUBIC))
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    test = np.concatenate([order[labels[order] == label][:30] for label in range(len(LABELS))])
    private = np.setdiff1d(np.arange(len(labels)), test)
    parts = dirichlet_partition(labels[private], SILOS, 0.1, 50, seed)
    chosen = {"test": test, **{f"silo-{number}": private[part] for number, part in enumerate(parts, start=1)}}
    for name, mine in chosen.items():
        np.savez(folder / f"{name}.npz", images=images[mine], labels=labels[mine], label_names=np.array(LABELS))


def run(base: Path, recipe: str, data: str, seed: int) -> list[dict[str, Any]]:
    """One run of both arms; a row for each."""
    settings = yaml.safe_load(base.read_text())
    folder = base.parent / recipe.replace(" ", "-").replace(",", "")
    settings["run_folder"] = folder.name
    del settings["synthesis"]["filter"]  # which costs time, and says nothing of a recipe
    for changes in (PLAIN, RECIPES[recipe]):
        for section, values in changes.items():
            settings[section] = {**settings.get(section, {}), **values}
    for silo in settings["silos"]:
        del silo["max_samples"]  # those of MNIST
    share_pretraining(base.parent, folder)
    path = base.with_name(f"{folder.name}.yaml")
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    command = [sys.executable, "-m", "gptfl_dist", "run", str(path)]
    with Path(os.devnull).open("w") as silent:
        subprocess.run(command, check=True, stdout=silent, stderr=silent)
    summary = json.loads((folder / "summary.json").read_text())
    rows = []
    for name in ARMS:
        arm = summary["arms"][name]
        row = {
            "data": data,
            "seed": seed,
            "recipe": recipe,
            "arm": name,
            "learning_rate": arm["learning_rate"],
            "validation_accuracy": arm["validation_accuracy"],
            "accuracy": arm["accuracy"],
            "final_accuracy": arm["final_accuracy"],
            "first_round_accuracy": arm["curve"][0],
            "synthetic_only": summary["arms"]["synthetic_only"]["accuracy"],
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def share_pretraining(data_folder: Path, folder: Path) -> None:
    """Gives a run the model that another run of the same seed was pre-trained to; it is used where it is the same."""
    folder.mkdir(exist_ok=True)
    seed = data_folder.name.rpartition("-")[2]
    for weights in data_folder.parent.glob(f"*-{seed}/*/pretrained.safetensors"):
        facts = weights.with_suffix(".json")
        if facts.exists() and not (folder / facts.name).exists():
            shutil.copy(weights, folder)
            shutil.copy(facts, folder)


def table(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means by recipe, best first on validation data; printed as a table."""
    means: dict[str, dict[str, float]] = {}
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == recipe]
        means[recipe] = {
            "validation": _mean(row["validation_accuracy"] for row in mine),
            **{
                f"{data} {arm}": _mean(row["accuracy"] for row in mine if row["data"] == data and row["arm"] == arm)
                for data in dict.fromkeys(row["data"] for row in rows)
                for arm in ARMS
            },
        }
    ordered = dict(sorted(means.items(), key=lambda item: -item[1]["validation"]))
    columns = list(next(iter(ordered.values())))
    print(f"{'recipe':<30}" + "".join(f"{column:>22}" for column in columns))
    for recipe, values in ordered.items():
        print(f"{recipe:<30}" + "".join(f"{100 * values[column]:>20.2f} %" for column in columns))
    return ordered


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


if __name__ == "__main__":
    main()

"""What the studies have in common: strategies and their grids, the matrix, and how a study is run.

A study is `gptfl experiment` on data and an experiment file in a folder. Its matrix: every strategy of STRATEGIES from
random and from synthetic weights; FedAvg besides with one and three silos in each round and with a single round of as
many epochs as others have rounds; each silo alone, and one silo with the data of all. FedAdam besides with warped
samples at the silos, since pre-training has such and the silos else have not. The synthetic model alone is what cells
with a synthetic start begin with. All that with three seeds.

Tuning. Whatever is compared has six points to choose from, in each split and start anew, tried on the first seed for
half as many rounds (the single round for all of it) and judged by the silos' validation data: six rates of the silos,
half a decade apart, the same for all studies and strategies. FedAdam has a rate of the server too, and so six pairs.
What else a strategy has (mu of FedProx and of MOON) is fixed. Test data choose nothing. Much shorter trials would
favour synthetic starts: from random weights a rate that is best in the end looks no better than others for long.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RATES = (0.016, 0.05, 0.16, 0.5, 1.6, 5.0)
# The silos' rate and the server's.
ADAM_RATES = ((0.05, 0.01), (0.16, 0.03), (0.5, 0.03), (0.5, 0.1), (1.6, 0.1), (1.6, 0.3))
ADAM = {"optimizer": "adam"}
STRATEGIES: dict[str, Any] = {
    "fedavg": {},
    "fedprox": {"training": {"proximal": 0.01}},
    "scaffold": {"strategy": {"rule": "scaffold"}},
    "moon": {"training": {"contrastive": 1.0}},
    "fedadam": {"strategy": ADAM},
}
WARPED = {"strategy": ADAM, "training": {"augmentation": True}}
BOTH = ["random", "synthetic"]
SEEDS = [0, 1, 2]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a study has of its own.

    `settings` are those that all cells share, as in a federation file. Every strategy is run on `splits`, what is for
    reference on the first of them; FedAdam alone on `unseen`.
    """

    name: str
    labels: tuple[str, ...]
    data: dict[str, Any]
    test_data: str
    settings: dict[str, Any]
    rounds: int
    splits: dict[str, Any]
    unseen: dict[str, Any] = field(default_factory=dict)
    epochs: int = 1

    def experiment(self, *, quick: bool) -> dict[str, Any]:
        """The experiment file's content. The quick one shows that all runs: one seed, no tuning, few cells."""
        names = ["fedavg", "scaffold"] if quick else list(STRATEGIES)
        splits, unseen = list(self.splits), list(self.unseen)
        if quick:
            splits, unseen = splits[:1], unseen[:1]
        first = splits[:1]
        cells = [
            {"splits": splits, "starts": BOTH, "strategies": names},
            {"splits": first, "starts": BOTH, "strategies": ["fedavg"], "silos": [1, 3, "alone", "pooled"]},
            {"splits": first, "starts": BOTH, "strategies": ["one-shot", "fedadam-warped"]},
        ]
        if unseen:
            cells.append({"splits": unseen, "starts": BOTH, "strategies": ["fedadam"]})
        return {
            "name": self.name,
            "seeds": SEEDS[:1] if quick else SEEDS,
            "labels": list(self.labels),
            "data": self.data,
            "test_data": self.test_data,
            "federation": {**self.settings, "federation": {"rounds": self.rounds}},
            "splits": self.splits | self.unseen,
            "strategies": self._strategies(quick),
            "tuning": {"rounds": self.rounds // 2, "grid": self._grid(quick)},
            "cells": cells,
        }

    def _grid(self, quick: bool) -> list[dict[str, Any]]:
        rates = RATES[3:4] if quick else RATES
        return [{"training": {"learning_rate": rate}} for rate in rates]

    def _strategies(self, quick: bool) -> dict[str, Any]:
        pairs = ADAM_RATES[:1] if quick else ADAM_RATES
        adam = [{"training": {"learning_rate": rate}, "strategy": {"learning_rate": server}} for rate, server in pairs]
        epochs = {"epochs": self.epochs * self.rounds, "warm_up_rounds": 0}
        one_shot = {"federation": {"rounds": 1}, "training": epochs}
        strategies = {**STRATEGIES, "one-shot": one_shot, "fedadam-warped": WARPED}
        # FedAdam's server has a rate too.
        return {
            name: {"settings": settings} | ({"grid": adam} if settings.get("strategy") == ADAM else {})
            for name, settings in strategies.items()
        }


def main(
    about: str | None,
    study: Callable[[bool], Study],
    prepare: Callable[[Path, argparse.Namespace], None],
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """The command of a study: `study(quick)` is its matrix, `prepare` writes what it needs into its folder."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--quick", action="store_true", help="shows that all runs, and says nothing of the claims")
    parser.add_argument("--folder", type=Path, help="where it runs; runs/study-NAME, with --quick another")
    parser.add_argument("--results", type=Path, help="a folder for NAME.json and NAME.html, when it is done")
    parser.add_argument("--workers", type=int, help="federations at a time; one a core")
    options = parser.parse_args()
    found = study(options.quick)
    folder = options.folder or Path(f"runs/study-{found.name}{'-quick' if options.quick else ''}")
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, options)
    file = folder / "experiment.yaml"
    # What the study is stands in the file, and so on its page, which shows the file.
    comment = "".join(f"# {line}".rstrip() + "\n" for line in (about or "").splitlines())
    file.write_text(comment + json.dumps(found.experiment(quick=options.quick), indent=1) + "\n")
    command = [sys.executable, "-m", "gptfl_dist", "experiment", str(file)]
    if options.workers is not None:
        command += ["--workers", str(options.workers)]
    code = subprocess.run(command, check=False).returncode
    if code == 0 and options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
        for made in ("results.json", "report.html"):
            shutil.copyfile(folder / "results" / made, options.results / f"{found.name}{Path(made).suffix}")
    sys.exit(code)


def write_images(path: Path, images: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> None:
    """An .npz of 32 x 32 pictures (N, 32, 32), of what comes as (N, 28, 28) with labels (N,)."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    np.savez(path, images=padded, labels=labels, label_names=np.array(names))

"""Codecs of updates and weights on the demo: the share of the bytes that is left, and the accuracy that it costs.

    python benchmarks/codecs.py --seeds 0 1 2 --json runs/codecs/result.json

Each seed is the demo's arm gptfl, first uncompressed with its learning rate chosen on validation data, then once for
each codec at the same rate, from the same synthetic set and the same pre-trained weights: only what travels differs.
An interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from demo_seeds import spread
from demo_variants import run_variant

from gptfl_dist.run.demo import prepare

PLAIN = "none"
CODECS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "zstd": {"lossless": "zstd"},
    "fp16": {"up": "fp16", "down": "fp16"},
    "bf16": {"up": "bf16", "down": "bf16"},
    "int8": {"up": "int8", "down": "int8"},
    "int8-up": {"up": "int8"},
    "int8-up-without-feedback": {"up": "int8", "error_feedback": False},
    "int8-zstd": {"up": "int8", "down": "int8", "lossless": "zstd"},
    "topk": {"up": "topk", "top_share": 0.01},
    "topk-10": {"up": "topk", "top_share": 0.1},
    "topk-without-feedback": {"up": "topk", "top_share": 0.01, "error_feedback": False},
}
"""By name, the section `compression` of the federation file."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--silos", type=int, default=4)
    parser.add_argument("--codecs", nargs="+", choices=[name for name in CODECS if name != PLAIN], metavar="CODEC")
    parser.add_argument("--folder", type=Path, default=Path("runs/codecs"), help="where the runs go")
    parser.add_argument("--json", type=Path, default=Path("runs/codecs/result.json"))
    options = parser.parse_args()
    names = [PLAIN, *(options.codecs or [name for name in CODECS if name != PLAIN])]
    by_seed = [
        run_seed(options.folder / f"seed-{seed}", seed, options.silos, options.rounds, names) for seed in options.seeds
    ]
    result = {
        "command": "python benchmarks/codecs.py --rounds {} --seeds {}".format(
            options.rounds, " ".join(map(str, options.seeds))
        ),
        "seeds": options.seeds,
        "rounds": options.rounds,
        "learning_rate": [arms[PLAIN]["learning_rate"] for arms in by_seed],
        "codecs": {name: collect(name, by_seed) for name in names},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'codec':<26}{'up':>8}{'down':>8}{'accuracy':>11}{'sd':>7}{'difference':>12}   points by seed")
    for name, found in result["codecs"].items():
        accuracy, difference = found["final_accuracy"], found["difference"]
        sd = 100 * (accuracy["sd"] or 0)
        points = ", ".join(f"{100 * value:+.1f}" for value in difference["values"])
        print(
            f"{name:<26}{found['up_share']:>8.4f}{found['down_share']:>8.4f}{100 * accuracy['mean']:>9.2f} %{sd:>7.2f}"
            f"{100 * difference['mean']:>+12.2f}   {points}"
        )


def run_seed(folder: Path, seed: int, silos: int, rounds: int, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The arm gptfl of the summary of each codec's run, all in a folder of the seed's."""
    prepared = prepare(folder, silos=silos, rounds=rounds, seed=seed, fresh=False)
    demo = yaml.safe_load(prepared.read_text())
    arms: dict[str, dict[str, Any]] = {}
    for name in names:
        training = demo["training"]
        if name != PLAIN:
            training = {**training, "learning_rate": arms[PLAIN]["learning_rate"]}
        settings = {**demo, "arms": ["gptfl"], "training": training, "compression": CODECS[name]}
        summary = run_variant(folder, name, settings, start_of=None if name == PLAIN else PLAIN)
        arms[name] = summary["arms"]["gptfl"]
    return arms


def collect(name: str, by_seed: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """One codec over the seeds, and paired by seed with no codec."""
    own, plain = [arms[name] for arms in by_seed], [arms[PLAIN] for arms in by_seed]
    return {
        "compression": CODECS[name],
        "up_share": sum(arm["bytes_up"] for arm in own) / sum(arm["bytes_up"] for arm in plain),
        "down_share": sum(arm["bytes_down"] for arm in own) / sum(arm["bytes_down"] for arm in plain),
        "final_accuracy": spread([arm["final_accuracy"] for arm in own]),
        "difference": spread([a["final_accuracy"] - b["final_accuracy"] for a, b in zip(own, plain, strict=True)]),
        "kept_accuracy": spread([arm["accuracy"] for arm in own]),
        "curves": [arm["curve"] for arm in own],
    }


if __name__ == "__main__":
    main()

"""The demo over several seeds: mean and standard deviation of every arm, and the difference of GPT-FL to FedAvg.

    python benchmarks/demo_seeds.py --seeds 0 1 2 --json runs/demo-seeds/result.json

Each seed is a whole run of `gptfl demo` (its own split, synthetic data, start weights and batches) in a folder of its
own; the test digits are the same for all. An interrupted benchmark goes on where it stopped. Writes the JSON file and,
beside it, a plot of the learning curves with their spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptfl_dist.observe.figures import ARM_COLOURS
from gptfl_dist.observe.wording import ARM_NAMES

FEDERATED = ("fedavg_random", "gptfl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-seeds"), help="where the runs go")
    parser.add_argument("--json", type=Path, default=Path("runs/demo-seeds/result.json"))
    options = parser.parse_args()
    summaries = [run(options.folder / f"seed-{seed}", seed, options.rounds) for seed in options.seeds]
    result = collect(options.seeds, summaries)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, options.json.with_suffix(".png"))
    print(json.dumps({name: value for name, value in result.items() if name != "arms"}, indent=1))
    for name, arm in result["arms"].items():
        accuracy = arm["accuracy"]
        print(f"{name:<15} accuracy {100 * accuracy['mean']:.2f} % (sd {100 * accuracy['sd']:.2f})")


def run(folder: Path, seed: int, rounds: int) -> dict[str, Any]:
    """One demo in a process of its own; returns its summary."""
    command = [sys.executable, "-m", "gptfl_dist", "demo", "--folder", str(folder), "--seed", str(seed)]
    subprocess.run([*command, "--rounds", str(rounds)], check=True)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation beside the values; None where a value is missing."""
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    return {
        "values": list(values),
        "mean": statistics.fmean(known) if whole else None,
        "sd": statistics.stdev(known) if whole and len(known) > 1 else None,
    }


def collect(seeds: Sequence[int], summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result as it is written: per arm, and paired by seed."""
    arms: dict[str, Any] = {
        "synthetic_only": {"accuracy": spread([s["arms"]["synthetic_only"]["accuracy"] for s in summaries])}
    }
    for name in FEDERATED:
        own = [s["arms"][name] for s in summaries]
        arms[name] = {
            "accuracy": spread([arm["accuracy"] for arm in own]),
            "final_accuracy": spread([arm["final_accuracy"] for arm in own]),
            "first_round_accuracy": spread([arm["curve"][0] for arm in own]),
            "rounds_to_target": [arm["rounds_to_target"] for arm in own],
            "learning_rate": [arm["learning_rate"] for arm in own],
            "bytes_down": [arm["bytes_down"] for arm in own],
            "bytes_up": [arm["bytes_up"] for arm in own],
            "curves": [arm["curve"] for arm in own],
        }
    pairs = [s["arms"]["gptfl"]["accuracy"] - s["arms"]["fedavg_random"]["accuracy"] for s in summaries]
    return {
        "command": "python benchmarks/demo_seeds.py --seeds " + " ".join(str(seed) for seed in seeds),
        "seeds": list(seeds),
        "target_accuracy": [s["target_accuracy"] for s in summaries],
        "gptfl_minus_fedavg": spread(pairs),
        "seconds": [sum(s["seconds"].values()) for s in summaries],
        "arms": arms,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Mean learning curves, with the lowest and highest of the seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in FEDERATED:
        colour = ARM_COLOURS[name]
        by_round = list(zip(*result["arms"][name]["curves"], strict=True))
        rounds = range(1, len(by_round) + 1)
        axes.plot(rounds, [100 * statistics.fmean(values) for values in by_round], color=colour, label=ARM_NAMES[name])
        low, high = [100 * min(values) for values in by_round], [100 * max(values) for values in by_round]
        axes.fill_between(rounds, low, high, color=colour, alpha=0.2, linewidth=0)
    level = result["arms"]["synthetic_only"]["accuracy"]["mean"]
    axes.axhline(100 * level, color=ARM_COLOURS["synthetic_only"], label=ARM_NAMES["synthetic_only"])
    axes.set(xlabel="round", ylabel="accuracy on test data, %")
    axes.set_title(f"MNIST, Dirichlet 0.1, {len(result['seeds'])} seeds: mean, lowest and highest", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

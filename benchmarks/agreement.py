"""How far the exchanges agree on the demo: the same federation over gRPC, MPI and torch.distributed.

    python benchmarks/agreement.py --json runs/agreement/result.json

Each run has the demo's file, with every round's weights kept, and tunes and federates anew from the same synthetic set
and the same pre-trained weights. Compared with the run over gRPC: whether the weights of an arm's last round and of the
model that it keeps are the same bit for bit, how far the weights are apart after round 1, and the accuracies on test
data. An interrupted benchmark goes on where it stopped; after a change of the code, delete its folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from demo_seeds import FEDERATED
from demo_variants import run_variant
from safetensors.numpy import load_file

from gptfl_dist.run.demo import prepare

sys.path.insert(0, str(Path(__file__).resolve().parent / "null"))

from programs import MPIEXEC, TORCHRUN

GRPC = "grpc"
LAUNCHERS = {GRPC: (sys.executable,), "mpi": MPIEXEC, "torch": TORCHRUN}
# Exchange, ranks and reduction.
RUNS = {
    GRPC: (GRPC, 1, "exact"),
    "mpi-5-exact": ("mpi", 5, "exact"),
    "mpi-3-exact": ("mpi", 3, "exact"),
    "mpi-5-fast": ("mpi", 5, "fast"),
    "torch-5-exact": ("torch", 5, "exact"),
    "torch-5-fast": ("torch", 5, "fast"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--runs", nargs="+", choices=[name for name in RUNS if name != GRPC], metavar="RUN")
    parser.add_argument("--folder", type=Path, default=Path("runs/agreement"), help="where the runs go")
    parser.add_argument("--json", type=Path, default=Path("runs/agreement/result.json"))
    options = parser.parse_args()
    prepared = prepare(options.folder, silos=4, rounds=options.rounds, seed=options.seed, fresh=False)
    demo = yaml.safe_load(prepared.read_text())
    result: dict[str, Any] = {}
    for name in (GRPC, *(options.runs or [name for name in RUNS if name != GRPC])):
        result[name] = run(options.folder, demo, name, result.get(GRPC))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'run':<14}{'arm':<15}{'rate':>6}{'kept':>9}{'last':>9}  weights{'apart after round 1':>28}")
    for name, arms in result.items():
        for arm, found in arms.items():
            same = {True: "bit for bit", False: "different", None: "-"}[found.get("bit_for_bit")]
            apart = found.get("apart_after_round_1")
            print(
                f"{name:<14}{arm:<15}{found['learning_rate']:>6}{100 * found['kept_accuracy']:>7.1f} %"
                f"{100 * found['final_accuracy']:>7.1f} %  {same:<16}{'-' if apart is None else f'{apart:.1e}':>19}"
            )


def run(folder: Path, demo: dict[str, Any], name: str, over_grpc: dict[str, Any] | None) -> dict[str, Any]:
    """One run to its end; of each arm what it came to, and how that compares with the run over gRPC."""
    exchange, ranks, reduction = RUNS[name]
    settings = {
        **demo,
        "federation": {**demo["federation"], "keep": "all"},
        "collective": {"reduction": reduction},
    }
    launcher = [part.format(ranks=ranks) for part in LAUNCHERS[exchange]]
    start_of = None if over_grpc is None else GRPC
    summary = run_variant(folder, name, settings, start_of=start_of, exchange=exchange, launcher=launcher)
    found = {}
    for arm in FEDERATED:
        own = summary["arms"][arm]
        found[arm] = {
            "learning_rate": own["learning_rate"],
            "kept_accuracy": own["accuracy"],
            "final_accuracy": own["final_accuracy"],
            "weights": summary["weights"][arm],
        }
        if over_grpc is not None:
            found[arm]["bit_for_bit"] = found[arm]["weights"] == over_grpc[arm]["weights"]
            found[arm]["apart_after_round_1"] = None  # where tuning chose another rate, it is not rounding
            if found[arm]["learning_rate"] == over_grpc[arm]["learning_rate"]:
                apart = after_round_1(folder, name, arm) - after_round_1(folder, GRPC, arm)
                found[arm]["apart_after_round_1"] = float(np.abs(apart).max())
    return found


def after_round_1(folder: Path, name: str, arm: str) -> np.ndarray:
    """All weights of an arm after its first round, float32 in one row."""
    out = folder / f"{name}-{arm}-round-1.safetensors"
    command = [sys.executable, "-m", "gptfl_dist", "export", str(folder / f"{name}.yaml"), "--arm", arm, "--round", "1"]
    subprocess.run([*command, "--out", str(out), "--force"], check=True, stdout=subprocess.DEVNULL)
    tensors = load_file(out)
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


if __name__ == "__main__":
    main()

"""What each rule of aggregation takes: seconds, and the most memory above idle, for one round of large updates.

    python benchmarks/rules.py --params 100000000 --silos 32 --json runs/rules/result.json

Each rule has a process of its own, which does what the coordinator does at the end of a round: it reads the updates of
all silos and the weights, combines them and writes the next weights. All updates are read out of one file of random
numbers, from another place for each silo, so that 32 updates of 400 MB need no 13 GB of disk; no two are alike, and
what is read comes from the page cache, as spools do that were just written. Memory is VmHWM (Linux alone).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from null.processes import peak_memory, resident_memory

from gptfl_dist.aggregation.factors import clipping
from gptfl_dist.aggregation.rules import next_weights, rule_of
from gptfl_dist.aggregation.updates import Updates
from gptfl_dist.config.plan import LocalTraining
from gptfl_dist.config.strategy import ROBUST, RULES, Strategy
from gptfl_dist.weights import Layout, WeightsFile, write_weights

TRAINING = LocalTraining(
    epochs=1, batch_size=32, learning_rate=0.1, momentum=0.0, weight_decay=0.0, augmentation=False, threads=1
)
CLIPPED = "mean, clipped"
APART = 1 << 12  # numbers between the places where two silos' updates begin
CHUNK = 1 << 20  # numbers that are made at a time


class Part:
    """A flat buffer that lies inside a file."""

    def __init__(self, file: WeightsFile, start: int) -> None:
        self._file, self._start = file, start

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._file.read_into(self._start + offset, buffer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=int, default=100_000_000, help="parameters of the model, float32")
    parser.add_argument("--silos", type=int, default=32)
    parser.add_argument("--malicious", type=int, default=None, help="left out: as many as all rules can bear")
    parser.add_argument("--rules", nargs="+", default=[*RULES, CLIPPED], choices=[*RULES, CLIPPED], metavar="RULE")
    parser.add_argument("--folder", type=Path, default=Path("runs/rules"), help="where the files go")
    parser.add_argument("--json", type=Path, default=None, help="also written to this file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # in the process of a rule
    options = parser.parse_args()
    if options.malicious is None:
        options.malicious = max(0, (options.silos - 3) // 2)
    if options.one:
        print(json.dumps(measured(options)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    _write_numbers(options.folder / "numbers.safetensors", options.params + options.silos * APART)
    result = {
        "parameters": options.params,
        "silos": options.silos,
        "malicious": options.malicious,
        "rules": {rule: _in_a_process(options, rule) for rule in options.rules},
    }
    (options.folder / "numbers.safetensors").unlink()
    (options.folder / "next.safetensors").unlink()
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _in_a_process(options: argparse.Namespace, rule: str) -> dict[str, float]:
    numbers = {"params": options.params, "silos": options.silos, "malicious": options.malicious}
    given = [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, __file__, "--one", *given, "--rules", rule, "--folder", str(options.folder)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    models = found["memory_mib"] * 2**20 / (4 * options.params)
    times = f"{found['seconds']:>8.1f} s{found['cpu_seconds']:>8.1f} s of CPU"
    print(f"{rule:<18}{times}{found['memory_mib']:>10.1f} MiB{models:>8.3f} models", flush=True)
    return found


def measured(options: argparse.Namespace) -> dict[str, float]:
    """Seconds and MiB above idle of one rule, in this process."""
    (name,) = options.rules
    robust = {"malicious": options.malicious} if name in ROBUST else {}
    strategy = Strategy(rule="mean" if name == CLIPPED else name, **robust)
    layout = Layout.of([("w", (options.params,), "F32")])
    silos = tuple(f"silo-{number:04d}" for number in range(options.silos))
    with WeightsFile(options.folder / "numbers.safetensors") as file:
        readers = {silo: Part(file, 4 * APART * number) for number, silo in enumerate(silos)}
        idle, started, worked = resident_memory(os.getpid()), time.monotonic(), time.process_time()
        factors = clipping(layout, readers, 1.0 if name == CLIPPED else None)
        updates = Updates(
            layout=layout,
            silos=silos,
            readers=tuple(readers.values()),
            samples=tuple(range(1, options.silos + 1)),
            trainings=(TRAINING,) * options.silos,
            factors=tuple(factors.values()),
        )
        blocks = next_weights(rule_of(strategy), strategy, Part(file, 0), updates, lambda place, w, mean: w + mean)
        write_weights(options.folder / "next.safetensors", layout, blocks, durable=False)
        seconds, cpu = time.monotonic() - started, time.process_time() - worked
        return {"seconds": seconds, "cpu_seconds": cpu, "memory_mib": (peak_memory(os.getpid()) - idle) / 2**20}


def _write_numbers(path: Path, count: int) -> None:
    random = np.random.default_rng(0)
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    blocks = (random.standard_normal(size, np.float32).data.cast("B") for size in sizes)
    write_weights(path, Layout.of([("numbers", (count,), "F32")]), blocks, durable=False)


if __name__ == "__main__":
    main()

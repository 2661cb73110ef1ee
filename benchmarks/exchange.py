"""What a round costs beside its training: the real coordinator and agents with null trainers, against a bare wire.

    python benchmarks/exchange.py --params 11200000 --silos 4 --rounds 5 --json runs/exchange/11m.json

Two programs move the same model between one coordinator and the silos, real processes with mutual TLS on this machine:
`gptfl run`, whose silos are trained by `null/trainer.py`, and the floor (`null/floor.py`), one bare gRPC stream a silo.
They run in turn, `--pairs` times; a figure is the median over all rounds of one program (of bytes the mean, for what is
on its way when a round ends is counted in the next), a ratio is that of two such figures. With `--reference FOLDER` a
third program, a floor of somebody else's in that folder, runs in turn with them.

A round goes from the start of a training to the start of the next: updates up, aggregation, weights down. CPU seconds
are those of all processes, memory is the peak resident size (VmHWM). Linux alone; as root in a network namespace of
its own, so that the bytes on the wire are those of this run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "null"
sys.path.insert(0, str(HERE))  # whose modules the trainers import too, as scripts of that folder

from marks import read_marks
from processes import Monitor
from programs import (
    MB,
    NUMBER_SIZE,
    Run,
    check_result,
    clear,
    follow,
    median,
    run_floor,
    run_of,
    run_reference,
    set_environment,
    write_federation,
    write_result,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=int, default=11_200_000, help="parameters of the model, float32")
    parser.add_argument("--silos", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are measured in each run")
    parser.add_argument("--pairs", type=int, default=3, help="how often each program runs, in turn")
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="a floor to compare ours with: runs/run.sh")
    parser.add_argument("--no-floor", action="store_true", help="ours alone: no ratios")
    parser.add_argument("--folder", type=Path, default=Path("runs/exchange"), help="where the runs go")
    parser.add_argument("--json", type=Path, default=None, help="also written to this file")
    options = parser.parse_args()
    _alone_on_loopback()
    set_environment(options.params, options.silos)
    folder = options.folder.resolve()
    ours: list[Run] = []
    floors: list[Run] = []
    references: list[float] = []
    for number in range(options.pairs):
        ours.append(run_federation(folder / "federation", options.silos, options.rounds))
        _tell(f"gptfl {number + 1}", ours[-1])
        if not options.no_floor:
            floors.append(run_floor(folder / "floor", options.silos, options.rounds))
            _tell(f"floor {number + 1}", floors[-1])
        if options.reference:
            sizes = options.params, options.silos, options.rounds
            reference = run_reference("grpc", options.reference, folder / "reference", *sizes)
            references.append(statistics.median(reference["round_cpu"]))
            print(f"reference {number + 1}: CPU {references[-1]:.3f} s a round", flush=True)
    result = _result(options, ours, floors, references)
    write_result(result, options.json)


def _alone_on_loopback() -> None:
    """Goes on in a network namespace of its own, where that is allowed."""
    if os.environ.get("NULL_ALONE") or subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        return
    os.environ["NULL_ALONE"] = "1"
    script = 'ip link set lo up; exec "$@"'
    os.execvp("unshare", ["unshare", "-n", "sh", "-c", script, "sh", sys.executable, *sys.argv])


def _tell(who: str, run: Run) -> None:
    cpu, wall = (median([run], what) for what in ("cpu", "wall"))
    print(f"{who}: CPU {cpu:.3f} s, wall {wall:.3f} s, wire {_wire([run]) / MB:.1f} MB a round", flush=True)


def _wire(runs: list[Run]) -> float:
    """Bytes of a round."""
    return statistics.fmean(value for run in runs for value in run.wire)


def run_federation(folder: Path, silos: int, rounds: int) -> Run:
    """`gptfl run` on a null federation in `folder`."""
    path = write_federation(folder, silos, rounds, lambda _: {"code": {"script": str(HERE / "trainer.py")}})
    marks = folder / "marks.jsonl"
    layout = folder / "layout.json"
    layout.write_text(_layout_of_the_model())
    environment = {**os.environ, "NULL_MARKS": str(marks), "NULL_LAYOUT": str(layout)}
    command = [sys.executable, "-m", "gptfl_dist", "run", str(path)]
    monitor, started = follow(command, environment, folder / "output.txt")
    told = read_marks(marks)
    begins = {
        number: min(
            mark["time"] for mark in told if mark["what"] == what and (number > rounds or mark["round"] == number)
        )
        for number, what in [*((number, "train") for number in range(1, rounds + 1)), (rounds + 1, "evaluate")]
    }
    check_result(folder, silos, rounds)
    clear(folder)
    return run_of(monitor, [begins[number] for number in sorted(begins)], started, _memory(monitor, told, begins))


def _layout_of_the_model() -> str:
    """In a process of its own: the benchmark itself needs no torch."""
    program = (
        "from model import null_model; from gptfl_dist.weights.flat import layout_of; "
        "print(layout_of(null_model(label_count=2, task=None)).to_json())"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def _memory(monitor: Monitor, told: list[dict[str, Any]], begins: dict[int, float]) -> dict[str, float]:
    """Peaks above idle, in bytes: the coordinator's since its first silo was started, and the worst silo's."""
    agents = [pid for pid, process in monitor.processes.items() if " silo " in process.command]
    first = min(next(s.time for s in monitor.samples if pid in s.memory) for pid in agents)
    idle = monitor.memory_at(monitor.root, first)
    silos = []
    for mark in told:
        if mark["what"] == "memory":
            silos.append(mark["trainer"] + mark["agent"] - monitor.memory_at(mark["agent_pid"], begins[1] - 0.5))
    return {"coordinator": monitor.processes[monitor.root].peak - idle, "silo": max(silos)}


def _result(options: argparse.Namespace, ours: list[Run], floors: list[Run], references: list[float]) -> dict[str, Any]:
    model = NUMBER_SIZE * options.params

    result: dict[str, Any] = {
        "parameters": options.params,
        "silos": options.silos,
        "rounds": options.rounds,
        "pairs": options.pairs,
        "cpu_s": median(ours, "cpu"),
        "wall_s": median(ours, "wall"),
        "wire_mb": _wire(ours) / MB,
        "wire_ratio": {"minimum": _wire(ours) / (2 * options.silos * model)},
        "coordinator_rss_mb": max(run.memory["coordinator"] for run in ours) / 2**20,
        "silo_rss_models": max(run.memory["silo"] for run in ours) / model,
        "start_to_round1_s": statistics.median(run.first_round for run in ours),
        "gptfl": [asdict(run) for run in ours],
    }
    if floors:
        result |= {
            "floor_cpu_s": median(floors, "cpu"),
            "floor_wall_s": median(floors, "wall"),
            "cpu_ratio": median(ours, "cpu") / median(floors, "cpu"),
            "wall_ratio": median(ours, "wall") / median(floors, "wall"),
            "floor": [asdict(run) for run in floors],
        }
        result["wire_ratio"]["floor"] = _wire(ours) / _wire(floors)
    if references and floors:
        result["floor_to_reference"] = median(floors, "cpu") / statistics.median(references)
    return result


if __name__ == "__main__":
    main()

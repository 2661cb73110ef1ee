"""What a round costs beside its training: the real coordinator and agents with null trainers, against a bare wire.

    python benchmarks/exchange.py --params 11200000 --silos 4 --rounds 5 --json runs/exchange/11m.json

Two programs move the same model between one coordinator and the silos, real processes with mutual TLS on this machine:
`gptfl run`, whose silos are trained by `null/trainer.py`, and the floor (`null/floor.py`), one bare gRPC stream a silo.
They run in turn, `--pairs` times; a figure is the median over all rounds of one program, a ratio is that of two such
medians. With `--reference FOLDER` a third program, a floor of somebody else's in that folder, runs in turn with them.

A round goes from the start of a training to the start of the next: updates up, aggregation, weights down. CPU seconds
are those of all processes, memory is the peak resident size (VmHWM). Linux alone; as root in a network namespace of
its own, so that the bytes on the wire are those of this run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent / "null"
sys.path.insert(0, str(HERE))  # whose modules the trainers import too, as scripts of that folder

from processes import Monitor  # noqa: E402

NUMBER_SIZE = 4  # bytes of a float32
MB = 1_000_000


@dataclass
class Run:
    """What one program took: per round, and from its start to the end of its first round."""

    cpu: list[float]
    wall: list[float]
    wire: list[float]
    first_round: float
    memory: dict[str, float]


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
    os.environ |= {
        "NULL_PARAMETERS": str(options.params),
        "NULL_SILOS": str(options.silos),
        "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
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
            references.append(run_reference(folder / "reference", options))
            print(f"reference {number + 1}: CPU {references[-1]:.3f} s a round", flush=True)
    result = _result(options, ours, floors, references)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _alone_on_loopback() -> None:
    """Goes on in a network namespace of its own, where that is allowed."""
    if os.environ.get("NULL_ALONE") or subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        return
    os.environ["NULL_ALONE"] = "1"
    script = 'ip link set lo up; exec "$@"'
    os.execvp("unshare", ["unshare", "-n", "sh", "-c", script, "sh", sys.executable, *sys.argv])


def _tell(who: str, run: Run) -> None:
    cpu, wall, wire = (statistics.median(values) for values in (run.cpu, run.wall, run.wire))
    print(f"{who}: CPU {cpu:.3f} s, wall {wall:.3f} s, wire {wire / MB:.1f} MB a round", flush=True)


def run_federation(folder: Path, silos: int, rounds: int) -> Run:
    """`gptfl run` on a null federation in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marks = folder / "marks.jsonl"
    layout = folder / "layout.json"
    layout.write_text(_layout_of_the_model())
    names = [f"silo-{number}" for number in range(1, silos + 1)]
    for name in names:
        silo = {"name": name, "code": {"script": str(HERE / "trainer.py")}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(silo))
    federation = {
        "name": "null",
        "labels": ["a", "b"],
        "model": {"name": "function", "source": "model:null_model"},
        "arms": ["fedavg_random"],
        "federation": {"rounds": rounds, "quorum": "all"},
        "silos": [{"name": name, "file": f"{name}.yaml"} for name in names],
    }
    (folder / "federation.yaml").write_text(yaml.safe_dump(federation))
    shutil.copy(HERE / "model.py", folder)  # model.source names it beside the file
    environment = {**os.environ, "NULL_MARKS": str(marks), "NULL_LAYOUT": str(layout)}
    command = [sys.executable, "-m", "gptfl_dist", "run", str(folder / "federation.yaml")]
    monitor, started = _follow(command, environment, folder / "output.txt")
    told = [json.loads(line) for line in marks.read_text().splitlines()]
    begins = {
        number: min(
            mark["time"] for mark in told if mark["what"] == what and (number > rounds or mark["round"] == number)
        )
        for number, what in [*((number, "train") for number in range(1, rounds + 1)), (rounds + 1, "evaluate")]
    }
    _check_result(folder, silos, rounds)
    return _of(monitor, [begins[number] for number in sorted(begins)], started, _memory(monitor, told, begins))


def _layout_of_the_model() -> str:
    """In a process of its own: the benchmark itself needs no torch."""
    program = (
        "from model import null_model; from gptfl_dist.weights.flat import layout_of; "
        "print(layout_of(null_model(label_count=2, task=None)).to_json())"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def _check_result(folder: Path, silos: int, rounds: int) -> None:
    """The numbers that came out are those of the weighted mean: silo k adds k with 100 k samples."""
    import numpy as np

    from gptfl_dist.weights import WeightsFile

    step = sum(k * k for k in range(1, silos + 1)) / sum(range(1, silos + 1))
    models = folder / "run" / "models" / "fedavg_random-final.safetensors"
    with WeightsFile(folder / "run" / "random.safetensors") as start, WeightsFile(models) as end:
        size = min(1 << 20, start.nbytes)
        difference = np.frombuffer(end.read(0, size), "<f4") - np.frombuffer(start.read(0, size), "<f4")
    error = float(np.abs(difference - rounds * step).max())
    if error > 1e-3 * rounds * step:
        sys.exit(f"the weights are off by {error}")


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


def run_floor(folder: Path, silos: int, rounds: int) -> Run:
    """The floor, with one more round than is measured: it is the beginning of the first that counts."""
    from gptfl_dist.security.authority import Authority

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    authority = Authority("floor", valid=timedelta(days=1))
    authority.issue_coordinator(["127.0.0.1", "localhost"]).save(folder / "coordinator")
    for number in range(1, silos + 1):
        authority.issue_silo(f"silo-{number}").save(folder / f"silo-{number}")
    marks = folder / "marks.jsonl"
    environment = {**os.environ, "NULL_MARKS": str(marks), "NULL_ROUNDS": str(rounds + 1)}
    monitor, started = _follow(
        [sys.executable, str(HERE / "floor.py"), str(folder)], environment, folder / "output.txt"
    )
    ends = [json.loads(line)["time"] for line in marks.read_text().splitlines()]
    return _of(monitor, ends, started, {})


def run_reference(folder: Path, options: argparse.Namespace) -> float:
    """CPU seconds a round of a floor that is not ours; `runs/run.sh grpc PARAMETERS` prints them as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "FEDBENCH_WORK": str(folder),
        "FEDBENCH_CLIENTS": str(options.silos),
        "FEDBENCH_ROUNDS": str(options.rounds + 1),
        "FEDBENCH_VENV_FLOOR": str(Path(sys.executable).parent.parent),
        "FEDBENCH_NETNS": "0",
        "FEDBENCH_LIMIT_S": "1200",
    }
    command = ["bash", str(options.reference / "runs" / "run.sh"), "grpc", str(options.params)]
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(statistics.median(json.loads((folder / "results.jsonl").read_text().splitlines()[-1])["round_cpu"]))


def _follow(command: list[str], environment: dict[str, str], output: Path) -> tuple[Monitor, float]:
    """Runs a command to its end; returns what was seen of it and when it began."""
    with output.open("wb") as file:
        started = time.time()
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        monitor = Monitor(process.pid)
        monitor.start()
        code = process.wait()
        monitor.stop()
    if code:
        sys.exit(f"{' '.join(command)} ended with code {code}:\n{output.read_text()[-3000:]}")
    return monitor, started


def _of(monitor: Monitor, times: list[float], started: float, memory: dict[str, float]) -> Run:
    """The rounds between these moments."""
    spans = list(pairwise(times))
    return Run(
        cpu=[monitor.cpu_at(stop) - monitor.cpu_at(start) for start, stop in spans],
        wall=[stop - start for start, stop in spans],
        wire=[monitor.wire_at(stop) - monitor.wire_at(start) for start, stop in spans],
        first_round=times[1] - started,
        memory=memory,
    )


def _result(options: argparse.Namespace, ours: list[Run], floors: list[Run], references: list[float]) -> dict[str, Any]:
    model = NUMBER_SIZE * options.params

    def median(runs: list[Run], what: str) -> float:
        return statistics.median(value for run in runs for value in getattr(run, what))

    result: dict[str, Any] = {
        "parameters": options.params,
        "silos": options.silos,
        "rounds": options.rounds,
        "pairs": options.pairs,
        "cpu_s": median(ours, "cpu"),
        "wall_s": median(ours, "wall"),
        "wire_mb": median(ours, "wire") / MB,
        "wire_ratio": {"minimum": median(ours, "wire") / (2 * options.silos * model)},
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
        result["wire_ratio"]["floor"] = median(ours, "wire") / median(floors, "wire")
    if references and floors:
        result["floor_to_reference"] = median(floors, "cpu") / statistics.median(references)
    return result


if __name__ == "__main__":
    main()

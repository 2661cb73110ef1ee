"""What a round costs over collectives beside its training: `gptfl run` under a launcher, against bare Bcast and Reduce.

    python benchmarks/collectives.py --params 11200000 --ranks 5 --json runs/collectives/11m.json

Programs that move the same model between rank 0 and the other ranks run in turn, `--pairs` times: the floor
(`null/mpi_floor.py`, of the same MPI), and in each mode the real coordinator and the real silos, whose training
(`null/training.py`) does nothing. With the mode tls the floor over gRPC (`null/floor.py`) is among them, and the wire
of tls by itself (`null/tls_wire.py`); with `--reference FOLDER` a floor of somebody else's in that folder.

A round goes from the start of a training to the start of the next. A figure is the median over all rounds of one
program, a ratio that of two such medians. CPU seconds are those of all processes. A rank's memory is the peak (VmHWM)
of its process and of its trainer, each above what it had before there was a model; it is given in models. Linux alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "null"
sys.path.insert(0, str(HERE))  # whose modules the silos import too

from marks import read_marks
from processes import Monitor
from programs import (
    MPIEXEC,
    NUMBER_SIZE,
    TORCHRUN,
    Run,
    check_result,
    clear,
    follow,
    median,
    run_floor,
    run_marked,
    run_of,
    run_reference,
    save_credentials,
    set_environment,
    write_federation,
    write_result,
)


@dataclass(frozen=True)
class Mode:
    """What starts the ranks, and the section `collective` of the federation file."""

    launcher: tuple[str, ...]
    settings: dict[str, str] = field(default_factory=dict)


RATIOS = {"wall_ratio": "wall", "cpu_ratio": "cpu"}
MODES = {
    "fast": Mode(MPIEXEC, {"reduction": "fast"}),
    "exact": Mode(MPIEXEC),
    "tls": Mode(MPIEXEC, {"trust": "tls"}),
    "torch": Mode(TORCHRUN, {"reduction": "fast"}),
    "torch-exact": Mode(TORCHRUN),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=int, default=11_200_000, help="parameters of the model, float32")
    parser.add_argument("--ranks", type=int, default=5, help="the coordinator and so many silos less one")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are measured in each run")
    parser.add_argument("--pairs", type=int, default=1, help="how often each program runs, in turn")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="a floor to compare ours with: runs/run.sh")
    parser.add_argument("--folder", type=Path, default=Path("runs/collectives"), help="where the runs go")
    parser.add_argument("--json", type=Path, default=None, help="also written to this file")
    options = parser.parse_args()
    silos, rounds, folder = options.ranks - 1, options.rounds, options.folder.resolve()
    set_environment(options.params, silos)
    runs: dict[str, list[Run]] = {}
    reference: list[float] = []
    for _ in range(options.pairs):
        add(runs, "floor", run_mpi_floor(folder / "floor", options.ranks, rounds))
        if options.reference:
            told = run_reference("mpi", options.reference, folder / "reference", options.params, silos, rounds)
            reference.extend(told["round_wall"])
        if "tls" in options.modes:
            add(runs, "grpc floor", run_floor(folder / "grpc-floor", silos, rounds))
            add(runs, "tls wire", run_tls_wire(folder / "tls-wire", options.ranks, rounds))
        for mode in options.modes:
            add(runs, mode, run_federation(folder / mode, MODES[mode], options.ranks, rounds))
    write_result(result_of(options, runs, reference), options.json)


def add(runs: dict[str, list[Run]], who: str, run: Run) -> None:
    runs.setdefault(who, []).append(run)
    print(f"{who}: wall {median([run], 'wall'):.3f} s, CPU {median([run], 'cpu'):.3f} s a round", flush=True)


def launched(launcher: tuple[str, ...], ranks: int, *program: str) -> list[str]:
    return [*(word.format(ranks=ranks) for word in launcher), *program]


def run_mpi_floor(folder: Path, ranks: int, rounds: int) -> Run:
    """Bare `Bcast` and `Reduce`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return run_marked(launched(MPIEXEC, ranks, str(HERE / "mpi_floor.py")), folder, rounds)


def run_tls_wire(folder: Path, ranks: int, rounds: int) -> Run:
    """What tls costs without the rest of a round."""
    shutil.rmtree(folder, ignore_errors=True)
    save_credentials(folder, "floor", ranks - 1)
    return run_marked(launched(MPIEXEC, ranks, str(HERE / "tls_wire.py"), str(folder)), folder, rounds)


def run_federation(folder: Path, mode: Mode, ranks: int, rounds: int) -> Run:
    """`gptfl run` with one more round than is measured: it is the beginning of its trainings that ends the last."""
    from gptfl_dist.testing.federations import tiny_images

    def files(side: str) -> dict[str, str]:
        return {
            name: str(folder / "credentials" / side / f"{name}.pem") for name in ("authority", "certificate", "key")
        }

    def settings(silo: str) -> dict[str, Any]:
        return {
            "coordinator": {"address": "localhost:1", **files(silo)},  # of which tls takes the files alone
            "code": {"function": "training:train", "model": "model:null_model"},
            "data": {"path": f"{silo}.npz", "validation_share": 0.5},
            "device": "cpu",
        }

    sections = {"labels": ["left", "right"], "task": {"size": 8}, "exchange": files("coordinator")}
    path = write_federation(folder, ranks - 1, rounds + 1, settings, **sections, collective=mode.settings)
    save_credentials(folder / "credentials", "null", ranks - 1)
    for number in range(1, ranks):
        tiny_images(folder / f"silo-{number}.npz", count=200 * number)  # half of them to train on
    marks = folder / "marks.jsonl"
    monitor, started = follow(
        launched(mode.launcher, ranks, "-m", "gptfl_dist", "run", str(path)),
        {**os.environ, "NULL_MARKS": str(marks)},
        folder / "output.txt",
    )
    check_result(folder, ranks - 1, rounds + 1)
    clear(folder)
    told = read_marks(marks)
    trainings = sorted(mark["time"] for mark in told if mark["what"] == "train")
    begins = trainings[:: ranks - 1]  # the first silo's in each round: every silo waits for the last one's update
    return run_of(monitor, begins, started, memory_of(monitor, told))


def memory_of(monitor: Monitor, told: list[dict[str, Any]]) -> dict[str, float]:
    """Peaks in bytes above idle: of rank 0, and of the worst other rank with its trainer."""
    notes = [mark for mark in told if mark["what"] == "idle"]
    idle = {mark["pid"]: mark["memory"] for mark in notes}
    first = min(mark["time"] for mark in notes)

    def above_idle(pid: int) -> float:
        return monitor.processes[pid].peak - (idle[pid] if pid in idle else monitor.memory_at(pid, first))

    silos = [sum(above_idle(pid) for pid in {mark["rank"], mark["pid"]}) for mark in notes]
    ranks = {mark["rank"] for mark in notes}
    launchers = {monitor.processes[pid].parent for pid in ranks}
    (root,) = (
        pid
        for pid, process in monitor.processes.items()
        if process.parent in launchers and "gptfl_dist run" in process.command and pid not in ranks
    )
    return {"root": above_idle(root), "silo": max(silos)}


def result_of(options: argparse.Namespace, runs: dict[str, list[Run]], reference: list[float]) -> dict[str, Any]:
    model = NUMBER_SIZE * options.params
    modes: dict[str, dict[str, float]] = {}
    for mode in options.modes:
        modes[mode] = {what: median(runs[mode], of) / median(runs["floor"], of) for what, of in RATIOS.items()}
        memory = [run.memory for run in runs[mode]]
        modes[mode] |= {
            "wall_s": median(runs[mode], "wall"),
            "cpu_s": median(runs[mode], "cpu"),
            "rank_rss_models": max(each["silo"] for each in memory) / model,
            "root_rss_models": max(each["root"] for each in memory) / model,
        }
    result: dict[str, Any] = {
        "parameters": options.params,
        "ranks": options.ranks,
        "rounds": options.rounds,
        "pairs": options.pairs,
        "modes": modes,
        "floor_wall_s": median(runs["floor"], "wall"),
        "floor_cpu_s": median(runs["floor"], "cpu"),
    }
    if "grpc floor" in runs:
        floor = runs["grpc floor"]
        ratios = {f"grpc_{what}": median(runs["tls"], of) / median(floor, of) for what, of in RATIOS.items()}
        wire = {f"wire_grpc_{what}": median(runs["tls wire"], of) / median(floor, of) for what, of in RATIOS.items()}
        modes["tls"] |= ratios | wire
        result |= {"grpc_floor_wall_s": median(floor, "wall"), "grpc_floor_cpu_s": median(floor, "cpu")}
    if reference:
        result["floor_to_reference"] = median(runs["floor"], "wall") / statistics.median(reference)
    return result | {"runs": {who: [asdict(run) for run in each] for who, each in runs.items()}}


if __name__ == "__main__":
    main()

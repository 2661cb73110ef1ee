"""Processes that are one group: what each learns of the others, and that none waits for one that is gone."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import mpiexec, torchrun

from gptfl_dist.errors import LaunchError
from gptfl_dist.learning.group import PLACE, RENDEZVOUS, open_group, outside

PROGRAM = str(Path(__file__).with_name("group_program.py"))
RANK = "MPI_LOCALRANKID"  # on its machine
MINUTE = timedelta(minutes=1)


def run(launcher: list[str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*launcher, PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("launcher", "ranks"), [("torchrun", 2), ("mpiexec", 3)])
def test_ranks_tell_share_gather_and_add_up(launcher: str, ranks: int, tmp_path: Path) -> None:
    meeting = tmp_path / "meeting"
    ended = run(torchrun(ranks) if launcher == "torchrun" else mpiexec(ranks, meeting), tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert not meeting.exists()
    got: list[dict[str, Any]] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    for each in got:
        assert (each["size"], each["told"], each["shared"], each["nothing"]) == (ranks, {"by": 0}, "bytes", "")
        assert each["sum"] == [1.5 * ranks, sum(range(ranks))]
        assert each["copy"] == [0, 1, 2]
        assert each["threads"] == max(1, len(os.sched_getaffinity(0)) // ranks)
        if not torch.cuda.is_available():
            assert each["device"] == "cpu"
        assert f"{ranks} ranks share the work" in each["refused"]
    assert [each["gathered"] for each in got] == [["x" * rank for rank in range(ranks)], *[[]] * (ranks - 1)]


def test_a_rank_whose_neighbour_is_gone_is_told_so(tmp_path: Path) -> None:
    """Under mpiexec, which does not mind a rank that ends with an error and never was in an MPI world."""
    ended = run(mpiexec(2, tmp_path / "meeting"), tmp_path, "die")
    assert ended.returncode != 0
    assert "RankLost: rank 0 of 2 lost another" in ended.stderr


def test_a_process_by_itself_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)  # inherited of a rank of an MPI job: they alone mean nothing
    group = open_group(MINUTE)
    assert (group.rank, group.size, group.leader) == (0, 1, True)
    assert group.tell({"a": 1}) == {"a": 1}
    assert group.gather(b"mine") == [b"mine"]
    assert (group.device("cuda:1"), group.threads(3)) == ("cuda:1", 3)
    assert group.threads(0) == len(os.sched_getaffinity(0))
    one = torch.ones(2)
    assert group.sum(one) is one


@pytest.mark.parametrize(
    ("variables", "gpu"), [({}, "auto"), ({PLACE: "3"}, "cuda:1"), ({PLACE: "3", RANK: "2"}, "cuda:0")]
)
def test_processes_side_by_side_take_two_gpus_in_turn(
    variables: dict[str, str], gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played where there are none; what a launcher says comes first."""
    for name in (PLACE, RANK):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen: list[str] = []
    for function, answer in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "set_device": chosen.append,
    }.items():
        monkeypatch.setattr(torch.cuda, function, answer)
    group = open_group(MINUTE)
    assert group.device("auto") == gpu
    assert group.device("cuda:0") == "cuda:0"
    assert chosen == ([gpu] if variables else [])


def test_a_rendezvous_without_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(RENDEZVOUS, str(tmp_path / "meeting"))
    with pytest.raises(LaunchError, match="no launcher told this process its rank"):
        open_group(MINUTE)


def test_what_a_rank_starts_is_no_rank() -> None:
    rank = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", RENDEZVOUS: "b"}
    others = {"HOME": "d", "LOCAL_RANK": "1"}  # by which it finds its GPU
    assert outside({**rank, "TORCHELASTIC_RUN_ID": "c", **others}) == others

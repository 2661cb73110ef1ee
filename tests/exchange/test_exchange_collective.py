"""The collective backends with real ranks: the same program under mpiexec and under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support import MPIEXEC, TORCHRUN

from gptfl_dist.security.authority import Authority

_PROGRAM = Path(__file__).with_name("collective_program.py")
_BACKENDS = ("mpi", "torch")
_WITH_TLS = (*_BACKENDS, "tls")


def _start(backend: str, name: str, folder: Path, ranks: int, **variables: str) -> subprocess.CompletedProcess[str]:
    if backend == "tls":
        authority = Authority.new("fed", valid=timedelta(days=1))
        authority.issue_coordinator(["localhost"]).save(folder / "0")
        for rank in range(1, ranks):
            authority.issue_silo(f"silo-{rank}").save(folder / str(rank))
    torchrun = [*TORCHRUN, "--nproc-per-node", str(ranks)]
    launch = torchrun if backend == "torch" else [MPIEXEC, "-n", str(ranks), sys.executable]
    command = [*launch, str(_PROGRAM), backend, name, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, timeout=200)


def _found(backend: str, name: str, folder: Path, ranks: int = 3, **variables: str) -> dict[str, Any]:
    ended = _start(backend, name, folder, ranks, **variables)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize("backend", _WITH_TLS)
def test_messages_of_all_ranks_arrive_in_order(tmp_path: Path, backend: str) -> None:
    assert _found(backend, "messages", tmp_path, ranks=4) == {"in order": True}


@pytest.mark.parametrize("backend", _WITH_TLS)
def test_a_flat_buffer_arrives_in_segments(tmp_path: Path, backend: str) -> None:
    assert _found(backend, "blocks", tmp_path) == {"same": True}


@pytest.mark.parametrize("backend", ["mpi", "tls"])
def test_a_broadcast_an_update_and_long_messages_pass_side_by_side(tmp_path: Path, backend: str) -> None:
    assert _found(backend, "both_ways", tmp_path, ranks=4) == {"same": True}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("short", "rank 1 sent 1015 bytes, expected 1016"), ("lost", "what came from rank 1 is not what it sent")],
)
def test_a_sealed_part_that_is_not_the_next_one_whole_is_refused(tmp_path: Path, wrong: str, said: str) -> None:
    assert _found("tls", "out_of_place", tmp_path, ranks=2, WRONG=wrong) == {"said": said}


@pytest.mark.parametrize("backend", _BACKENDS)
def test_floats_are_added_and_of_counts_the_largest_is_taken(tmp_path: Path, backend: str) -> None:
    found = _found(backend, "reductions", tmp_path, ranks=4)
    assert (found["sum"], found["largest"]) == (True, [3, 0, 3 * 2**40])


@pytest.mark.gpu
def test_ranks_with_a_gpu_each_reduce_over_nccl(tmp_path: Path) -> None:
    import torch

    ranks = torch.cuda.device_count()
    found = _found("torch", "reductions", tmp_path, ranks=ranks)
    assert found == {"sum": True, "largest": [ranks - 1, 0, (ranks - 1) * 2**40], "device": "cuda:0"}


@pytest.mark.parametrize("backend", _BACKENDS)
def test_of_updates_floats_are_summed_and_the_largest_increase_of_counts_is_taken(tmp_path: Path, backend: str) -> None:
    found = _found(backend, "updates", tmp_path, ranks=4)
    assert found["found"] == {"w": [111.0], "x": [111.0], "n": [100], "b": [-1]}
    assert found["alike"]


@pytest.mark.parametrize("backend", _BACKENDS)
def test_more_than_two_to_the_31_elements_pass(tmp_path: Path, backend: str) -> None:
    assert _found(backend, "large", tmp_path, ranks=2) == {"elements": 2**31 + 5}


@pytest.mark.parametrize("backend", _BACKENDS)
def test_a_rank_that_waits_leaves_its_core(tmp_path: Path, backend: str) -> None:
    """`GPTFL_WAIT` is how many seconds it waits twice; 30 make the minute of the promise."""
    found = _found(backend, "waiting", tmp_path, SECONDS_TO_WAIT=os.environ.get("GPTFL_WAIT", "5"))
    assert found["sum"] == 3.0
    assert found["share"] < 0.1


@pytest.mark.parametrize("backend", _WITH_TLS)
def test_nothing_waits_for_a_rank_that_is_known_to_be_gone(tmp_path: Path, backend: str) -> None:
    ended = _start(backend, "failing", tmp_path, ranks=2)
    assert ended.returncode != 0
    assert json.loads((tmp_path / "found.json").read_text()) == ["gone", "gone"]

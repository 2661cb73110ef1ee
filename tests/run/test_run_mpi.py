"""`mpiexec -n N gptfl run FILE`: the same federation file over MPI."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from support import Commands, Federation, wait_for


def test_the_weights_are_those_of_the_grpc_run_bit_for_bit(
    gptfl: Commands, federation: Callable[..., Federation], undisturbed: Federation
) -> None:
    mine = federation()
    command = gptfl.mpi(3, "run", mine.path)
    assert command.wait() == 0, command.stderr
    assert mine.result() == undisturbed.result()
    model = "models/fedavg_random-final.safetensors"
    assert (mine.run_folder / model).read_bytes() == (undisturbed.run_folder / model).read_bytes()
    told = mine.summary()
    assert (told["transport"], told["silos"]) == ("mpi", 2)
    arm, other = (each["arms"]["fedavg_random"] for each in (told, undisturbed.summary()))
    assert (arm["bytes_down"], arm["bytes_up"]) == (other["bytes_down"], other["bytes_up"])
    assert "MPI, 3 ranks" in command.stderr
    assert command.alive() == {}

    again = gptfl.mpi(3, "run", mine.path)
    assert again.wait() == 0, again.stderr
    assert "this run is finished" in again.stderr


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_wrong_number_of_ranks_is_explained(
    gptfl: Commands, federation: Callable[..., Federation], ranks: int
) -> None:
    command = gptfl.mpi(ranks, "run", federation().path)
    assert command.wait() == 11
    assert f"the MPI world has {ranks} ranks, expected 3: one coordinator and 2 silos" in command.stderr
    assert "mpiexec -n 3 gptfl run" in command.stderr
    assert command.stderr.count("expected 3") == 1  # once, not once a rank


@pytest.mark.parametrize("variables", [{"PMI_SIZE": "3", "PMI_RANK": "0"}, {"OMPI_COMM_WORLD_SIZE": "3"}])
def test_a_world_of_one_under_a_launcher_of_another_mpi_is_explained(
    gptfl: Commands, federation: Callable[..., Federation], variables: dict[str, str]
) -> None:
    """A launcher that this MPI does not know leaves its variables and no more."""
    command = gptfl.start("run", federation().path, **variables)
    assert command.wait() == 11
    assert "the launcher started 3 processes" in command.stderr
    assert "each is alone in its MPI world" in command.stderr
    assert "MPICH" in command.stderr


def test_an_error_of_one_rank_ends_the_job_with_its_message(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    broken = federation()
    (broken.folder / "silo-2.npz").write_bytes(b"no archive")
    command = gptfl.mpi(3, "run", broken.path)
    assert command.wait() == 3
    assert "gptfl, rank 2:" in command.stderr
    assert str(broken.folder / "silo-2.npz") in command.stderr
    command.wait_until_gone()


@pytest.mark.parametrize("victim", ["rank", "mpiexec"])
def test_a_killed_job_leaves_no_process_and_goes_on_from_its_round(
    gptfl: Commands, federation: Callable[..., Federation], undisturbed: Federation, victim: str
) -> None:
    mine = federation()
    command = gptfl.mpi(3, "run", mine.path)
    wait_for(lambda: mine.owed(2))
    rank = next(pid for pid in command.pids("gptfl_dist run") if pid != command.process.pid)
    os.kill(rank if victim == "rank" else command.process.pid, signal.SIGKILL)
    assert command.wait() != 0
    command.wait_until_gone()
    again = gptfl.mpi(3, "run", mine.path)
    assert again.wait() == 0, again.stderr
    assert mine.result() == undisturbed.result()


def test_a_coordinator_that_cannot_write_an_update_ends_the_job(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    mine = federation()
    (mine.run_folder / "spools" / "silo-1.spool").mkdir(parents=True)
    command = gptfl.mpi(3, "run", mine.path)
    assert command.wait(60) == 10
    assert "silo-1.spool" in command.stderr
    command.wait_until_gone()


def test_compressed_federations_come_to_the_same_weights_over_both_wires(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    compression = {"up": "int8", "down": "int8", "lossless": "zstd"}
    over_grpc, over_mpi = (federation(name, epochs=2, compression=compression) for name in ("grpc", "mpi"))
    gptfl.run("run", over_grpc.path)
    command = gptfl.mpi(3, "run", over_mpi.path)
    assert command.wait() == 0, command.stderr
    assert over_mpi.result() == over_grpc.result()
    told, packed = (each.summary() for each in (over_mpi, over_grpc))
    arm = told["arms"]["fedavg_random"]
    assert 0.25 < arm["bytes_up"] / (2 * 3 * told["model_bytes"]) < 0.27
    assert 0.25 < arm["bytes_down"] / (2 * 4 * told["model_bytes"]) < 0.27  # with the final evaluation
    assert packed["arms"]["fedavg_random"]["bytes_up"] < arm["bytes_up"]

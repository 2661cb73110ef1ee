"""Federations whose silos train by `torchrun`, `mpirun` and as Slurm jobs: what happens to a job changes no weights."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from slurm_cluster import SlurmCluster
from support import MPIEXEC, RULES, Command, Commands, Federation, numbers, wait_for

from gptfl_dist.config.document import dump_yaml

ALL = ("--nodes=3", "--ntasks=12")  # every CPU of the cluster
BY_SLURM = {"how": "slurm", "pause": "0s"}


def launched(federation: Federation, silo: str = "silo-1", **launch: Any) -> Federation:
    """The federation with this section in the file of a silo."""
    path = federation.folder / f"{silo}.yaml"
    path.write_text(dump_yaml({**yaml.safe_load(path.read_text()), "launch": launch}))
    return federation


def finish(command: Command, mine: Federation, undisturbed: Federation) -> None:
    assert command.wait() == 0, command.stderr
    assert mine.result() == undisturbed.result()
    command.wait_until_gone()


def agent_log(federation: Federation) -> str:
    log = federation.run_folder / "silos" / "silo-1" / "agent.log"
    return log.read_text() if log.exists() else ""


def test_torchrun_and_mpirun_change_no_weights(
    gptfl: Commands, federation: Callable[..., Federation], undisturbed: Federation
) -> None:
    mine = launched(federation(), how="torchrun")
    launched(mine, "silo-2", how="mpirun", mpirun={"command": MPIEXEC})
    finish(gptfl.start("run", mine.path), mine, undisturbed)


@pytest.mark.parametrize("strategy", [{}, {"rule": "scaffold"}])
def test_a_silo_of_two_ranks_takes_part_over_grpc(
    gptfl: Commands, federation: Callable[..., Federation], strategy: dict[str, str]
) -> None:
    """With SCAFFOLD what it keeps from round to round goes to its job and comes back from it."""
    settings: dict[str, Any] = {"epochs": 2, "federation": {**RULES, "rounds": 2}, "strategy": strategy}
    alone, mine = federation("alone", **settings), federation("mine", **settings)
    launched(mine, how="mpirun", mpirun={"command": MPIEXEC, "ranks": 2})
    for each in (alone, mine):
        gptfl.run("run", each.path)
    models = [numbers(each.run_folder / "models/fedavg_random-final.safetensors") for each in (alone, mine)]
    assert np.abs(models[0] - models[1]).max() < 1e-5
    assert (mine.run_folder / "silos/silo-1/trainer.log").read_text().count("round 2: 2 epochs") == 2


def test_a_job_a_round(
    gptfl: Commands, federation: Callable[..., Federation], undisturbed: Federation, slurm: SlurmCluster
) -> None:
    mine = launched(federation(), **BY_SLURM, slurm={"hold": "round"})
    finish(gptfl.start("run", mine.path), mine, undisturbed)
    assert agent_log(mine).count("was submitted") == 4  # three rounds and the final evaluation


def _trainer(slurm: SlurmCluster) -> int:
    """The process id of the trainer in a job of this cluster."""
    mark = f"SLURM_CONF={slurm.environment['SLURM_CONF']}".encode()
    (found,) = (
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if _read(process / "cmdline").split(b"\0")[1:3] == [b"-m", b"gptfl_dist.run.trainer"]
        and mark in (environment := _read(process / "environ").split(b"\0"))
        and any(variable.startswith(b"SLURM_JOB_ID=") for variable in environment)
    )
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def stopped_in_mid_training(slurm: SlurmCluster, mine: Federation) -> int:
    """The process id of the trainer, which sleeps from now on in a round that it has begun and not ended."""
    folder = mine.run_folder / "silos" / "silo-1" / "launch" / "silo-1"
    for round_ in (2, 3):
        wait_for(lambda: f"round {round_}: ".encode() in _read(folder / "trainer.log"), 200)  # noqa: B023  (called at once)
        trainer = _trainer(slurm)
        os.kill(trainer, signal.SIGSTOP)
        if not list(folder.glob(f"*/update-{round_ + 1}.safetensors")):  # the first message is the set-up
            return trainer
        os.kill(trainer, signal.SIGCONT)
    raise AssertionError("it trains too fast")


def _cancel(slurm: SlurmCluster, trainer: int) -> str:
    slurm.run("scancel", *slurm.jobs())
    return "was cancelled"


def _preempt(slurm: SlurmCluster, trainer: int) -> str:
    slurm.submit("--partition=urgent", *ALL, "--wrap=true")
    return "was preempted"


def _kill(slurm: SlurmCluster, trainer: int) -> str:
    os.kill(trainer, signal.SIGKILL)
    return "rank 0 was killed by signal 9"


@pytest.mark.parametrize("happens", [_cancel, _preempt, _kill])
def test_a_job_that_is_lost_in_mid_round_is_submitted_again(
    gptfl: Commands,
    federation: Callable[..., Federation],
    undisturbed: Federation,
    slurm: SlurmCluster,
    happens: Callable[[SlurmCluster, int], str],
) -> None:
    mine = launched(federation(), **BY_SLURM)
    command = gptfl.start("run", mine.path)
    told = happens(slurm, stopped_in_mid_training(slurm, mine))
    finish(command, mine, undisturbed)
    assert told in agent_log(mine)
    assert agent_log(mine).count("was submitted") == 2


def test_a_job_that_is_lost_too_often_fails_its_round_with_the_reason(
    gptfl: Commands, federation: Callable[..., Federation], slurm: SlurmCluster
) -> None:
    mine = launched(federation(), **BY_SLURM, retries=0)
    command = gptfl.start("run", mine.path)
    wait_for(lambda: "silo-1" in mine.owed(1) and slurm.run("squeue", "--noheader", "--states=RUNNING"), 200)
    slurm.run("scancel", *slurm.jobs())
    assert command.wait() == 8
    assert "silo-1: TrainerLost: Slurm job" in command.stderr
    assert "was cancelled" in command.stderr


def test_the_coordinators_operator_reads_that_a_job_waits(
    gptfl: Commands, federation: Callable[..., Federation], undisturbed: Federation, slurm: SlurmCluster
) -> None:
    slurm.submit(*ALL, "--job-name=full", "--wrap=sleep 600")
    mine = launched(federation(), **BY_SLURM)
    command = gptfl.start("run", mine.path)

    def told() -> str:
        status = json.loads(gptfl.run("status", mine.path, "--format", "json").stdout)
        silos = {silo["name"]: silo for silo in status["silos"]}
        return silos["silo-1"]["reason"] if "silo-1" in silos and silos["silo-1"]["work"] == "awaited" else ""

    assert "is queued: " in wait_for(told, 200)
    slurm.run("scancel", "--name=full")
    finish(command, mine, undisturbed)


def test_a_stopped_run_leaves_no_job_and_goes_on_in_its_round(
    gptfl: Commands, federation: Callable[..., Federation], undisturbed: Federation, slurm: SlurmCluster
) -> None:
    mine = launched(federation(), **BY_SLURM, lease="30s")
    for round_, number in ((2, signal.SIGINT), (3, signal.SIGKILL)):
        command = gptfl.start("run", mine.path)
        wait_for(lambda: "silo-1" in mine.owed(round_), 200)  # noqa: B023  (called at once)
        first = slurm.jobs()
        os.kill(command.process.pid, number)
        command.wait()
        if number == signal.SIGINT:
            wait_for(lambda: slurm.jobs() == [])
        else:
            assert slurm.jobs() == first  # nobody was left to cancel it
    again = gptfl.start("run", mine.path)
    finish(again, mine, undisturbed)
    wait_for(lambda: slurm.jobs() == [])


def test_the_silos_own_limit_of_time_ends_the_job(
    gptfl: Commands, federation: Callable[..., Federation], slurm: SlurmCluster
) -> None:
    mine = launched(federation(epochs=100_000), **BY_SLURM)
    path = mine.folder / "silo-1.yaml"
    policy = {"max_seconds_per_round": "6s", "max_epochs_per_round": 100_000}
    path.write_text(dump_yaml({**yaml.safe_load(path.read_text()), "policy": policy}))
    command = gptfl.start("run", mine.path)
    assert wait_for(lambda: slurm.jobs())
    wait_for(lambda: slurm.jobs() == [])
    command.process.send_signal(signal.SIGTERM)
    command.wait()
    assert "longer than policy.max_seconds_per_round (6 s)" in agent_log(mine)


def test_a_launcher_below_an_mpi_launcher_is_refused(gptfl: Commands, federation: Callable[..., Federation]) -> None:
    command = gptfl.mpi(3, "run", launched(federation(), how="mpirun").path)
    assert command.wait() == 11
    assert "launch.how is mpirun, but in a world of ranks" in command.stderr

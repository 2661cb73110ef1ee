"""`mpiexec -n N gptfl run FILE` and `torchrun -m gptfl_dist run FILE`: the same federation file over collectives."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import RULES, Command, Commands, Federation, Floats, numbers, wait_for

from gptfl_dist.config.document import dump_yaml

FAST = {"collective": {"reduction": "fast"}}
Make = Callable[..., Federation]


def _start(gptfl: Commands, launcher: str, ranks: int, federation: Federation) -> Command:
    return {"mpi": gptfl.mpi, "torch": gptfl.torch}[launcher](ranks, "run", federation.path)


def _numbers(federation: Federation) -> Floats:
    return numbers(federation.run_folder / "models/fedavg_random-final.safetensors")


def _with_code(federation: Federation, functions: Mapping[str, str]) -> Federation:
    """Gives silos a training function; the module is written beside their files."""
    for silo, body in functions.items():
        module = f"code_{silo.replace('-', '_')}"
        code = (
            "import time\nimport torch\nfrom gptfl_dist.learning.local import train as built_in\n\n"
            "def train(model, data, settings, task, *, seed, device, progress):\n"
            "    told = built_in(model, data, settings, task, seed=seed, device=device, progress=progress)\n"
            f"    {body}\n    return told\n"
        )
        (federation.folder / f"{module}.py").write_text(code)
        path = federation.folder / f"{silo}.yaml"
        path.write_text(path.read_text() + dump_yaml({"code": {"function": f"{module}:train"}}))
    return federation


def test_the_weights_are_those_of_the_grpc_run_bit_for_bit(
    gptfl: Commands, federation: Make, undisturbed: Federation
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
    assert "exchange: MPI, 3 ranks (a launcher set PMI_SIZE=3)" in command.stderr
    assert command.alive() == {}

    again = gptfl.mpi(3, "run", mine.path)
    assert again.wait() == 0, again.stderr
    assert "this run is finished" in again.stderr


@pytest.mark.parametrize(("launcher", "ranks"), [("mpi", 2), ("torch", 3)])
def test_so_they_are_with_several_silos_a_rank_and_under_torchrun(
    gptfl: Commands, federation: Make, undisturbed: Federation, launcher: str, ranks: int
) -> None:
    mine = federation()
    command = _start(gptfl, launcher, ranks, mine)
    assert command.wait() == 0, command.stderr
    assert mine.result() == undisturbed.result()
    assert mine.summary()["transport"] == launcher
    assert f"{ranks} ranks (a launcher set" in command.stderr
    command.wait_until_gone()


def test_control_variates_travel_alike_over_grpc_and_mpi(gptfl: Commands, federation: Make) -> None:
    strategy = {"strategy": {"rule": "scaffold"}, "epochs": 2}
    found = []
    for name in ("grpc", "mpi"):
        mine = federation(name, **strategy)
        command = gptfl.start("run", mine.path) if name == "grpc" else _start(gptfl, "mpi", 3, mine)
        assert command.wait() == 0, command.stderr
        (state,) = (mine.run_folder / "strategy").glob("*.safetensors")
        found.append((mine.result(), state.read_bytes()))
    assert found[0] == found[1]


def test_four_silos_on_three_ranks_come_to_the_weights_of_five_ranks(gptfl: Commands, federation: Make) -> None:
    three, five = federation("three", silos=4, epochs=2), federation("five", silos=4, epochs=2)
    for ranks, each in ((3, three), (5, five)):
        command = gptfl.mpi(ranks, "run", each.path)
        assert command.wait() == 0, command.stderr
    assert three.result() == five.result()


def test_a_sum_by_the_mpi_is_that_of_the_coordinator_but_for_rounding(gptfl: Commands, federation: Make) -> None:
    settings: dict[str, Any] = {
        "silos": 3,
        "epochs": 2,
        "federation": {**RULES, "rounds": 1},
        "strategy": {"optimizer": "adam", "learning_rate": 0.1},  # the server's optimiser steps by the sum
    }
    exact = federation("exact", **settings)
    gptfl.run("run", exact.path)
    for launcher, ranks in (("mpi", 2), ("torch", 4)):
        fast = federation(f"{launcher}-{ranks}", **settings, **FAST)
        command = _start(gptfl, launcher, ranks, fast)
        assert command.wait() == 0, command.stderr
        assert np.abs(_numbers(fast) - _numbers(exact)).max() < 1e-6, launcher
        assert fast.summary()["arms"]["fedavg_random"]["curve"] == exact.summary()["arms"]["fedavg_random"]["curve"]
        assert list(fast.run_folder.rglob("*.spool")) == []
        assert list((fast.run_folder / "silos").rglob("*.safetensors")) == []  # weights are in memory alone


def test_updates_that_their_rank_or_the_coordinator_refuses_are_not_in_the_sum(
    gptfl: Commands, federation: Make
) -> None:
    rules = {**RULES, "rounds": 1, "quorum": 2, "max_update_norm": 500}
    bodies = {
        "silo-2": "next(iter(model.parameters())).data.fill_(float('nan'))",
        "silo-3": "next(iter(model.parameters())).data.add_(1000.0)",
    }
    weights = []
    for name, settings in (("exact", {}), ("fast", FAST)):
        mine = _with_code(federation(name, silos=5, epochs=1, federation=rules, **settings), bodies)
        entries = [{"name": silo, "file": f"{silo}.yaml", "max_samples": 1000} for silo in mine.silos]
        entries[3]["max_samples"] = 10
        text = mine.path.read_text()
        mine.path.write_text(text[: text.index("silos:")] + dump_yaml({"silos": entries}))
        command = gptfl.mpi(4, "run", mine.path)
        assert command.wait() == 0, command.stderr
        assert "silo-2 failed" in command.stderr
        assert "silo-3 failed" in command.stderr
        assert "silo-4 failed: refused: claims" in command.stderr
        weights.append(_numbers(mine))
    assert "NaN or infinite" in command.stderr
    assert "federation.max_update_norm allows 500" in command.stderr
    assert np.isfinite(weights[0]).all()
    assert np.abs(weights[0] - weights[1]).max() < 1e-6


@pytest.mark.parametrize("variables", [{"PMI_SIZE": "3", "PMI_RANK": "0"}, {"OMPI_COMM_WORLD_SIZE": "3"}])
def test_a_world_of_one_under_a_launcher_of_another_mpi_is_explained(
    gptfl: Commands, federation: Make, variables: dict[str, str]
) -> None:
    """A launcher that this MPI does not know leaves its variables and no more."""
    command = gptfl.start("run", federation().path, **variables)
    assert command.wait() == 11
    assert "the launcher started 3 processes" in command.stderr
    assert "each is alone in its MPI world" in command.stderr
    assert "MPICH" in command.stderr


def test_an_error_of_one_rank_ends_the_job_with_its_message(gptfl: Commands, federation: Make) -> None:
    broken = federation()
    (broken.folder / "silo-2.npz").write_bytes(b"no archive")
    command = gptfl.mpi(3, "run", broken.path)
    assert command.wait() == 3
    assert f"gptfl, rank 2 on {os.uname().nodename}:" in command.stderr
    assert str(broken.folder / "silo-2.npz") in command.stderr
    command.wait_until_gone()


def test_what_all_ranks_find_wrong_is_said_once(gptfl: Commands, federation: Make) -> None:
    mine = federation()
    mine.path.write_text(mine.path.read_text() + "colective: {reduction: fast}\n")
    command = gptfl.mpi(5, "run", mine.path)
    assert command.wait() == 2
    assert command.stderr.count("the nearest valid key is collective") == 1


@pytest.mark.parametrize("launcher", ["mpi", "torch"])
def test_a_fault_of_ours_on_one_rank_ends_the_job_with_its_traceback(
    gptfl: Commands, federation: Make, launcher: str
) -> None:
    mine = _with_code(federation(epochs=1, **FAST), {"silo-2": "raise ArithmeticError('of its own')"})
    command = _start(gptfl, launcher, 3, mine)
    assert command.wait(60) == 1
    assert f"gptfl, rank 2 on {os.uname().nodename}:" in command.stderr
    assert "Traceback" in command.stderr
    assert "ArithmeticError: of its own" in command.stderr
    command.wait_until_gone()


def test_whoever_ends_the_job_leaves_no_process_and_the_run_goes_on(
    gptfl: Commands, federation: Make, undisturbed: Federation
) -> None:
    """A killed mpiexec, and a scheduler, who finds the code that asks for a requeue."""
    mine = federation()
    for round_, number in ((1, signal.SIGKILL), (2, signal.SIGUSR1), (3, signal.SIGTERM)):
        command = gptfl.mpi(3, "run", mine.path)
        wait_for(lambda: mine.owed(round_))  # noqa: B023  (called at once)
        if number == signal.SIGKILL:
            command.process.kill()
            assert command.wait() != 0
        else:
            for pid in _ranks(command):  # as srun does; a signal to mpiexec itself is for its MPI to pass on
                os.kill(pid, number)
            assert command.wait(15) == 75
            assert "stopped; the same command goes on from here" in command.stderr
            assert "Traceback" not in command.stderr
        command.wait_until_gone()
    again = gptfl.mpi(3, "run", mine.path)
    assert again.wait() == 0, again.stderr
    assert mine.result() == undisturbed.result()


@pytest.mark.parametrize(("launcher", "reduction"), [("mpi", "exact"), ("torch", "fast")])
def test_a_run_that_lacks_only_its_report_comes_to_its_end(
    gptfl: Commands, federation: Make, launcher: str, reduction: str
) -> None:
    """The coordinator says goodbye before the silos' trainers are ready."""
    mine = federation(epochs=2, collective={"reduction": reduction})
    command = _start(gptfl, launcher, 3, mine)
    assert command.wait() == 0, command.stderr
    result = mine.result()
    (mine.run_folder / "summary.json").unlink()  # as if it had been killed before this was written
    again = _start(gptfl, launcher, 3, mine)
    assert again.wait(60) == 0, again.stderr
    again.wait_until_gone()
    assert mine.result() == result
    assert "not connected" not in again.stderr


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_the_job_where_no_launcher_ends_the_others(
    gptfl: Commands, federation: Make, victim: int
) -> None:
    mine = federation(**FAST)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    world = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
    ranks = [gptfl.start("run", mine.path, RANK=str(r), LOCAL_RANK=str(r), **world) for r in range(3)]
    wait_for(lambda: mine.owed(2))
    end = time.monotonic() + 15
    os.kill(ranks[victim].process.pid, signal.SIGKILL)
    for rank in ranks:
        assert rank.wait(max(0.1, end - time.monotonic())) != 0
        rank.wait_until_gone(max(0.1, end - time.monotonic()))
    teller = ranks[1 if victim == 0 else 0]
    assert f"rank {victim} on {os.uname().nodename} is gone: it was killed, or its node is down" in teller.stderr
    assert "the same command goes on" in teller.stderr
    assert not any("not connected" in rank.stderr for rank in ranks)  # nor tries to be, as the job ends


def test_a_rank_that_waits_for_one_that_never_comes_can_be_stopped(gptfl: Commands, federation: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as never:
        never.settimeout(60)
        command = gptfl.start(
            *("run", federation().path),
            **{"TORCHELASTIC_RUN_ID": "test", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(never.getsockname()[1])},
        )
        line, _ = never.accept()  # it joins, in code that no handler of Python interrupts
        with line:
            command.process.terminate()
            assert command.wait(10) != 0


@pytest.mark.parametrize("settings", [{}, FAST], ids=["exact", "fast"])
def test_ranks_that_wait_for_a_slow_silo_leave_it_the_cores(
    gptfl: Commands, federation: Make, settings: dict[str, Any]
) -> None:
    """`GPTFL_WAIT` is how many seconds they wait; 60 make the minute of the promise."""
    seconds = float(os.environ.get("GPTFL_WAIT", "5"))
    mine = federation(epochs=1, **{"federation": {**RULES, "rounds": 1}, **settings})
    _with_code(mine, {"silo-2": f"open('slow', 'w').close(); time.sleep({seconds + 5})"})
    command = gptfl.mpi(3, "run", mine.path)
    wait_for(lambda: (mine.folder / "slow").exists() or (Path.cwd() / "slow").exists(), 60)
    wait_for(lambda: mine.owed(1) == {"silo-2"})
    (Path.cwd() / "slow").unlink(missing_ok=True)
    before = {pid: _cpu(pid) for pid in _ranks(command)}
    time.sleep(seconds)
    spent = [(_cpu(pid) - cpu) / seconds for pid, cpu in before.items()]
    assert len(spent) == 3
    assert max(spent) < 0.1
    assert command.wait() == 0, command.stderr


def _ranks(command: Command) -> list[int]:
    """The process ids of the ranks."""
    return [pid for pid in command.pids("-m gptfl_dist run") if pid != command.process.pid]


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_coordinator_that_cannot_write_an_update_ends_the_job(gptfl: Commands, federation: Make) -> None:
    mine = federation()
    (mine.run_folder / "spools" / "silo-1.spool").mkdir(parents=True)
    command = gptfl.mpi(3, "run", mine.path)
    assert command.wait(60) == 10
    assert "silo-1.spool" in command.stderr
    command.wait_until_gone()


@pytest.mark.parametrize("launcher", ["mpi", "torch"])
def test_silos_of_several_ranks_come_to_the_weights_of_one_rank_but_for_rounding(
    gptfl: Commands, federation: Make, launcher: str
) -> None:
    settings: dict[str, Any] = {"epochs": 2, "federation": {**RULES, "rounds": 2}}
    alone, together = federation("alone", **settings), federation("together", **settings)
    gptfl.run("run", alone.path)
    command = _start(gptfl, launcher, 4, together)  # two ranks for silo-1
    assert command.wait() == 0, command.stderr
    assert np.abs(_numbers(together) - _numbers(alone)).max() < 1e-5
    for silo, ranks in (("silo-1", 2), ("silo-2", 1)):
        assert (together.run_folder / "silos" / silo / "trainer.log").read_text().count("round 2: 2 epochs") == ranks
    assert list((together.run_folder / "silos" / "silo-1" / "launch" / "silo-1").iterdir()) == []
    command.wait_until_gone()


def test_a_rank_of_a_silos_trainer_that_is_killed_is_started_again_with_the_others(
    gptfl: Commands, federation: Make
) -> None:
    mine = federation()
    command = gptfl.mpi(4, "run", mine.path)  # two ranks for silo-1
    log = mine.run_folder / "silos" / "silo-1" / "trainer.log"
    wait_for(lambda: log.exists() and log.read_text().count("round 2: ") >= 2)
    helper = next(
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if (environment := _environment(process)).get("GPTFL_RANK") == "1"
        and str(mine.run_folder) in environment.get("GPTFL_CHANNEL", "")
    )
    os.kill(helper, signal.SIGKILL)
    assert command.wait() == 0, command.stderr
    assert "rank 1 was killed by signal 9" in command.stderr
    assert "it is started again" in command.stderr
    command.wait_until_gone()


def _environment(process: Path) -> dict[str, str]:
    """The environment of a trainer (none of other processes)."""
    try:
        if b"gptfl_dist.run.trainer" not in (process / "cmdline").read_bytes().split(b"\0")[2:3]:
            return {}
        pairs = (process / "environ").read_text().split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def test_more_ranks_than_silos_cannot_be_reduced(gptfl: Commands, federation: Make) -> None:
    command = gptfl.mpi(4, "run", federation(**FAST).path)
    assert command.wait() == 11
    assert "the world has 4 ranks, expected at most 3" in command.stderr
    assert "set collective.reduction to exact" in command.stderr


def test_compressed_federations_come_to_the_same_weights_over_both_wires(gptfl: Commands, federation: Make) -> None:
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

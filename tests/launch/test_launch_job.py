"""Trainers as jobs of a launcher: real mpiexec, torchrun and Slurm; the trainer is a script without torch."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmCluster
from support import MPIEXEC, wait_for

from gptfl_dist.config.silo import SiloFile
from gptfl_dist.errors import DataError, LaunchError, TrainerError, TrainerLost
from gptfl_dist.launch.base import TrainerLine
from gptfl_dist.launch.start import open_trainer

TRAINER = """
import os, sys, time
from gptfl_dist.errors import DataError
from gptfl_dist.launch.channel import TrainerEnd, error_to_message
print("trainer up", flush=True)
channel = TrainerEnd()
while True:
    message = channel.receive()
    kind = message["type"]
    if kind == "finish":
        break
    if kind == "say":
        channel.send({"type": "progress", "done": 1, "total": 2})
        channel.send({"type": "result", "value": message["value"], "pid": os.getpid()})
    elif kind == "fail":
        channel.send(error_to_message(DataError("no images", hint="add some")))
    elif kind == "crash":
        print("out of memory, says the trainer", file=sys.stderr, flush=True)
        os._exit(3)
    elif kind == "garbage":
        channel._line._files.send([1])
    elif kind == "sleep":
        open(message["sign"], "w").close()
        time.sleep(600)
"""
# More CPUs than one node has: a second such job waits, and an urgent one preempts it.
ALL = ["--nodes=3", "--ntasks=12"]
SILO = "silo-1"


def silo_file(folder: Path, how: str, lease: str = "60s", **settings: Any) -> SiloFile:
    script = folder / "trainer.py"
    script.write_text(TRAINER)
    launch = {"how": how, "lease": lease, "mpirun": {"command": MPIEXEC}, **settings}
    return SiloFile.model_validate({"name": SILO, "code": {"script": script}, "launch": launch})


def play(folder: Path, silo: SiloFile, scene: Callable[[TrainerLine], Awaitable[Any]]) -> Any:
    """Runs `scene` with a trainer that is started."""

    async def run() -> Any:
        trainer = await open_trainer(silo, folder, folder)
        await trainer.start("run-1")
        try:
            return await scene(trainer)
        finally:
            await trainer.stop()

    return asyncio.run(asyncio.wait_for(run(), 120))


async def exchange_words(trainer: TrainerLine) -> list[Any]:
    told: list[tuple[int, int]] = []
    first = await trainer.ask({"type": "say", "value": "é\n"}, "result", lambda *step: told.append(step[:2]))
    with pytest.raises(DataError, match="no images") as error:
        await trainer.ask({"type": "fail"}, "result")
    assert error.value.hint == "add some"
    second = await trainer.ask({"type": "say", "value": 2}, "result")
    assert trainer.running
    assert first["pid"] == second["pid"]
    assert (1, 2) in told
    await trainer.finish({"type": "finish"})
    return [first["value"], second["value"]]


@pytest.mark.parametrize("how", ["mpirun", "torchrun"])
def test_a_launched_trainer_answers(tmp_path: Path, how: str) -> None:
    assert play(tmp_path, silo_file(tmp_path, how), exchange_words) == ["é\n", 2]
    assert "trainer up" in (tmp_path / "trainer.log").read_text()
    assert list((tmp_path / "launch" / SILO).iterdir()) == []


def test_a_slurm_job_answers(tmp_path: Path, slurm: SlurmCluster) -> None:
    assert play(tmp_path, silo_file(tmp_path, "slurm"), exchange_words) == ["é\n", 2]
    assert "trainer up" in (tmp_path / "launch" / SILO / "trainer.log").read_text()


async def _crash(trainer: TrainerLine) -> str:
    with pytest.raises(TrainerLost) as lost:
        await trainer.ask({"type": "crash"}, "result")
    assert not trainer.running
    return lost.value.message


@pytest.mark.parametrize("how", ["mpirun", "torchrun"])
def test_a_rank_that_dies_is_told_with_its_last_words(tmp_path: Path, how: str) -> None:
    said = play(tmp_path, silo_file(tmp_path, how), _crash)
    assert "rank 0 ended with code 3" in said.splitlines()[0]
    assert "out of memory, says the trainer" in said


def test_a_failed_slurm_job_is_told_with_its_last_words(tmp_path: Path, slurm: SlurmCluster) -> None:
    said = play(tmp_path, silo_file(tmp_path, "slurm"), _crash)
    assert "failed; rank 0 ended with code 3" in said.splitlines()[0]
    assert "out of memory, says the trainer" in said


def test_what_is_no_message_ends_the_trainer_and_not_the_agent(tmp_path: Path) -> None:
    async def scene(trainer: TrainerLine) -> None:
        with pytest.raises(TrainerError, match="no message"):
            await trainer.ask({"type": "garbage"}, "result")
        assert not trainer.running

    play(tmp_path, silo_file(tmp_path, "mpirun"), scene)


RANKS = """
import os, sys
if "MASTER_ADDR" in os.environ:
    import torch
    import torch.distributed as group
    group.init_process_group("gloo")
    rank, one = group.get_rank(), torch.ones(1)
    group.all_reduce(one)
    size = int(one)
else:
    from mpi4py import MPI
    rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.allreduce(1)
if rank == 0:
    from gptfl_dist.launch.channel import TrainerEnd
    channel = TrainerEnd()
    channel.receive()
    channel.send({"type": "result", "ranks": size})
    channel.receive()
"""


def _ranks(folder: Path, how: str, **settings: Any) -> Any:
    """How many ranks a group finds that it has."""

    async def scene(trainer: TrainerLine) -> Any:
        answer = await trainer.ask({"type": "count"}, "result")
        await trainer.finish({"type": "finish"})
        return answer["ranks"]

    silo = silo_file(folder, how, **settings)
    (folder / "trainer.py").write_text(RANKS)
    return play(folder, silo, scene)


@pytest.mark.parametrize(
    ("how", "settings"),
    [("torchrun", {"torchrun": {"processes": 2}}), ("mpirun", {"mpirun": {"command": MPIEXEC, "ranks": 2}})],
)
def test_several_ranks_are_one_group(tmp_path: Path, how: str, settings: dict[str, Any]) -> None:
    assert _ranks(tmp_path, how, **settings) == 2


def test_several_ranks_of_a_slurm_job_on_several_nodes_are_one_group(tmp_path: Path, slurm: SlurmCluster) -> None:
    assert _ranks(tmp_path, "slurm", slurm={"options": ["--nodes=2", "--ntasks=2"]}) == 2


def _cancel(slurm: SlurmCluster) -> None:
    slurm.run("scancel", *slurm.jobs())


def _preempt(slurm: SlurmCluster) -> None:
    slurm.submit("--partition=urgent", *ALL, "--wrap=true")


def _run_out(slurm: SlurmCluster) -> None:
    slurm.run("scontrol", "update", f"JobId={slurm.jobs()[0]}", "EndTime=now")


@pytest.mark.parametrize(
    ("happens", "told"),
    [(_cancel, "was cancelled"), (_preempt, "was preempted"), (_run_out, "reached its time limit")],
)
def test_a_slurm_job_that_is_lost_in_mid_training_is_told_in_words(
    tmp_path: Path, slurm: SlurmCluster, happens: Callable[[SlurmCluster], None], told: str
) -> None:
    async def scene(trainer: TrainerLine) -> str:
        sign = tmp_path / "asleep"
        asking = asyncio.create_task(trainer.ask({"type": "sleep", "sign": str(sign)}, "result"))
        await asyncio.to_thread(wait_for, sign.exists)
        happens(slurm)
        with pytest.raises(TrainerLost) as lost:
            await asking
        return lost.value.message

    silo = silo_file(tmp_path, "slurm", slurm={"options": ["--time=10"]})
    assert told in play(tmp_path, silo, scene).splitlines()[0]
    wait_for(lambda: slurm.jobs() == [])


def test_a_queued_job_is_told_in_words_and_may_be_cancelled_there(tmp_path: Path, slurm: SlurmCluster) -> None:
    slurm.submit(*ALL, "--wrap=sleep 600")
    notes: list[str] = []

    async def scene(trainer: TrainerLine) -> str:
        asking = asyncio.create_task(
            trainer.ask({"type": "say", "value": 1}, "result", lambda done, total, note="": notes.append(note))
        )
        await asyncio.to_thread(wait_for, lambda: any("is queued: " in note for note in notes))
        slurm.run("scancel", f"--name={_name(slurm)}")
        with pytest.raises(TrainerLost) as lost:
            await asking
        return lost.value.message

    assert "was cancelled" in play(tmp_path, silo_file(tmp_path, "slurm"), scene)
    _cancel(slurm)
    wait_for(lambda: slurm.jobs() == [])


def _name(slurm: SlurmCluster) -> str:
    names = slurm.run("squeue", "--noheader", "--format=%j").split()
    return next(name for name in names if name.startswith("gptfl-"))


def test_a_job_says_whose_it_is_and_ends_when_it_is_not_waited_for(tmp_path: Path, slurm: SlurmCluster) -> None:
    async def scene(trainer: TrainerLine) -> str:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(trainer.ask({"type": "nothing"}, "result"), 2)
        return slurm.run("squeue", "--noheader", "--format=%k|%T")

    async def before(trainer: TrainerLine) -> str:
        comment = slurm.run("squeue", "--noheader", "--format=%k")
        assert comment.strip() == f"gptfl run-1 {SILO} {tmp_path / 'launch' / SILO}"
        return await scene(trainer)

    left = play(tmp_path, silo_file(tmp_path, "slurm"), before)
    assert "RUNNING" not in left
    wait_for(lambda: slurm.jobs() == [])


def test_what_sbatch_refuses_and_a_cluster_that_is_not_here_are_explained(
    tmp_path: Path, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(trainer: TrainerLine) -> None: ...

    with pytest.raises(TrainerLost, match=r"sbatch refused the job\n.*invalid partition"):
        play(tmp_path, silo_file(tmp_path, "slurm", slurm={"options": ["--partition=none"]}), nothing)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PATH", str(tmp_path))
        with pytest.raises(LaunchError, match="cannot start squeue"):
            play(tmp_path, silo_file(tmp_path, "slurm"), nothing)
    with pytest.raises(LaunchError, match=r"cannot start .*no-mpi"):
        play(tmp_path, silo_file(tmp_path, "mpirun", mpirun={"command": "no-mpi"}), nothing)


AGENT = """
import asyncio, sys
from pathlib import Path
from gptfl_dist.config.silo import SiloFile
from gptfl_dist.launch.start import open_trainer
async def main():
    folder = Path(sys.argv[1])
    trainer = await open_trainer(SiloFile.model_validate_json(sys.argv[2]), folder, folder)
    await trainer.start()
    print("started", flush=True)
    await trainer.ask({"type": "sleep", "sign": str(folder / "asleep")}, "result")
asyncio.run(main())
"""


def _killed_agent(folder: Path, silo: SiloFile, once: Callable[[], object]) -> None:
    """Starts an agent, and kills it once something happened."""
    command = [sys.executable, "-c", AGENT, str(folder), silo.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "started\n"
        wait_for(once)
        agent.send_signal(signal.SIGKILL)


def _trainers(folder: Path) -> list[int]:
    """The processes that run the trainer of a test."""
    script, found = str(folder / "trainer.py").encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if script in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("how", ["mpirun", "torchrun"])
def test_ranks_end_with_a_killed_agent(tmp_path: Path, how: str) -> None:
    _killed_agent(tmp_path, silo_file(tmp_path, how), (tmp_path / "asleep").exists)
    wait_for(lambda: _trainers(tmp_path) == [], 30)


def test_a_job_ends_with_a_killed_agent_once_its_lease_has_run_out(tmp_path: Path, slurm: SlurmCluster) -> None:
    _killed_agent(tmp_path, silo_file(tmp_path, "slurm", lease="2s"), (tmp_path / "asleep").exists)
    wait_for(lambda: slurm.jobs() == [], 30)
    assert _trainers(tmp_path) == []


def test_an_agent_that_is_started_again_cancels_the_job_of_its_earlier_life_and_no_other(
    tmp_path: Path, slurm: SlurmCluster
) -> None:
    other, mine = tmp_path / "other", tmp_path / "mine"
    for folder in (other, mine):
        folder.mkdir()
    slurm.submit(*ALL, "--job-name=full", "--wrap=sleep 600")
    for folder in (other, mine):
        _killed_agent(folder, silo_file(folder, "slurm"), lambda: True)
    assert len(slurm.jobs()) == 3

    asyncio.run(open_trainer(silo_file(mine, "slurm"), mine, mine))
    wait_for(lambda: len(slurm.jobs()) == 2)
    asyncio.run(open_trainer(silo_file(other, "slurm"), other, other))
    wait_for(lambda: slurm.run("squeue", "--noheader", "--format=%j").split() == ["full"])
    _cancel(slurm)
    wait_for(lambda: slurm.jobs() == [])


@pytest.mark.parametrize("option", ["time=1", "--job-name=x", "-Jx", "--array=1-2", "--requeue", "-e out"])
def test_options_that_would_hide_the_job_from_its_agent_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError, match=r"must not hold|expected options of sbatch"):
        silo_file(tmp_path, "slurm", slurm={"options": [option]})

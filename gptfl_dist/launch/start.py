"""From the section `launch` of a silo file to the trainer's line."""

from __future__ import annotations

import sys
from pathlib import Path

from gptfl_dist.config.silo import SiloFile
from gptfl_dist.launch.base import TrainerLine
from gptfl_dist.launch.job import TrainerJob
from gptfl_dist.launch.local import LocalLauncher
from gptfl_dist.launch.slurm import SlurmLauncher
from gptfl_dist.launch.trainer import TrainerProcess, python_module

LOG = "trainer.log"
_TRAINER = "gptfl_dist.run.trainer"


def launch_folder(silo: SiloFile, work: Path) -> Path:
    """Where the agent and a launched trainer of a silo exchange files."""
    return (silo.launch.folder or work / "launch").absolute() / silo.name


def trainer_command(silo: SiloFile) -> list[str]:
    """The command of one rank of a silo's trainer."""
    script = silo.code.script if silo.code is not None else None
    return python_module(_TRAINER) if script is None else [sys.executable, str(script)]


async def open_trainer(silo: SiloFile, home: Path, work: Path) -> TrainerLine:
    """The trainer of a silo, not yet started; what an earlier agent left of one is ended.

    `home` is where the silo file lies, `work` its work folder. Raises LaunchError where the launcher is not here.
    """
    launch, trainer = silo.launch, trainer_command(silo)
    if launch.how == "child":
        return TrainerProcess(trainer, work / LOG, cwd=home)
    folder = launch_folder(silo, work)
    launcher: LocalLauncher | SlurmLauncher
    if launch.how == "slurm":
        launcher = SlurmLauncher(
            silo.name, launch.slurm.options, trainer, lease=launch.lease, log=folder / LOG, cwd=home.absolute()
        )
    else:
        if launch.how == "torchrun":
            count = str(launch.torchrun.processes)
            start = [*python_module("torch.distributed.run"), "--standalone", "--nproc-per-node", count]
            start += [*launch.torchrun.options, "--no-python"]
        else:
            start = [launch.mpirun.command, "-n", str(launch.mpirun.ranks), *launch.mpirun.options]
        launcher = LocalLauncher(start, trainer, lease=launch.lease, log=work / LOG, cwd=home)
    job = TrainerJob(launcher, folder, launch.lease)
    await job.sweep()
    return job

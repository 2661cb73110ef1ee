"""A private Slurm of three virtual nodes on this machine, with daemons, keys, ports and spool of its own.

Needs root and Debian's packages slurm-wlm and munge. Commands find it through SLURM_CONF (`environment`).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gptfl_dist.launch import bound

NODES = ("silo1", "silo2", "silo3")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
# CPUs is what Slurm believes; the nodes share those of this machine. Two partitions of the same nodes: a job of the
# urgent one preempts one of the other, which is requeued, or cancelled where it does not allow that. A requeued job
# waits for as long as its credentials hold. The first job has a random number: what MPICH leaves in /dev/shm of ranks
# that were killed under srun is named by the numbers of job and step, and would stop those of the next session.
_CONFIG = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=pmi2
ReturnToService=2
KillWait=3
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=2,bf_interval=2
FirstJobId={first_job}
{nodes}
PartitionName=main Nodes={every} Default=YES MaxTime=UNLIMITED PriorityTier=1
PartitionName=urgent Nodes={every} MaxTime=UNLIMITED PriorityTier=10
"""


def missing() -> str:
    """Why no cluster can be started here; empty where it can."""
    if os.geteuid() != 0:
        return "a private Slurm needs root"
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge" if absent else ""


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin"


class SlurmCluster:
    """Started when made; `stop` ends its jobs and daemons."""

    def __init__(self, folder: Path) -> None:
        """`folder` must have a short path, for the sockets in it."""
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        folder.chmod(0o755)  # munge wants its socket to be reachable
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        control, *ports = _free_ports(1 + len(NODES))
        host = socket.gethostname()
        nodes = (
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"
            for node, port in zip(NODES, ports, strict=True)
        )
        (folder / "slurm.conf").write_text(
            _CONFIG.format(
                name=f"gptfl{os.getpid()}",
                host=host,
                control_port=control,
                first_job=random.randint(1, 9_000_000),
                folder=folder,
                nodes="\n".join(nodes),
                every=",".join(NODES),
            )
        )
        try:
            munge = [f"--{option}={folder}/munge.{file}" for option, file in _MUNGE_FILES]
            self._start("munged", "--foreground", "--force", *munge)
            _wait_for((folder / "munge.socket").exists)
            self._start("slurmctld", "-D")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            _wait_for(lambda: self.run("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * 6)
        except BaseException:
            self.stop()
            raise

    def run(self, *command: str) -> str:
        """What a command of Slurm prints; empty where it fails."""
        ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **self.environment})
        return ran.stdout if ran.returncode == 0 else ""

    def submit(self, *options: str) -> None:
        """A job of no interest but for the nodes that it takes."""
        self.run("sbatch", "--output=/dev/null", *options)

    def jobs(self) -> list[str]:
        """The ids of the jobs that wait, run or are about to end."""
        return self.run("squeue", "--noheader", "--format=%i").split()

    def stop(self) -> None:
        with suppress(OSError):
            self.run("scancel", "--full", "--user=root")
            with suppress(AssertionError):
                _wait_for(lambda: not self.jobs())
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    (sys.executable, "-IS", bound.__file__, str(os.getpid()), *command),  # they end with the session
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **self.environment, "PATH": _path()},
                    start_new_session=True,
                )
            )


@contextmanager
def private_cluster() -> Iterator[SlurmCluster]:
    folder = Path(tempfile.mkdtemp(prefix="gptfl-slurm-"))  # not of pytest's: its paths may be too long for sockets
    cluster = SlurmCluster(folder)
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


_MUNGE_FILES = (
    ("socket", "socket"), ("key-file", "key"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"),
)  # fmt: skip


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def _wait_for(ready: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain for Slurm"
        time.sleep(0.05)

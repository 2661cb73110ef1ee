"""deploy/slurm: each script runs as it stands once its lines marked EDIT were edited, on a real Slurm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from slurm_cluster import SlurmCluster, private_cluster
from support import Commands, Federation, free_port, wait_for

from gptfl_dist.config.document import dump_yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
SCRIPTS = [*sorted((DEPLOY / "slurm").glob("*.sbatch")), *sorted((DEPLOY / "slurm").glob("*.sh"))]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("script", [*SCRIPTS, DEPLOY.parent / ".ci" / "run"], ids=lambda script: script.name)
def test_the_scripts_are_sound(script: Path) -> None:
    found = subprocess.run([BIN / "shellcheck", "--exclude=SC1091", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_apptainer_definition_is_sound(tmp_path: Path) -> None:
    """It cannot be built here: that takes Apptainer. Its scripts are checked, and that what it copies is there."""
    head, *parts = (DEPLOY / "apptainer" / "gptfl.def").read_text().split("\n%")
    keys = [line.split(":")[0] for line in head.splitlines() if not line.startswith("#")]
    assert [key for key in keys if key] == ["Bootstrap", "From"]
    sections = {name: text for name, _, text in (part.partition("\n") for part in parts)}
    assert set(sections) == {"arguments", "files", "post", "environment", "runscript", "test"}
    for line in sections["files"].split("\n"):
        if line:
            source, target = line.split()
            assert (DEPLOY.parent / source).exists()
            assert target == f"/opt/source/{source}"
    for name in ("post", "environment", "runscript", "test"):
        script = tmp_path / name
        script.write_text("#!/bin/sh\n" + sections[name].replace("{{ index }}", ""))
        found = subprocess.run([BIN / "shellcheck", "--exclude=SC1091", script], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


def edited(script: Path, folder: Path, **replaced: str) -> Path:
    """A copy of a script in `folder`: in lines marked EDIT what stands before the mark is replaced, where it begins so.

    The keys are words without which a line is left; every one must be found once.
    """
    lines = []
    for line in script.read_text().splitlines():
        keys = [key for key in replaced if key in line] if "# EDIT" in line else []
        lines.append(replaced.pop(keys[0]) if keys else line)
    assert replaced == {}
    copy = folder / script.name
    copy.write_text("\n".join(lines) + "\n")
    return copy


ACTIVATE = f"source {BIN}/activate"


def submit(slurm: SlurmCluster, script: Path) -> str:
    """The number of the job."""
    job = slurm.run("sbatch", "--parsable", f"--chdir={script.parent}", str(script)).strip()
    assert job
    return job


def ended(slurm: SlurmCluster, job: str) -> str:
    """Waits for a job's end; returns its state."""

    def state() -> str:
        return slurm.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    wait_for(lambda: state() not in {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}, 200)
    return state()


def log(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("gptfl-*.log"))


def single_job(script: str, mine: Federation, **more: str) -> Path:
    known = {"--ntasks": "#SBATCH --ntasks=3", "--time": "#SBATCH --time=10", "activate": ACTIVATE}
    return edited(DEPLOY / "slurm" / script, mine.folder, **known, **more)


@pytest.mark.parametrize("launcher", ['mpiexec -n "$SLURM_NTASKS"', "srun --mpi=pmi2"])
def test_a_single_job(
    federation: Callable[..., Federation], undisturbed: Federation, slurm: SlurmCluster, launcher: str
) -> None:
    mine = federation()
    job = submit(slurm, single_job("federation.sbatch", mine, **{"launcher=": f"launcher=({launcher})"}))
    assert ended(slurm, job) == "COMPLETED", log(mine.folder)
    assert mine.summary()["transport"] == "mpi"
    assert mine.result() == undisturbed.result()


def _time_limit(slurm: SlurmCluster, job: str) -> None:
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@SECONDS sends


def _preempt(slurm: SlurmCluster, job: str) -> None:
    slurm.submit("--partition=urgent", "--nodes=3", "--ntasks=12", "--wrap=true")


@pytest.mark.parametrize("happens", [_time_limit, _preempt])
def test_a_job_that_is_requeued_in_mid_round(
    federation: Callable[..., Federation],
    undisturbed: Federation,
    slurm: SlurmCluster,
    happens: Callable[[SlurmCluster, str], None],
) -> None:
    mine = federation()
    job = submit(slurm, single_job("requeue.sbatch", mine))
    wait_for(lambda: mine.owed(2), 200)
    happens(slurm, job)
    wait_for(lambda: slurm.run("squeue", "--noheader", f"--jobs={job}", "--Format=RestartCnt").strip() == "1")
    assert ended(slurm, job) == "COMPLETED", log(mine.folder)
    assert mine.result() == undisturbed.result()
    if happens is _time_limit:
        assert f"job {job} goes back into the queue" in log(mine.folder)


@pytest.fixture
def another_cluster() -> Iterator[SlurmCluster]:
    with private_cluster() as cluster:
        yield cluster


def test_a_coordinator_job_and_an_agent_that_submits_to_another_cluster(
    gptfl: Commands,
    federation: Callable[..., Federation],
    undisturbed: Federation,
    slurm: SlurmCluster,
    another_cluster: SlurmCluster,
) -> None:
    mine = federation()
    port = free_port()
    gptfl.run("credentials", mine.path, "--host", "localhost", "--out", mine.folder / "credentials")
    content = yaml.safe_load(mine.path.read_text())
    sets = {part: f"credentials/coordinator/{part}.pem" for part in ("authority", "certificate", "key")}
    content |= {"silos": [{"name": name} for name in mine.silos], "exchange": {"listen": f"localhost:{port}", **sets}}
    mine.path.write_text(dump_yaml(content))
    coordinator = edited(
        DEPLOY / "slurm" / "coordinator.sbatch", mine.folder, activate=ACTIVATE, **{"--time": "#SBATCH --time=10"}
    )
    job = submit(slurm, coordinator)

    agents = []
    for name in mine.silos:
        home = mine.folder / f"{name}-site"
        home.mkdir()
        data = yaml.safe_load((mine.folder / f"{name}.yaml").read_text())["data"]
        edited(
            DEPLOY / "slurm" / "silo.yaml",
            home,
            **{"name:": f"name: {name}", "address:": f"  address: localhost:{port}"},
            **{
                f"{part}:": f"  {part}: {mine.folder}/credentials/{name}/{part}.pem"
                for part in ("authority", "certificate", "key")
            },
            **{
                "data:": f"data: {{path: {mine.folder}/{name}.npz, validation_share: {data['validation_share']}}}",
                "work_folder:": "work_folder: work",
                "options:": "    options: [--time=10]",
            },
        )
        agent = edited(DEPLOY / "slurm" / "silo-agent.sh", home, activate=ACTIVATE)
        agents.append(gptfl.script("bash", agent, cwd=home, **another_cluster.environment))

    wait_for(lambda: len(another_cluster.jobs()) == 2, 200)
    assert slurm.jobs() == [job]
    wait_for(lambda: "silo-2" in mine.owed(2), 200)
    another_cluster.run("scancel", another_cluster.jobs()[0])  # somebody's mistake, in mid-round
    assert ended(slurm, job) == "COMPLETED", log(mine.folder)
    for agent in agents:
        assert agent.wait() == 0, agent.stderr
    assert mine.result() == undisturbed.result()
    assert sum(agent.stderr.count("was cancelled") for agent in agents) >= 1
    wait_for(lambda: another_cluster.jobs() == [])

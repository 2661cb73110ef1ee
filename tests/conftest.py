"""Fixtures for tests that start real `gptfl` commands, and the profile of the property tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_cluster
from hypothesis import settings
from slurm_cluster import SlurmCluster, private_cluster
from support import Commands, Federation, wait_for

# A slow machine makes no test fail.
settings.register_profile("gptfl", deadline=None)
settings.load_profile("gptfl")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("PyTorch finds no CUDA device here")


@pytest.fixture
def gptfl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Starts commands, none of which outlives the test."""
    commands = Commands(tmp_path_factory.mktemp("output"))
    yield commands
    commands.kill()


@pytest.fixture
def federation(tmp_path: Path) -> Callable[..., Federation]:
    """Makes a small federation in a folder of the test's."""
    return lambda name="federation", **settings: Federation(tmp_path / name, **settings)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """The small federation, run to its end by `gptfl run` once for all tests. Not to be changed."""
    commands = Commands(tmp_path_factory.mktemp("output"))
    federation = Federation(tmp_path_factory.mktemp("undisturbed"))
    commands.run("run", federation.path)
    return federation


@pytest.fixture(scope="session")
def slurm_session() -> Iterator[SlurmCluster]:
    """A Slurm of three virtual nodes for all tests."""
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with private_cluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_session: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The cluster, found by what the test starts. A test leaves no job behind."""
    for name, value in slurm_session.environment.items():
        monkeypatch.setenv(name, value)
    yield slurm_session
    try:
        wait_for(lambda: slurm_session.jobs() == [])
    finally:
        slurm_session.run("scancel", "--user=root")

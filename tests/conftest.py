"""Fixtures for tests that start real `gptfl` commands, and the profile of the property tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from support import Commands, Federation

# A slow machine makes no test fail.
settings.register_profile("gptfl", deadline=None)
settings.load_profile("gptfl")


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

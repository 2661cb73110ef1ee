"""A sample of the chaos runs and of those with power cuts; `make chaos N=200` and `power_cut.py` do more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_federation import Run
from chaos_plan import plan
from chaos_runs import made_world, runs
from chaos_world import World
from power_cut import PowerCutRun

_JOBS = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with made_world(tmp_path_factory.mktemp("w")) as world:
        yield world


def test_runs_that_are_killed_and_cut_off_come_to_the_same_weights_and_ask_for_nothing_twice(
    world: World, tmp_path: Path
) -> None:
    def make(number: int) -> Run:
        return Run(world, tmp_path / str(number), plan(number))

    done = asyncio.run(runs(make, range(2), _JOBS, print))
    assert [run.wrong for run in done] == [[], []]


def test_what_was_acknowledged_survives_a_power_cut_with_that_setting_and_not_without(
    world: World, tmp_path: Path
) -> None:
    def make(number: int) -> PowerCutRun:
        return PowerCutRun(world, tmp_path / str(number), 1, ("power", "process")[number])

    power, process = asyncio.run(runs(make, range(2), _JOBS, print))
    assert power.wrong == []
    assert process.lost != set()

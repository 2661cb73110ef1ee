"""`torchrun --nproc-per-node N -m gptfl_dist generate FILE`: the same set whatever N, and after a rank was killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from ranks import torchrun
from support import Command, Commands, wait_for

from gptfl_dist.run.cost import COST
from gptfl_dist.testing.federations import tiny_federation

LABELS = ["one", "two", "three"]
SHARDS = 24


def federation(folder: Path, pipeline: Path) -> Path:
    """120 images in shards of five, the batches of which fill none evenly."""
    generator = {"source": str(pipeline), "steps": 2, "batch_size": 2, "device": "cpu", "guidance": [1.0, 3.0]}
    return tiny_federation(
        folder,
        labels=LABELS,
        task={"size": 12, "channels": 1},
        synthesis={"generator": generator, "images_per_label": 40, "shard_size": 5},
    )


def generate(gptfl: Commands, ranks: int, path: Path) -> Command:
    return gptfl.start("generate", path, program=[*torchrun(ranks), "-m", "gptfl_dist"])


def files(path: Path) -> dict[str, bytes]:
    """The set, without what it took to make it."""
    found = sorted((path.parent / "synthetic").iterdir())
    return {each.name: each.read_bytes() for each in found if each.name != COST}


@pytest.fixture(scope="module")
def whole(text_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the set that one process makes."""
    commands = Commands(tmp_path_factory.mktemp("output"))
    path = federation(tmp_path_factory.mktemp("whole"), text_pipeline_folder)
    commands.run("generate", path)
    return files(path)


def test_two_ranks_make_the_set_of_one(
    gptfl: Commands, text_pipeline_folder: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    path = federation(tmp_path, text_pipeline_folder)
    command = generate(gptfl, 2, path)
    assert command.wait() == 0, command.stderr
    assert files(path) == whole
    assert command.stdout.splitlines() == [f"120 images in {tmp_path}/synthetic; {tmp_path}/run/synthetic.png"]
    assert command.stderr.count("generate: done, 120/120 images") == 1


@pytest.mark.parametrize(("victim", "ranks"), [("0", 1), ("1", 4)])
def test_any_number_of_ranks_finishes_what_a_killed_one_left(
    gptfl: Commands, text_pipeline_folder: Path, whole: dict[str, bytes], tmp_path: Path, victim: str, ranks: int
) -> None:
    path = federation(tmp_path, text_pipeline_folder)
    manifest = tmp_path / "synthetic" / "manifest.json"
    command = generate(gptfl, 2, path)
    wait_for(lambda: manifest.exists() and json.loads(manifest.read_text())["shards"])
    os.kill(command.rank(victim), signal.SIGKILL)
    assert command.wait(30) != 0
    command.wait_until_gone()
    assert 0 < len(json.loads(manifest.read_text())["shards"]) < SHARDS
    again = generate(gptfl, ranks, path)
    assert again.wait() == 0, again.stderr
    assert files(path) == whole


def test_an_error_of_a_rank_ends_the_job_with_its_message(gptfl: Commands, tmp_path: Path) -> None:
    path = federation(tmp_path, tmp_path / "no-pipeline")
    command = generate(gptfl, 2, path)
    assert command.wait(60) != 0
    assert "gptfl: rank 0: generator.source is" in command.stderr
    assert "gptfl_dist/synthesis" not in command.stderr  # torchrun prints a traceback of its own, we none
    command.wait_until_gone()

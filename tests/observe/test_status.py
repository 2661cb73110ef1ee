"""What an operator reads of a run, and what the coordinator's small file holds for it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from gptfl_dist.observe.live import LIVE, LiveFile, Standing, read_live
from gptfl_dist.observe.metrics import Expiries, registry_of
from gptfl_dist.observe.status import ArmStatus, RoundStatus, SiloStatus, Status, status_lines
from gptfl_dist.testing import clock

AT = "2025-11-03T03:00:00+00:00"


def silo(name: str, **changes: Any) -> SiloStatus:
    known = {"connected": True, "work": "training", "reason": "", "progress": 0.5, "behind": 0, "seen": AT}
    return SiloStatus(name, **known | changes)


def test_the_text_says_which_round_which_silo_and_what_to_do() -> None:
    status = Status(
        run="tiny",
        folder="run",
        state="running",
        at=AT,
        since="2025-11-03T02:00:00+00:00",
        pid=4711,
        stage="federate",
        round=RoundStatus("gptfl", 12, 40, "train", 48.2, 552.0),
        silos=[
            silo("north"),
            silo("south", connected=False, work="awaited", progress=None, behind=1, seen="2025-11-03T02:59:17+00:00"),
            silo("west", work="refused", reason="NaN", progress=None, behind=3, seen=None),
        ],
        arms=[ArmStatus("gptfl", 11, 40, False, None, 0.9, 7, 600.0, 2_000_000, 1_000_000)],
        seconds={"generate": 60.0, "tuning gptfl": 0.01},
        next=["south is missing"],
    )
    assert status_lines(status) == [
        "tiny: running since 2025-11-03 02:00:00 UTC (1 h 00 min), process 4711",
        "",
        "gptfl, round 12 of 40: silos train, 48 s so far, 9 min 12 s until its deadline",
        "",
        "silo   connection  behind    last heard  work",
        "north  connected   -         0.0 s ago   training 50 %",
        "south  missing     1 round   43 s ago    awaited",
        "west   connected   3 rounds  -           refused: NaN",
        "",
        "arm    rounds    best on validation data  time         down     up",
        "gptfl  11 of 40  90.0 % after round 7     10 min 00 s  2.00 MB  1.00 MB",
        "",
        "time of stages that are over: generate 1 min 00 s",
        "",
        "-> south is missing",
    ]


def test_a_silo_that_may_not_come_back_is_not_called_missing() -> None:
    silos = [SiloStatus(name, False, "idle", "", None, 0, None, revoked=name == "b") for name in "ab"]
    lines = status_lines(Status("t", "run", "running", AT, silos=silos))
    assert [line.split()[:2] for line in lines[-2:]] == [["a", "missing"], ["b", "revoked"]]
    text = generate_latest(registry_of(lambda: Status("t", "run", "running", AT, silos=silos), Expiries)).decode()
    for line in (
        "gptfl_silos 2.0",
        "gptfl_silos_missing 1.0",
        "gptfl_silos_revoked 1.0",
        'gptfl_silo_connected{silo="a"} 0.0',
    ):
        assert line in text.splitlines()
    assert 'gptfl_silo_connected{silo="b"}' not in text


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (Status("t", "run", "not started", AT), "t: not started"),
        (
            Status("t", "run", "running", AT, pid=7, stage="generate"),
            "t: running, process 7, making the synthetic images",
        ),
        (Status("t", "run", "failed", AT, since=AT, message="no quorum"), "  no quorum"),
        (
            Status("t", "run", "paused", AT, round=RoundStatus("gptfl", 41, 40, "paused", None, None)),
            "gptfl, after round 40: paused before it",
        ),
        (
            Status("t", "run", "running", AT, round=RoundStatus("gptfl", 1, 40, "gather", None, -3.0)),
            "gptfl, round 1 of 40: waiting for silos, its deadline has passed",
        ),
    ],
)
def test_every_state_is_told_in_a_line(status: Status, line: str) -> None:
    assert line in status_lines(status)


def test_the_live_file_is_written_at_most_once_a_second_and_at_the_end(tmp_path: Path) -> None:
    async def live() -> None:
        file = LiveFile(tmp_path, "first")
        assert read_live(tmp_path) is not None  # at once: an earlier coordinator's connections are not this one's
        file.stage("federate")
        file.stands(Standing("gptfl", 9, 1, "train", frozenset({"a"}), frozenset({"b"}), 60.0))
        for done in range(1, 100):
            file.progress("a", done, 100)
            file.heard("a")
        before = read_live(tmp_path)
        assert before is not None
        assert before.silos == {}
        clock.advance(1.0)
        await asyncio.sleep(0.01)
        now = read_live(tmp_path)
        assert now is not None
        assert (now.stage, now.arm, now.round, now.rounds, now.state) == ("federate", "gptfl", 1, 9, "train")
        assert (now.silos["a"].connected, now.silos["a"].done, now.silos["a"].total) == (True, 99, 100)
        assert now.deadline is not None
        assert [now.silos[name].revoked for name in "ab"] == [False, True]
        file.serves(True)
        file.done("a")
        file.stands(Standing("gptfl", 9, 1, "aggregate", frozenset(), frozenset(), None))
        file.close()

    clock.run(live())
    last = read_live(tmp_path)
    assert last is not None
    assert (last.state, last.deadline, last.silos["a"].connected, last.silos["a"].done) == (
        "aggregate",
        None,
        False,
        None,
    )
    assert last.serving
    assert not last.silos["b"].revoked
    assert [path.name for path in tmp_path.iterdir()] == [LIVE]

    async def again() -> None:
        LiveFile(tmp_path, "second")

    clock.run(again())
    taken_over = read_live(tmp_path)
    assert taken_over is not None
    assert taken_over.silos["a"].seen == last.silos["a"].seen
    assert taken_over.arm is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": 1}', json.dumps({"silos": {"a": {"x": 1}}})])
def test_a_live_file_that_cannot_be_understood_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / LIVE).write_text(content)
    assert read_live(tmp_path) is None


def test_a_full_disk_ends_no_run_for_the_sake_of_its_status(tmp_path: Path) -> None:
    (tmp_path / LIVE).mkdir()  # cannot be replaced by a file

    async def live() -> None:
        file = LiveFile(tmp_path, "first")
        file.stage("federate")
        file.close()

    clock.run(live())

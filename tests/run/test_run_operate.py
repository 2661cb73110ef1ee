"""`gptfl status`, `pause`, `resume`, `abort` and `export` beside real coordinators and silos, and after their end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from safetensors import safe_open
from support import RULES, Command, Commands, Federation, wait_for
from test_run_sides import Sides

from gptfl_dist.errors import ConfigError
from gptfl_dist.ledger.store import Ledger
from gptfl_dist.observe.live import LIVE
from gptfl_dist.observe.status import SiloStatus, Status
from gptfl_dist.run.operate import ask
from gptfl_dist.run.status import status_of

LONG = 200.0  # seconds, for a machine that is busy with other things
MAJORITY = {**RULES, "quorum": "majority"}


def silos_of(status: Status) -> dict[str, SiloStatus]:
    return {silo.name: silo for silo in status.silos}


def works(status: Status) -> dict[str, str]:
    return {silo.name: silo.work for silo in status.silos}


def killed(command: Command) -> None:
    """Ends a coordinator so that it can note nothing."""
    os.kill(command.process.pid, signal.SIGKILL)
    command.process.wait()


def paused(federation: Federation) -> Status | None:
    found = status_of(federation.path)
    return found if found.state == "paused" else None


def test_a_run_that_was_never_started_is_told_so_and_cannot_be_paused(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    mine = federation()
    found = gptfl.run("status", mine.path)
    assert "tiny: not started" in found.stdout
    assert not mine.run_folder.exists()
    asked = gptfl.start("pause", mine.path)
    assert asked.wait() == 2
    assert "no run was started here" in asked.stderr
    with pytest.raises(ConfigError, match="no run was started"):
        status_of(mine.folder)


def test_status_tells_who_is_missing_and_who_was_refused_live_and_after_a_kill_and_an_abort_is_kept_for_the_next_start(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    mine = federation(silos=3, epochs=40, federation=MAJORITY)
    sides = Sides(mine, gptfl)
    text = mine.path.read_text()
    mine.path.write_text(text.replace("- name: silo-2\n", "- name: silo-2\n  max_samples: 10\n"))
    coordinator = sides.coordinator()
    wait_for(lambda: "taking silos at" in coordinator.stderr, LONG)
    silos = {name: sides.silo(name) for name in mine.silos}
    wait_for(lambda: "silo-3" in mine.owed(1), LONG)
    silos["silo-3"].kill()

    expected = {"silo-1": "delivered", "silo-2": "refused", "silo-3": "awaited"}
    found = wait_for(lambda: (s := status_of(mine.path)) and works(s) == expected and s, LONG)
    assert (found.run, found.state, found.pid) == ("tiny", "running", coordinator.process.pid)
    missing = wait_for(lambda: (s := silos_of(status_of(mine.path))["silo-3"]).connected is False and s)
    assert missing.seen is not None
    found = status_of(mine.path)
    assert [silo.connected for silo in found.silos] == [True, True, False]
    assert "expected 1 to 10 (max_samples of this silo" in silos_of(found)["silo-2"].reason
    assert found.round is not None
    assert (found.round.arm, found.round.round, found.round.rounds) == ("fedavg_random", 1, 3)
    assert found.round.seconds_left is not None
    assert 0 < found.round.seconds_left <= 120
    told = gptfl.run("status", mine.path).stdout
    assert "fedavg_random, round 1 of 3: silos train" in told
    assert "-> silo-2 was refused (claims" in told
    assert "-> silo-3 is missing (last heard" in told

    killed(coordinator)
    found = status_of(mine.run_folder)
    assert (found.state, found.pid, works(found)) == ("killed", None, expected)
    assert {silo.connected for silo in found.silos} == {None}
    assert any("in round 1 of fedavg_random" in step for step in found.next)

    asked = gptfl.run("abort", mine.path, "--reason", "max_samples was a mistake", "--format", "json")
    assert json.loads(asked.stdout)["at_work"] is False
    again = sides.coordinator()
    assert again.wait() == 12
    assert "the run was aborted: max_samples was a mistake" in again.stderr
    assert "--fresh makes the run anew" in again.stderr
    found = status_of(mine.path)
    assert (found.state, found.message) == ("aborted", "max_samples was a mistake")
    resumed = gptfl.start("resume", mine.path)
    assert resumed.wait() == 2
    assert "was aborted" in resumed.stderr


def test_what_an_earlier_coordinator_wrote_is_not_taken_for_that_of_the_one_at_work(tmp_path: Path) -> None:
    silo = {"connected": True, "seen": "2025-11-03T02:00:00+00:00", "done": 1, "total": 2}
    live = {"pid": 1, "started": "2025-11-03T02:00:00+00:00", "state": "paused", "silos": {"silo-1": silo}}
    request = {"name": "tiny", "silos": [{"name": "silo-1"}], "federation": {"rounds": 3}, "tuning": {"rounds": 1}}
    with closing(Ledger(tmp_path, json.dumps(request))) as ledger:
        (tmp_path / LIVE).write_text(json.dumps({**live, "life": "of another"}))
        found = status_of(tmp_path)
        assert (found.state, found.pid, found.silos[0].connected) == ("running", None, None)
        assert found.silos[0].seen == silo["seen"]
        (tmp_path / LIVE).write_text(json.dumps({**live, "life": ledger.holder}))
        found = status_of(tmp_path)
        assert (found.state, found.pid, found.silos[0].connected) == ("running", 1, True)


def test_a_paused_run_stays_paused_over_a_kill_and_comes_to_the_same_end(
    gptfl: Commands, federation: Callable[..., Federation], undisturbed: Federation
) -> None:
    mine = federation()
    first = gptfl.start("run", mine.path)
    wait_for(lambda: mine.owed(1), LONG)
    assert ask(mine.path, "pause").at_work
    found = wait_for(lambda: paused(mine), LONG)
    assert found.round is not None
    following = found.round.round
    assert following in (2, 3, 4)  # 4 is the evaluation of the final weights
    assert found.arms[0].done == following - 1
    assert [silo.connected for silo in found.silos] == [True, True]
    killed(first)
    first.wait_until_gone()
    found = status_of(mine.path)
    assert found.state == "killed"
    assert "a pause is asked for" in found.message

    again = gptfl.start("run", mine.path)
    wait_for(lambda: (s := paused(mine)) and all(silo.connected for silo in s.silos), LONG)
    assert f"paused before round {following} of fedavg_random; gptfl resume ends that" in again.stderr
    assert mine.owed(following) == set()
    gptfl.run("resume", mine.path)
    assert again.wait() == 0, again.stderr
    assert mine.result() == undisturbed.result()
    found = status_of(mine.run_folder)
    assert found.state == "finished"
    (arm,) = found.arms
    assert (arm.done, arm.rounds, arm.finished) == (3, 3, True)
    late = gptfl.start("abort", mine.path)
    assert late.wait() == 2
    assert "is finished" in late.stderr


def test_an_abort_ends_coordinator_and_silos_and_leaves_the_models(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    mine = federation(epochs=100)
    sides = Sides(mine, gptfl)
    coordinator, silos = sides.coordinator(), [sides.silo(name) for name in mine.silos]
    wait_for(lambda: len(mine.owed(2)) == 2, LONG)
    gptfl.run("abort", mine.path, "--reason", "wrong\n labels")
    assert coordinator.wait() == 12
    assert "the run was aborted: wrong labels" in coordinator.stderr
    for silo in silos:
        assert silo.wait() == 0, silo.stderr
        assert silo.stderr.splitlines()[-1] == "the run was aborted: wrong labels"
    found = status_of(mine.path)
    assert found.state == "aborted"
    assert works(found) == dict.fromkeys(mine.silos, "recalled")
    out = mine.folder / "model.safetensors"
    gptfl.run("export", mine.path, "--round", "final", "--out", out)
    with safe_open(out, framework="np") as model:
        assert model.metadata() == {**model.metadata(), "arm": "fedavg_random", "round": "1"}
    assert sides.coordinator().wait() == 12


def test_a_run_under_mpi_is_paused_and_aborted_alike(gptfl: Commands, federation: Callable[..., Federation]) -> None:
    mine = federation()
    job = gptfl.mpi(3, "run", mine.path)
    wait_for(lambda: mine.owed(1), LONG)
    gptfl.run("pause", mine.path)
    found = wait_for(lambda: paused(mine), LONG)
    assert works(found) == dict.fromkeys(mine.silos, "idle")
    gptfl.run("abort", mine.path)
    assert job.wait() == 12
    assert "the run was aborted" in job.stderr
    job.wait_until_gone()


def test_a_status_that_is_watched_ends_with_the_run(gptfl: Commands, undisturbed: Federation) -> None:
    watched = gptfl.run("status", undisturbed.path, "--watch", "--format", "json")
    (line,) = watched.stdout.splitlines()
    told = json.loads(line)
    assert told["state"] == "finished"
    assert told["folder"] == str(undisturbed.run_folder)
    assert [silo["name"] for silo in told["silos"]] == undisturbed.silos
    text = gptfl.run("status", undisturbed.path).stdout
    assert f"-> read {Path(undisturbed.run_folder) / 'report.html'}" in text


def test_a_run_that_ended_early_says_so_in_summary_report_and_status(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    mine = federation(epochs=1, federation={**RULES, "max_time": "1ms", "keep": "all"})
    command = gptfl.run("run", mine.path)
    assert "fedavg_random ends after 1 of 3 rounds, as federation.max_time says" in command.stderr
    arm = mine.summary()["arms"]["fedavg_random"]
    assert (arm["rounds"], arm["stopped_by"]) == (1, "max_time")
    assert "for its time was over" in command.stdout
    assert "for its time was over" in (mine.run_folder / "report.html").read_text()
    (told,) = status_of(mine.path).arms
    assert (told.done, told.stopped_by) == (1, "max_time")
    out = mine.folder / "start.safetensors"
    gptfl.run("export", mine.path, "--round", "0", "--out", out)
    assert gptfl.run("run", mine.path).stdout == command.stdout  # also with what may be changed in mid-run
    mine.path.write_text(mine.path.read_text().replace("keep: all", "keep: best"))
    gptfl.run("run", mine.path)

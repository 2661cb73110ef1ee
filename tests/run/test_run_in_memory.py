"""`gptfl run FILE --exchange memory`: a whole federation in one process, to the weights that any wire gives."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Commands, Federation, wait_for

from gptfl_dist.errors import LaunchError


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    commands = Commands(tmp_path)
    yield commands
    commands.kill()


def test_it_is_one_process_and_its_weights_are_those_of_grpc(tmp_path: Path, commands: Commands) -> None:
    wired, one = Federation(tmp_path / "wired"), Federation(tmp_path / "one")
    command = commands.start("run", one.path, "--exchange", "memory")
    alive = wait_for(lambda: command.alive() if one.owed(2) or command.process.poll() is not None else None)
    assert command.wait() == 0, command.stderr
    assert len(alive) == 1
    assert "all in this process" in command.stderr
    commands.run("run", wired.path)
    assert one.result() == wired.result()
    assert one.summary()["transport"] == "memory"


def test_stopped_it_goes_on_in_the_round_that_it_was_in(tmp_path: Path, commands: Commands) -> None:
    stopped = Federation(tmp_path / "stopped", epochs=40)
    undisturbed = Federation(tmp_path / "undisturbed", epochs=40)
    commands.run("run", undisturbed.path, "--exchange", "memory")
    command = commands.start("run", stopped.path, "--exchange", "memory")
    wait_for(lambda: stopped.owed(2) or command.process.poll() is not None)
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 130, command.stderr
    assert "Traceback" not in command.stderr
    again = commands.run("run", stopped.path, "--exchange", "memory")
    assert "going on in round 2" in again.stderr
    assert stopped.result() == undisturbed.result()


def test_a_silo_with_a_script_of_its_own_is_refused_before_anything_starts(tmp_path: Path, commands: Commands) -> None:
    federation = Federation(tmp_path / "scripted")
    silo = federation.path.parent / "silo-1.yaml"
    silo.write_text("name: silo-1\ncode: {script: train.py}\n")
    (silo.parent / "train.py").write_text("")
    command = commands.start("run", federation.path, "--exchange", "memory")
    assert command.wait() == 2
    assert "silo silo-1 is trained by" in command.stderr
    assert "Traceback" not in command.stderr


def test_a_silo_that_encrypts_at_rest_is_refused_for_there_is_one_key(tmp_path: Path, commands: Commands) -> None:
    federation = Federation(tmp_path / "sealed")
    silo = federation.path.parent / "silo-1.yaml"
    silo.write_text(silo.read_text() + "at_rest: {key_env: SOME_KEY}\n")
    command = commands.start("run", federation.path, "--exchange", "memory")
    assert command.wait() == LaunchError.exit_code
    assert "at_rest is set in silo-1, and here all sides share processes" in command.stderr

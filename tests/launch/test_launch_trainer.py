"""An agent and its trainer: asked and answered, and each notices when the other is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptfl_dist import errors
from gptfl_dist.errors import DataError, GptflError, LaunchError, StorageError, TrainerError
from gptfl_dist.launch.channel import ENV, TrainerEnd, error_from_message, error_to_message
from gptfl_dist.launch.trainer import TrainerProcess, python_module

TRAINER = """
import os, subprocess, sys, time
from gptfl_dist.errors import DataError
from gptfl_dist.launch.channel import TrainerEnd, error_to_message
channel = TrainerEnd()
print("trainer up", flush=True)
while True:
    message = channel.receive()
    kind = message["type"]
    if kind == "train":
        for done in range(3):
            channel.send({"type": "progress", "done": done, "total": 3})
        channel.send({"type": "result", "value": message["value"], "pid": os.getpid()})
    elif kind == "bad data":
        channel.send(error_to_message(DataError("no images", hint="add some")))
    elif kind == "odd":
        channel.send({"type": "surprise"})
    elif kind == "crash":
        print("out of memory, says the trainer", file=sys.stderr, flush=True)
        os._exit(3)
    elif kind == "killed":
        os.kill(os.getpid(), 9)
    elif kind == "garbage":
        channel._line.socket.sendall(message["text"].encode() + b"\\n")
    elif kind == "slow":
        time.sleep(0.5)
        channel.send({"type": "result", "value": "late"})
    elif kind == "start":
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        channel.send({"type": "result", "pid": sleeper.pid})
        if message["end"]:
            os._exit(0)
"""


@pytest.fixture
def trainer(tmp_path):
    return TrainerProcess([sys.executable, "-c", TRAINER], tmp_path / "logs" / "trainer.log")


def play(trainer: TrainerProcess, scene):
    """Runs `scene` with the trainer started, in an event loop."""

    async def run():
        await trainer.start()
        try:
            return await scene()
        finally:
            await trainer.stop()

    return asyncio.run(asyncio.wait_for(run(), 60))


def test_a_question_is_answered_with_progress_on_the_way(trainer, tmp_path):
    told = []

    async def scene():
        first = await trainer.ask({"type": "train", "value": "é\n"}, "result", lambda *step: told.append(step))
        second = await trainer.ask({"type": "train", "value": 2}, "result")
        assert trainer.running
        return first, second

    first, second = play(trainer, scene)
    assert (first["value"], second["value"]) == ("é\n", 2)
    assert first["pid"] == second["pid"]
    assert told == [(0, 3), (1, 3), (2, 3)]
    assert not trainer.running
    assert "trainer up" in (tmp_path / "logs" / "trainer.log").read_text()


def test_an_error_arrives_as_the_same_class_and_the_trainer_goes_on(trainer):
    async def scene():
        with pytest.raises(DataError, match="no images") as error:
            await trainer.ask({"type": "bad data"}, "result")
        assert error.value.hint == "add some"
        return await trainer.ask({"type": "train", "value": 1}, "result")

    assert play(trainer, scene)["value"] == 1


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_of_ours_crosses_the_line(name):
    kind = getattr(errors, name)
    if not issubclass(kind, GptflError):
        return
    back = error_from_message(error_to_message(kind("what", hint="do")))
    assert (type(back), back.message, back.hint) == (kind, "what", "do")


@pytest.mark.parametrize("kind", ["Interrupted", "annotations", "__name__", "KeyError", "", 3, None])
def test_no_other_class_can_be_named(kind):
    assert type(error_from_message({"type": "failed", "kind": kind, "message": "m"})) is TrainerError


@pytest.mark.parametrize(("kind", "how"), [("crash", "ended with code 3"), ("killed", "was killed by signal 9")])
def test_a_trainer_that_dies_leaves_its_last_words(trainer, kind, how):
    async def scene():
        with pytest.raises(TrainerError, match=how) as error:
            await trainer.ask({"type": kind}, "result")
        assert "trainer.log" in error.value.hint
        assert not trainer.running
        await trainer.stop()
        await trainer.start()
        answer = await trainer.ask({"type": "train", "value": "again"}, "result")
        return error.value, answer

    error, answer = play(trainer, scene)
    assert ("out of memory, says the trainer" in error.message) == (kind == "crash")
    assert answer["value"] == "again"


def test_another_answer_than_the_expected_one_is_an_error(trainer):
    async def scene():
        with pytest.raises(TrainerError, match="answered 'surprise', expected 'result'"):
            await trainer.ask({"type": "odd"}, "result")

    play(trainer, scene)


@pytest.mark.parametrize("text", ["no json", "[]", "3", "{}", '{"kind": 1}'])
def test_what_is_no_message_ends_the_trainer_and_not_the_agent(trainer, text):
    async def scene():
        with pytest.raises(TrainerError, match="no message"):
            await trainer.ask({"type": "garbage", "text": text}, "result")
        assert not trainer.running

    play(trainer, scene)


def test_an_answer_that_is_not_waited_for_is_not_taken_for_the_next(trainer):
    async def scene():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(trainer.ask({"type": "slow"}, "result"), 0.1)
        assert not trainer.running
        await trainer.start()
        return await trainer.ask({"type": "train", "value": "mine"}, "result")

    assert play(trainer, scene)["value"] == "mine"


def test_a_command_that_does_not_exist_is_a_launch_error(tmp_path):
    async def start(command, cwd=None):
        await TrainerProcess(command, tmp_path / "log", cwd).start()

    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(LaunchError, match="no-such-program: No such file"):
        asyncio.run(start([str(tmp_path / "no-such-program")]))
    with pytest.raises(LaunchError, match="Permission denied"):
        asyncio.run(start([str(tmp_path)]))
    with pytest.raises(LaunchError, match="no-such-folder"):
        asyncio.run(start([sys.executable], tmp_path / "no-such-folder"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_log_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        asyncio.run(TrainerProcess([sys.executable], tmp_path / "file" / "log").start())


AGENT = """
import asyncio, sys
from pathlib import Path
from gptfl_dist.launch.trainer import TrainerProcess
async def main():
    trainer = TrainerProcess([sys.executable, "-c", sys.argv[1]], Path(sys.argv[2]))
    await trainer.start()
    answer = await trainer.ask({"type": "train", "value": 0}, "result")
    print(answer["pid"], flush=True)
    await trainer.ask({"type": sys.argv[3]}, "result")
asyncio.run(main())
"""


def test_a_trainer_ends_when_its_agent_is_killed_in_mid_training(tmp_path):
    busy = TRAINER.replace("time.sleep(0.5)", "time.sleep(600)")
    command = [sys.executable, "-c", AGENT, busy, str(tmp_path / "log"), "slow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        os.kill(pid, 0)
        agent.send_signal(signal.SIGKILL)
    wait_until_gone(pid)


@pytest.mark.parametrize("ends_first", [False, True])
def test_what_a_trainer_started_ends_with_it(trainer, ends_first):
    async def scene():
        answer = await trainer.ask({"type": "start", "end": ends_first}, "result")
        os.kill(answer["pid"], 0)
        if ends_first:
            await trainer.finish({"type": "finish"})
        return answer["pid"]

    wait_until_gone(play(trainer, scene))


def wait_until_gone(pid: int) -> None:
    """A killed process may stay a zombie for as long as nobody reaps it."""
    status, end = Path(f"/proc/{pid}/stat"), time.monotonic() + 30
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, f"process {pid} lives on"
        time.sleep(0.02)


def test_a_program_that_no_agent_started_is_told_so(monkeypatch):
    monkeypatch.delenv(ENV, raising=False)
    with pytest.raises(LaunchError, match="not started by a silo's agent"):
        TrainerEnd()


def test_a_module_of_ours_runs_under_this_interpreter():
    assert python_module("a.b") == [sys.executable, "-m", "a.b"]

"""A trainer that is still busy with imports or data, and so deaf to its agent, ends with the agent all the same."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from support import wait_for

from gptfl_dist.launch.channel import ENV

_AGENT = """
import asyncio, sys
from pathlib import Path
from gptfl_dist.launch.trainer import TrainerProcess

async def main():
    trainer = TrainerProcess([sys.executable, "-c", "import time; time.sleep(600)"], Path(sys.argv[1]) / "trainer.log")
    await trainer.start()
    print(trainer._process.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_a_trainer_that_does_not_listen_ends_with_its_killed_agent(tmp_path: Path) -> None:
    agent = subprocess.Popen([sys.executable, "-c", _AGENT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    trainer = Path("/proc") / agent.stdout.readline().strip()
    wait_for(lambda: b"sleep(600)" in (trainer / "cmdline").read_bytes())
    os.kill(agent.pid, signal.SIGKILL)
    agent.wait()
    agent.stdout.close()
    wait_for(lambda: not (trainer / "cmdline").exists() or not (trainer / "cmdline").read_bytes(), 10)


_TRAINER = """
from gptfl_dist.launch.channel import TrainerEnd

trainer = TrainerEnd()
trainer.send({"type": "progress", "done": 1, "total": 2})
trainer.receive()
"""


def test_a_trainer_ends_with_its_agent_even_if_its_last_word_was_not_read() -> None:
    """The socket then reports a reset and not its end."""
    ours, theirs = socket.socketpair()
    environment = {**os.environ, ENV: str(theirs.fileno())}
    trainer = subprocess.Popen([sys.executable, "-c", _TRAINER], env=environment, pass_fds=(theirs.fileno(),))
    theirs.close()
    assert ours.recv(1, socket.MSG_PEEK)
    ours.close()
    try:
        assert trainer.wait(10) == 1
    finally:
        trainer.kill()
        trainer.wait()

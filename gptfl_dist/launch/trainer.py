"""An agent's hold on its trainer process: started when needed, asked one thing at a time, killed if it must be."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from gptfl_dist.errors import LaunchError, TrainerError, TrainerLost
from gptfl_dist.files import storage_error
from gptfl_dist.launch import bound
from gptfl_dist.launch.base import Progress, unheard
from gptfl_dist.launch.channel import ENV, LONGEST_MESSAGE, encode, error_from_message
from gptfl_dist.launch.folder import Message
from gptfl_dist.learning.group import outside

TIME_TO_END = 30.0  # seconds that a trainer has after the federation, to save its model for example
_TAIL = 2000  # bytes of a dead trainer's output that are shown


class TrainerProcess:
    """Starts `command` with a channel; `ask` sends a message and waits for the answer.

    The output of the process goes to `log`. Errors call it by its `role`.
    """

    def __init__(self, command: Sequence[str], log: Path, cwd: Path | None = None, role: str = "trainer") -> None:
        self._command = command
        self._log = log
        self._cwd = cwd
        self._role = role
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._cleared: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, run: str = "") -> None:
        """Raises LaunchError if the command cannot be run."""
        try:
            self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            log = self._log.open("ab")
        except OSError as error:
            raise storage_error(error, self._log) from None
        ours, theirs = socket.socketpair()
        try:
            require_program(self._command[0])
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-IS", bound.__file__, str(os.getpid())),
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._cwd,
                env={**outside(os.environ), ENV: str(theirs.fileno())},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise LaunchError(f"cannot start {error.filename or self._command[0]}: {error.strerror}") from None
        finally:
            theirs.close()
            log.close()
        self._cleared = asyncio.create_task(self._clear(self._process))
        self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=LONGEST_MESSAGE)

    async def ask(self, message: Message, answer: str, progress: Progress = unheard) -> Message:
        """Sends a message and waits for the answer of this type; progress on the way is passed on.

        Raises the error that the trainer met, TrainerLost if the process was killed (as for want of memory) or ended
        as one that is done, or TrainerError if it ended otherwise or sent what is no message. A trainer whose answer is
        not waited for any more (the call is cancelled) is killed: the next call would take that answer for its own.
        """
        assert self._reader is not None
        assert self._writer is not None
        assert self._process is not None
        process = self._process
        try:
            self._writer.write(encode(message))
            await self._writer.drain()
            while line := await self._reader.readline():
                received = _decode(line)
                if received["type"] == "progress":
                    progress(received["done"], received["total"])
                elif received["type"] == "failed":
                    raise error_from_message(received)
                elif received["type"] == answer:
                    return received
                else:
                    raise TrainerError(f"the {self._role} answered {received['type']!r}, expected {answer!r}")
        except ConnectionError:
            pass
        except ValueError:  # also what a line longer than the limit raises
            await self.stop()
            raise TrainerError(f"the {self._role} sent what is no message", hint=f"see {self._log}") from None
        except asyncio.CancelledError:
            await self.stop()
            raise
        code = await process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        # A script whose own loop is over ends by itself, as it did before it was a silo's: it can begin anew.
        kind = TrainerLost if code <= 0 else TrainerError
        raise kind(f"the {self._role} {how} before it answered\n{last_words(self._log)}", hint=f"see {self._log}")

    async def finish(self, message: Message) -> None:
        """Sends a last message and gives the trainer time to end by itself."""
        if not self.running:
            return
        assert self._writer is not None
        assert self._process is not None
        with contextlib.suppress(ConnectionError, TimeoutError):
            self._writer.write(encode(message))
            await self._writer.drain()
            await asyncio.wait_for(self._process.wait(), TIME_TO_END)

    async def stop(self) -> None:
        """Kills the trainer and what it started: it holds nothing that is not on disk."""
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            assert self._cleared is not None
            if self._process.returncode is None:
                _kill_group(self._process.pid)
            await self._cleared
        self._process = None

    async def _clear(self, process: asyncio.subprocess.Process) -> None:
        """Ends what a trainer started as soon as it has ended itself: later its number may be another's."""
        await process.wait()
        _kill_group(process.pid)


def last_words(path: Path) -> str:
    """The end of a trainer's output."""
    with contextlib.suppress(OSError), path.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL))
        return log.read().decode(errors="replace").strip()
    return ""


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _decode(line: bytes) -> Message:
    """Raises ValueError where the line is no message."""
    message = json.loads(line)
    if not isinstance(message, dict) or "type" not in message:
        raise ValueError(line[:80])
    return message


def require_program(name: str) -> None:
    """Raises the OSError that running it would: `bound` could tell it to nobody."""
    if shutil.which(name) is None:
        Path(name).stat()
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)


def python_module(module: str) -> list[str]:
    """The command that runs a module of ours with this interpreter."""
    return [sys.executable, "-m", module]

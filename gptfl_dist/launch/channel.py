"""The line between an agent and its trainer: JSON messages over a socket pair, or through a folder (`folder`).

The trainer's end is found through the environment, which names a descriptor or a folder, so a script of the user's own
can take it up (`gptfl_dist.join`). A thread reads the socket, so that a trainer notices in mid-training that its agent
is gone, and ends; with a folder a `guard` beside the trainer does that.
"""

from __future__ import annotations

import json
import math
import os
import queue
import socket
import threading
import time
from pathlib import Path
from typing import Protocol

from gptfl_dist import errors
from gptfl_dist.errors import GptflError, LaunchError, TrainerError
from gptfl_dist.launch.folder import Message, await_files, pauses, trainer_line

ENV = "GPTFL_CHANNEL"
LONGEST_MESSAGE = 64 << 20
_PROGRESS_EVERY = 1.0  # seconds between two files that say how far a training is


def encode(message: Message) -> bytes:
    """One line of JSON."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def error_to_message(error: GptflError) -> Message:
    return {"type": "failed", "kind": type(error).__name__, "message": error.message, "hint": error.hint}


def error_from_message(message: Message) -> GptflError:
    """The error that a trainer met, as the same class."""
    kind = getattr(errors, str(message.get("kind")), None)
    if not (isinstance(kind, type) and issubclass(kind, GptflError)):
        kind = TrainerError
    return kind(str(message.get("message")), hint=str(message.get("hint", "")))


class TrainerEnd:
    """The trainer's end of the line."""

    def __init__(self) -> None:
        """Takes the line up. Raises LaunchError if this process was not started by an agent."""
        where = os.environ.pop(ENV, None)
        if where is None:
            raise LaunchError(
                "this program was not started by a silo's agent",
                hint="name it under code.script of the silo file and start it with: gptfl silo SILO_FILE, or "
                "gptfl run FEDERATION_FILE",
            )
        self._line: _Line = _SocketLine(int(where)) if where.isdecimal() else _FolderLine(Path(where))

    def receive(self) -> Message:
        """Waits for the next message."""
        message = self.receive_within(None)
        assert message is not None
        return message

    def receive_within(self, seconds: float | None) -> Message | None:
        """The next message; None where there is none for so long."""
        return self._line.receive(seconds)

    def send(self, message: Message) -> None:
        self._line.send(message)


class _Line(Protocol):
    def receive(self, within: float | None) -> Message | None: ...

    def send(self, message: Message) -> None: ...


class _SocketLine:
    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)
        self.socket.set_inheritable(False)  # a process that outlives the trainer would keep the agent waiting
        self._incoming: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="channel", daemon=True).start()

    def receive(self, within: float | None) -> Message | None:
        try:
            return self._incoming.get(timeout=within)
        except queue.Empty:
            return None

    def send(self, message: Message) -> None:
        self.socket.sendall(encode(message))

    def _read(self) -> None:
        try:
            with self.socket.makefile("rb") as lines:
                for line in lines:
                    self._incoming.put(json.loads(line))
        finally:
            os._exit(1)  # the agent is gone: the stream ended, or was reset where the agent had not read all of it


class _FolderLine:
    def __init__(self, folder: Path) -> None:
        self._files = trainer_line(folder)
        self._told = -_PROGRESS_EVERY  # when a progress was told last

    def receive(self, within: float | None) -> Message | None:
        """Raises StorageError where the files that a message speaks of do not come."""
        deadline = math.inf if within is None else time.monotonic() + within
        pause = pauses()
        while (message := self._files.take()) is None:
            if time.monotonic() > deadline:
                return None
            time.sleep(next(pause))
        await_files(message)
        return message

    def send(self, message: Message) -> None:
        if message["type"] == "progress":
            if time.monotonic() - self._told < _PROGRESS_EVERY:
                return
            self._told = time.monotonic()
        self._files.send(message)

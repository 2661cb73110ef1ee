"""The line between an agent and the trainer process that it starts: JSON messages over a socket pair.

The trainer's end is found through the environment, so a script of the user's own can take it up (`gptfl_dist.join`).
A thread reads it, so that a trainer notices in mid-training that its agent is gone, and ends.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
from typing import Any

from gptfl_dist import errors
from gptfl_dist.errors import GptflError, LaunchError, TrainerError

ENV = "GPTFL_CHANNEL"
LONGEST_MESSAGE = 64 << 20

Message = dict[str, Any]


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
        fd = os.environ.pop(ENV, None)
        if fd is None:
            raise LaunchError(
                "this program was not started by a silo's agent",
                hint="name it under code.script of the silo file and start it with: gptfl silo SILO_FILE, or "
                "gptfl run FEDERATION_FILE",
            )
        self._socket = socket.socket(fileno=int(fd))
        self._socket.set_inheritable(False)  # a process that outlives the trainer would keep the agent waiting
        self._incoming: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="channel", daemon=True).start()

    def receive(self) -> Message:
        """Waits for the next message."""
        return self._incoming.get()

    def receive_within(self, seconds: float | None) -> Message | None:
        """The next message; None where there is none for so long."""
        try:
            return self._incoming.get(timeout=seconds)
        except queue.Empty:
            return None

    def send(self, message: Message) -> None:
        self._socket.sendall(encode(message))

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                for line in lines:
                    self._incoming.put(json.loads(line))
        finally:
            os._exit(1)  # the agent is gone: the stream ended, or was reset where the agent had not read all of it

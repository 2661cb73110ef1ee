"""The line between an agent and a trainer on another machine: files in a folder that both see, one folder a launch.

    session/agent-000001.json     what the agent says; trainer-000001.json what the trainer says, each in order
    session/weights-1.safetensors, update-1.safetensors     named with their digests in the messages; likewise kept-1
                                  and keep-1, what the silo kept of its last update and keeps of this one, and
                                  samples-1, the synthetic samples that it was given
    session/lease                 renewed by the agent; whoever finds it unchanged for too long ends (`guard`)
    session/exit-0                how the process of a rank ended

A file appears by a rename, when it is whole; a message is known by its digest, weights and updates by theirs. So what
a network file system shows late, or in part, is not there yet. What a trainer of an earlier launch still writes goes
to a folder that nobody reads.

Nothing is watched (inotify sees no other machine's changes): readers look again with growing pauses. They open by
name, after opening the folder: NFS may answer from memory that a name does not exist, but asks the server for the
attributes of a folder that is opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from gptfl_dist.errors import GptflError, StorageError
from gptfl_dist.files import replacing, storage_error, write_at
from gptfl_dist.weights import WeightsFile, overwrite_weights, write_weights
from gptfl_dist.weights.file import blocks

LEASE = "lease"
EXIT = "exit-"
IN, OUT = ("weights", "kept", "samples"), ("update", "keep")
"""What in a message to the trainer is the path of a file that it reads, or that it is to write."""


def digest_name(name: str) -> str:
    """Under which a message says the digest of one of its files; that of the update is the answer's `digest`."""
    return "digest" if name == "update" else f"{name}_digest"


VISIBLE_WITHIN = 60.0  # seconds until a file that was announced must be seen whole; NFS remembers for up to 60
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0

Message = dict[str, Any]


def pauses() -> Iterator[float]:
    """Seconds to wait between two looks, growing."""
    pause = _FIRST_PAUSE
    while True:
        yield pause
        pause = min(1.5 * pause, _LONGEST_PAUSE)


class FolderLine:
    """One end: sends numbered messages and takes those of the other end, in order."""

    def __init__(self, folder: Path, own: str, other: str) -> None:
        self._folder = folder
        self._own, self._other = own, other
        self._sent = self._taken = 0

    def send(self, message: Message) -> None:
        """Raises StorageError."""
        self._sent += 1
        body = json.dumps(message, separators=(",", ":")).encode()
        _write(self._path(self._own, self._sent), blake3(body).hexdigest().encode() + b"\n" + body)

    def take(self) -> Message | None:
        """The next message, if it is there and whole. Raises ValueError where it is no message."""
        look_again(self._folder)
        try:
            digest, _, body = self._path(self._other, self._taken + 1).read_bytes().partition(b"\n")
        except OSError:
            return None
        if blake3(body).hexdigest().encode() != digest:
            return None
        self._taken += 1
        message = json.loads(body)
        if not isinstance(message, dict) or "type" not in message:
            raise ValueError(body[:80])
        return message

    def _path(self, end: str, number: int) -> Path:
        return self._folder / f"{end}-{number:06d}.json"


def agent_line(folder: Path) -> FolderLine:
    return FolderLine(folder, "agent", "trainer")


def trainer_line(folder: Path) -> FolderLine:
    return FolderLine(folder, "trainer", "agent")


def look_again(folder: Path) -> None:
    """Makes a network file system ask anew what is in the folder."""
    with contextlib.suppress(OSError):
        os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


class Session:
    """The agent's side of one launch: a fresh folder, its lease, and the files that go with the messages."""

    def __init__(self, parent: Path) -> None:
        """Raises StorageError."""
        self.folder = parent / uuid.uuid4().hex[:12]
        try:
            self.folder.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise storage_error(error, self.folder) from None
        self._line = agent_line(self.folder)
        self._renewed = self._orders = 0
        self.renew()

    def renew(self) -> None:
        """Shows that the agent lives. Raises StorageError."""
        self._renewed += 1
        _write(self.folder / LEASE, str(self._renewed).encode())

    def send(self, message: Message) -> Message:
        """Sends a message; its files are copied, and its answer's asked for, in the folder. Returns what was sent."""
        self._orders += 1
        placed = {name: self.folder / f"{name}-{self._orders}.safetensors" for name in (*IN, *OUT) if name in message}
        digests = {digest_name(name): _copy(Path(message[name]), placed[name]) for name in IN if name in message}
        message = {**message, **{name: str(path) for name, path in placed.items()}, **digests}
        self._line.send(message)
        return message

    def take(self) -> Message | None:
        return self._line.take()

    def bring(self, asked: Message, sent: Message, answer: Message) -> None:
        """Copies the files that an answer speaks of to where they were asked for. Raises StorageError."""
        for name in OUT:
            if answer.get(digest_name(name)):
                self._bring(name, Path(sent[name]), answer[digest_name(name)], Path(asked[name]))

    def _bring(self, name: str, source: Path, digest: str, target: Path) -> None:
        deadline = time.monotonic() + VISIBLE_WITHIN
        for pause in pauses():
            found = "is not there"
            with contextlib.suppress(GptflError), WeightsFile(source) as file:
                if overwrite_weights(target, file.layout, blocks(file, file.nbytes)) == digest:
                    return
                found = "has another digest than the trainer said"
            if time.monotonic() > deadline:
                raise StorageError(
                    f"the {name} {source} {found} after {VISIBLE_WITHIN:g} s",
                    hint="launch.folder must be one folder of one file system for the agent and the trainer",
                )
            time.sleep(pause)
            look_again(self.folder)

    def clear(self, sent: Message) -> None:
        """Removes the files of a message that was answered."""
        for name in (*IN, *OUT):
            if name in sent:
                with contextlib.suppress(OSError):
                    Path(sent[name]).unlink(missing_ok=True)

    def exits(self) -> dict[int, int]:
        """The exit code by rank of the processes that ended."""
        look_again(self.folder)
        found = {}
        for path in self.folder.glob(f"{EXIT}*"):
            with contextlib.suppress(OSError, ValueError):
                found[int(path.name.removeprefix(EXIT))] = int(path.read_text())
        return found

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def await_files(message: Message) -> None:
    """In the trainer: returns once the files of a message are here and whole. Raises StorageError."""
    for name in IN:
        if name in message:
            _await(name, Path(message[name]), message[digest_name(name)])


def _await(name: str, path: Path, digest: str) -> None:
    deadline = time.monotonic() + VISIBLE_WITHIN
    for pause in pauses():
        with contextlib.suppress(GptflError), WeightsFile(path) as file:
            if file.digest() == digest:
                return
        if time.monotonic() > deadline:
            raise StorageError(
                f"the {name} {path} are not here, or not whole, after {VISIBLE_WITHIN:g} s",
                hint="launch.folder must be one folder of one file system for the agent and the trainer",
            )
        time.sleep(pause)
        look_again(path.parent)


def _copy(source: Path, target: Path) -> str:
    with WeightsFile(source) as file:
        return write_weights(target, file.layout, blocks(file, file.nbytes), durable=False)


def _write(path: Path, content: bytes) -> None:
    with replacing(path, durable=False) as fd:
        write_at(fd, 0, memoryview(content))

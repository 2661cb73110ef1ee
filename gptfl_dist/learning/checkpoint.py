"""Where a training keeps its state, to go on from when it is started again: one safetensors file, replaced in one step.

It belongs to one training, named by everything that decides its result; of another one it is as if it were not there.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from gptfl_dist.files import storage_error, write_file
from gptfl_dist.weights.sealed import seal, unsealed

_log = logging.getLogger(__name__)
_FACTS = "facts"

State = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Tensors by name (none is named `facts`), and what JSON can hold."""


class Checkpoint:
    """The file at `path`, of the training that `identity` names."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._identity = identity

    def write(self, state: State) -> None:
        """Replaces what is there. Raises StorageError."""
        tensors, facts = state
        text = json.dumps({"identity": self._identity, **facts}).encode()
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        content = save({**copies, _FACTS: torch.frombuffer(bytearray(text), dtype=torch.uint8)})
        write_file(self._path, seal(content))

    def read(self) -> bytes:
        """The file's content; nothing where there is none of this training. Raises StorageError."""
        try:
            content = unsealed(self._path.read_bytes(), self._path)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise storage_error(error, self._path) from None
        try:
            _, facts = unpack(content)
        except (SafetensorError, ValueError, KeyError):
            _log.warning("%s is damaged: the training begins anew", self._path)
            return b""
        return content if facts["identity"] == self._identity else b""

    def remove(self) -> None:
        """Once the training's result is kept elsewhere. Raises StorageError."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, self._path) from None


def unpack(content: bytes) -> State:
    """The state in a checkpoint's content."""
    tensors = load(content)
    facts: dict[str, Any] = json.loads(tensors.pop(_FACTS).numpy().tobytes())
    return tensors, facts

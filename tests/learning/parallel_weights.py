"""What `parallel_program.py` comes to, as one rank or one of several."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file

_PROGRAM = str(Path(__file__).with_name("parallel_program.py"))
Weights = dict[str, torch.Tensor]


def weights_of(launcher: list[str], path: Path, device: str) -> Weights:
    """Starts the program by the launcher; it writes its file to `path`."""
    command = [*launcher, _PROGRAM, str(path), device]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    return load_file(path)

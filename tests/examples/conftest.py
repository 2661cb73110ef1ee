"""Copies of the examples, so that the tree stays clean."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(tmp_path: Path) -> Callable[..., Path]:
    """Copies an example with its data prepared, and changes its texts: `file name, what stands there, what shall`.

    `arguments` are those of its prepare.py.
    """

    def copy(name: str, *changes: tuple[str, str, str], arguments: Sequence[str] = ()) -> Path:
        folder = tmp_path / name
        shutil.copytree(
            EXAMPLES / name, folder, ignore=shutil.ignore_patterns("data", "run", "synthetic", "__pycache__")
        )
        for file, old, new in changes:
            text = (folder / file).read_text()
            assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
            (folder / file).write_text(text.replace(old, new))
        command = [sys.executable, "prepare.py", *arguments]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
        return folder

    return copy

"""What the studies have in common: data and an experiment file in a folder, then `gptfl experiment`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_study(folder: Path, content: dict[str, Any], write_data: Callable[[Path], None], workers: int | None) -> None:
    """Writes the data once, the experiment file each time, and runs it; what is finished is not run again."""
    data = folder / "train.npz"
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_data(folder)
    (folder / "experiment.yaml").write_text(json.dumps(content, indent=1) + "\n")
    command = [sys.executable, "-m", "gptfl_dist", "experiment", str(folder / "experiment.yaml")]
    if workers is not None:
        command += ["--workers", str(workers)]
    sys.exit(subprocess.run(command, check=False).returncode)

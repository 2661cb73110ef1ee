"""The demo's federation with other settings, for `codecs.py` and `agreement.py`, which compare such runs.

Every run has its file and its run folder beside those of the others, whose synthetic set it uses.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gptfl_dist.run.candidates import PRETRAINED_FACTS, PRETRAINED_WEIGHTS


def run_variant(
    folder: Path,
    name: str,
    settings: dict[str, Any],
    *,
    start_of: str | None,
    exchange: str = "grpc",
    launcher: Sequence[str] = (sys.executable,),
) -> dict[str, Any]:
    """The summary of a run to its end of a federation file's settings; an interrupted one goes on.

    It starts from the pre-trained weights of the run `start_of`, whose settings before the rounds are the same, or
    pre-trains its own where that is None.
    """
    run_folder = folder / "runs" / name
    source = None if start_of is None else folder / "runs" / start_of
    if source is not None:
        _adopt(source, run_folder)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**settings, "run_folder": os.path.relpath(run_folder, folder)}, sort_keys=False))
    subprocess.run([*launcher, "-m", "gptfl_dist", "run", str(path), "--exchange", exchange], check=True)
    if source is not None and _pretrained(source) != _pretrained(run_folder):
        sys.exit(f"{run_folder} was pre-trained anew, so it does not compare with {source}: delete it and start again")
    summary: dict[str, Any] = json.loads((run_folder / "summary.json").read_text())
    return summary


def _pretrained(run_folder: Path) -> bytes:
    return (run_folder / PRETRAINED_WEIGHTS).read_bytes()


def _adopt(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in (PRETRAINED_WEIGHTS, PRETRAINED_FACTS):
        if not (target / name).exists():
            shutil.copyfile(source / name, target / name)

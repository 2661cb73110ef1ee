"""What of a federation file makes a run another run, as a text that is the same wherever the file lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptfl_dist.config.federation import FederationFile


def request_of(path: Path, file: FederationFile) -> str:
    """All of the federation file at `path` but where the run lies, how it is reached, what it survives and keeps.

    What lies beside the file is named from there, so a run that is moved together with it is the same run.
    """
    content = file.model_dump(mode="json", exclude={"run_folder", "durability", "exchange", "enrolment", "at_rest"})
    del content["synthesis"]["folder"]  # what lies there is known by its digests
    del content["federation"]["keep"], content["federation"]["join_deadline"], content["collective"]["trust"]
    for silo in content["silos"]:
        del silo["file"]
    return json.dumps(from_folder(content, path.absolute().parent), sort_keys=True)


def from_folder(content: Any, folder: Path) -> Any:
    """Settings in which every path below a folder is relative to it."""
    if isinstance(content, dict):
        return {key: from_folder(value, folder) for key, value in content.items()}
    if isinstance(content, list):
        return [from_folder(value, folder) for value in content]
    below = f"{folder.absolute()}/"
    return f"./{content.removeprefix(below)}" if isinstance(content, str) and content.startswith(below) else content

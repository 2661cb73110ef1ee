"""What of a federation file makes a run another run, as a text that is the same wherever the file lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptfl_dist.config.federation import FederationFile

MAY_CHANGE = frozenset(
    {
        "run_folder", "synthesis.folder", "silos.file", "durability", "exchange", "enrolment", "at_rest",
        "collective.trust", "federation.keep", "federation.join_deadline", "federation.diversity",
    }
)  # fmt: skip
"""The settings that leave a run the same run, listed in docs/reference.md: where it lies, how it is reached, what it
survives, keeps and measures. What lies in a folder is known by its digests."""


def request_of(path: Path, file: FederationFile) -> str:
    """All of the federation file at `path` but what `MAY_CHANGE`, and what no arm uses.

    What lies beside the file is named from there, so a run that is moved together with it is the same run.
    """
    content = file.model_dump(mode="json")
    for setting in MAY_CHANGE:
        section, _, name = setting.rpartition(".")
        holder = content[section] if section else content
        for each in holder if isinstance(holder, list) else [holder]:
            del each[name]
    if not file.synthesises:
        del content["synthesis"], content["pretraining"]
    return json.dumps(from_folder(content, path.absolute().parent), sort_keys=True)


def from_folder(content: Any, folder: Path) -> Any:
    """Settings in which every path below a folder is relative to it."""
    if isinstance(content, dict):
        return {key: from_folder(value, folder) for key, value in content.items()}
    if isinstance(content, list):
        return [from_folder(value, folder) for value in content]
    below = f"{folder.absolute()}/"
    return f"./{content.removeprefix(below)}" if isinstance(content, str) and content.startswith(below) else content

"""Notes of the null programs: one line of JSON each, with its moment, in the file that NULL_MARKS names."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


def mark(**facts: Any) -> None:
    with Path(os.environ["NULL_MARKS"]).open("a") as marks:
        marks.write(json.dumps({"time": time.time(), "pid": os.getpid(), **facts}) + "\n")


def read_marks(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]

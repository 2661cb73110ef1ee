"""One rank: calls everything of its group and writes what it got to FOLDER/RANK.json.

group_program.py FOLDER [die]       `die`: rank 1 ends before the last call
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch

from gptfl_dist.errors import ConfigError
from gptfl_dist.learning.group import open_group

folder = Path(sys.argv[1])
group = open_group(timedelta(minutes=2))
tensor = torch.arange(3) + group.rank
group.copy(tensor)
got = {
    "size": group.size,
    "told": group.tell({"by": group.rank} if group.leader else None),
    "shared": group.share(b"bytes" if group.leader else None).decode(),
    "nothing": group.share(b"" if group.leader else None).decode(),
    "gathered": [part.decode() for part in group.gather(b"x" * group.rank)],
    "sum": group.sum(torch.tensor([1.5, group.rank])).tolist(),
    "copy": tensor.tolist(),
    "threads": group.threads(0),
    "device": group.device("auto"),
}
try:
    group.device("cuda:1")
except ConfigError as error:
    got["refused"] = error.message
(folder / f"{group.rank}.json").write_text(json.dumps(got))
if "die" in sys.argv:
    if group.rank == 1:
        os._exit(7)
    group.sum(torch.ones(1))
group.close()

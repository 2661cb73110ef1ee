"""Seeds, and the settings under which torch gives the same bits again.

Every random draw of a run is seeded by what it is for, hashed: (run seed, "train", round, silo). So no draw depends on
how many others came before it, or on which process made them. On a CPU the same seed and thread count then give the
same weights bit by bit; on a GPU as far as its kernels can.
"""

from __future__ import annotations

import hashlib
import json
import os
import random

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits for the purpose that `parts` name. The int 1 and the text "1" are different parts."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def usable_cores() -> int:
    """The cores that this process may run on, which a batch system may have made fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def deterministic(seed: int, threads: int) -> None:
    """Seeds every global generator and sets torch to `threads` threads (0: all usable cores) and repeatable kernels.

    Call it in the thread that trains: OpenMP, which torch computes with, keeps its thread count a thread.
    """
    torch.set_num_threads(threads or usable_cores())
    # cuBLAS repeats itself only with a fixed workspace, which it reads when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Some CUDA kernels (adaptive pooling backwards) have no repeatable form: a warning, for refusing to train is worse.
    # torch.use_deterministic_algorithms does the same, and loads torch's compiler: a second and 80 MB.
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch sets it at run time
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)

"""Keeps the memory of messages for the next messages.

glibc gives freed memory above a small threshold back to the system at once. With messages of a MiB that happens at
every one, and the next then pays for fresh pages.
"""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_KEPT = 64 << 20  # bytes of free memory that a process may hold on to
_LARGEST = 8 << 20  # bytes of a block that is kept; a larger one goes back to the system


def keep_buffers() -> None:
    """Sets malloc's thresholds for this process, where its malloc has them."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)  # an arena a thread would keep as much each
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)

"""Arrays that kernels address, and how much memory there is."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np

ALIGNMENT = 64  # a cache line, and the widest vector
_SLACK = 64  # kernels may read (never write) one vector past the end
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def aligned(nbytes: int, zero: bool = False) -> np.ndarray:
    """A uint8 array of nbytes that starts on a cache line; untouched pages cost no memory."""
    make = np.zeros if zero else np.empty
    raw = make(nbytes + ALIGNMENT + _SLACK, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]


def total_bytes() -> int | None:
    """Memory that this process may come to use (the machine's, or its container's), None where nobody tells."""
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):
        return None
    for path in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # without a limit the file says "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


def available_bytes() -> int | None:
    """Memory that is free for use, None where nobody tells."""
    total = total_bytes()
    with suppress(OSError), open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
                return free if total is None else min(free, total)
    return None if total is None else total // 2

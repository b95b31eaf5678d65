"""Arrays that kernels address, and how much memory there is."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..formats.pages import ask_for_large

ALIGNMENT = 64  # a cache line, and the widest vector
LARGE_PAGE = 2 << 20
_SLACK = 64  # kernels may read (never write) one vector past the end
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def aligned(nbytes: int, zero: bool = False) -> np.ndarray:
    """A uint8 array of nbytes that starts on a cache line; untouched pages cost no memory."""
    make = np.zeros if zero else np.empty
    raw = make(nbytes + ALIGNMENT + _SLACK, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]


def large_pages(nbytes: int) -> np.ndarray:
    """A uint8 array of zeros in pages of 2 MiB, where the system has them; untouched pages cost no memory.

    OSError where there is not as much memory.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, nbytes + LARGE_PAGE + _SLACK, **private)  # shared memory would have small pages
    ask_for_large(memory)
    raw = np.frombuffer(memory, np.uint8)
    start = -raw.ctypes.data % LARGE_PAGE
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

"""Arrays that kernels address: aligned, and released when the last owner goes."""

from __future__ import annotations

import os

import numpy as np

ALIGNMENT = 64  # a cache line, and the widest vector
_SLACK = 64  # kernels may read (never write) one vector past the end


def aligned(nbytes: int, zero: bool = False) -> np.ndarray:
    """A uint8 array of nbytes that starts on a cache line; untouched pages cost no memory."""
    make = np.zeros if zero else np.empty
    raw = make(nbytes + ALIGNMENT + _SLACK, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]


def available_bytes() -> int | None:
    """Physical memory that is free for use, or None where the system does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return None

"""Walking ops once, outside any model's tape: what is done to weights when they are loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..memory import aligned
from .layout import Row
from .threads import ThreadPool


def run_once(walker: int, ops: Iterable[tuple[int, Any, dict[str, int]]], n_threads: int, scratch_bytes: int) -> None:
    """Run ops, which do not wait for each other: (kernel's address, layout of its record, fields).

    scratch_bytes: that each thread has.
    """
    listed = list(ops)
    if not listed:
        return
    scratch, done = aligned(n_threads * scratch_bytes), aligned(64, zero=True)
    shared = {"scratch": scratch.ctypes.data, "scratch_bytes": scratch_bytes, "done": done.ctypes.data}
    slots = -(-max(len(layout) for _, layout, _ in listed) // 8) * 8  # whole cache lines
    records = aligned(len(listed) * slots * 8, zero=True).view(np.int64).reshape(-1, slots)
    rows = np.zeros((len(listed), len(Row)), np.int64)
    for record, row, (kernel, layout, fields) in zip(records, rows, listed, strict=True):
        for name, value in (shared | fields).items():
            record[getattr(layout, name) // 8] = value
        row[:2] = kernel, record.ctypes.data
    rows[-1, Row.barrier // 8] = 1
    pool = ThreadPool(walker, n_threads)
    try:
        pool.run(rows.ctypes.data, len(rows), 0)
    finally:
        pool.close()

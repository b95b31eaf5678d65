"""The tape: the CPU part of a graph as rows of (kernel address, argument record, barrier), walked by every thread.

A row is four int64: the kernel's address, the address of its argument record, whether a barrier follows, unused.
Kernels have one signature, `(args, step, ith, nth)`; an argument record is int64 slots that start with a chunk
counter: threads take chunks of an op's work from it until none is left, so a slow core holds nobody up.
"""

from __future__ import annotations

from typing import Any

from .layout import Sync

ROW = 32  # bytes of a tape row
SPINS = 4000  # barrier polls before the core is offered to others


def build(family: str, variant: str) -> Any:
    """The walker: every thread runs it over the same tape."""
    from .simd import atomic_add, atomic_get, call_kernel, call_plain, i64_at, pause

    spins = SPINS
    row_bytes = ROW
    sync = Sync

    def walk(tape, n_rows, step, ith, nth, shared):
        for i in range(n_rows):
            row = tape + i * row_bytes
            call_kernel(i64_at(row), i64_at(row + 8), step, ith, nth)
            if nth > 1 and i64_at(row + 16) != 0:
                phase = atomic_get(shared + sync.phase)
                if atomic_add(shared + sync.arrived, 1) == nth - 1:
                    atomic_add(shared + sync.arrived, -nth)
                    atomic_add(shared + sync.phase, 1)
                else:
                    polls = 0
                    while atomic_get(shared + sync.phase) == phase:
                        polls += 1
                        if polls < spins:
                            pause()
                        elif i64_at(shared + sync.yield_function) != 0:
                            call_plain(i64_at(shared + sync.yield_function))

    return walk

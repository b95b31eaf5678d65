"""Sums and maxima over the threads of a row or a block."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from .jit import WARP, simulated

FULL = 0xFFFFFFFF


def over_lanes(lanes: int, threads: int, largest: bool = False) -> Any:
    """A device function `total(v)`: the float32 sum (or maximum) over each group of `lanes` neighbouring threads.

    All of them get it; every thread of the block must call it. lanes: a power of two, up to a warp; threads: of the
    block.
    """
    if lanes == 1:
        return cuda.jit(device=True)(_same)
    if not simulated():
        half = lanes // 2

        def shuffled(v):  # type: ignore[no-untyped-def]
            step = half
            while step > 0:
                other = cuda.shfl_xor_sync(FULL, v, step)
                v = max(v, other) if largest else v + other
                step //= 2
            return v

        return cuda.jit(device=True)(shuffled)

    def shared(v):  # type: ignore[no-untyped-def]  # the simulator has no shuffles
        values = cuda.shared.array(threads, np.float32)
        me = cuda.threadIdx.x
        cuda.syncthreads()
        values[me] = v
        cuda.syncthreads()
        first = me - me % lanes
        total = values[first]
        for i in range(1, lanes):
            total = max(total, values[first + i]) if largest else total + values[first + i]
        return total

    return cuda.jit(device=True)(shared)


def _same(v):  # type: ignore[no-untyped-def]
    return v


def over_block(threads: int, largest: bool = False) -> Any:
    """A device function `total(v)`: the float32 sum (or maximum) over all threads of the block, in all of them.

    Every thread must call it. threads: of the block, a power of two; the order of the sum is fixed.
    """
    lanes = min(threads, WARP)
    groups = threads // lanes
    row = over_lanes(lanes, threads, largest)
    if groups == 1:
        return row

    def combined(v):  # type: ignore[no-untyped-def]
        values = cuda.shared.array(groups, np.float32)
        me = cuda.threadIdx.x
        v = row(v)
        cuda.syncthreads()  # whoever still reads what an earlier call left
        if me % lanes == 0:
            values[me // lanes] = v
        cuda.syncthreads()
        total = values[0]
        for i in range(1, groups):
            total = max(total, values[i]) if largest else total + values[i]
        return total

    return cuda.jit(device=True)(combined)


def wait_lanes(lanes: int) -> Any:
    """A device function `wait()`: what a row's threads wrote to shared memory, its others may read.

    In the simulator with lanes > 1, every thread of the block must call it.
    """
    if lanes == 1:
        return cuda.jit(device=True)(_nothing)
    return cuda.jit(device=True)(_wait_block if simulated() else _wait_warp)


def _nothing():  # type: ignore[no-untyped-def]
    pass


def _wait_block():  # type: ignore[no-untyped-def]
    cuda.syncthreads()


def _wait_warp():  # type: ignore[no-untyped-def]
    cuda.syncwarp()

"""Sums and maxima over the threads of a row or a block."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from .jit import simulated

FULL = 0xFFFFFFFF


def over_lanes(lanes: int, threads: int) -> Any:
    """A device function `total(v)`: the float32 sum over each group of `lanes` neighbouring threads, in all of them.

    Every thread of the block must call it. lanes: a power of two, up to a warp; threads: of the block.
    """
    if lanes == 1:
        return cuda.jit(device=True)(_same)
    if not simulated():
        half = lanes // 2

        def shuffled(v):  # type: ignore[no-untyped-def]
            step = half
            while step > 0:
                v += cuda.shfl_xor_sync(FULL, v, step)
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
        total = np.float32(0.0)
        for i in range(lanes):
            total += values[first + i]
        return total

    return cuda.jit(device=True)(shared)


def _same(v):  # type: ignore[no-untyped-def]
    return v


def over_block(threads: int, largest: bool = False) -> Any:
    """A device function `total(v)`: the float32 sum (or maximum) over all threads of the block, in all of them.

    Every thread must call it. threads: of the block, a power of two; the order of the sum is fixed.
    """

    def combined(v):  # type: ignore[no-untyped-def]
        values = cuda.shared.array(threads, np.float32)
        me = cuda.threadIdx.x
        cuda.syncthreads()
        values[me] = v
        cuda.syncthreads()
        step = threads // 2
        while step > 0:
            if me < step:
                if largest:
                    values[me] = max(values[me], values[me + step])
                else:
                    values[me] += values[me + step]
            cuda.syncthreads()
            step //= 2
        return values[0]

    return cuda.jit(device=True)(combined)


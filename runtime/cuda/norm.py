"""RMS norm: out = x / rms(x) * weight, a block a token."""

from __future__ import annotations

import math

import numpy as np
from numba import cuda, types

from .jit import WARP, Program
from .reduce import over_block

VARIANTS = {"norm": [""]}


def build(family: str, variant: str, lanes: int) -> Program:
    """`norm`: (x [n_tok, k], rows, weight [k], out [n, k], eps); out[i] is the normed row rows[i] of x. Grid: n."""
    threads = 256 if lanes == WARP else lanes
    total = over_block(threads)

    def norm(x, rows, weight, out, eps):  # type: ignore[no-untyped-def]
        i, me = cuda.blockIdx.x, cuda.threadIdx.x
        row = rows[i]
        k = weight.shape[0]
        squares = np.float32(0.0)
        for j in range(me, k, threads):
            squares += x[row, j] * x[row, j]
        scale = np.float32(1.0) / np.float32(math.sqrt(total(squares) / np.float32(k) + eps))
        for j in range(me, k, threads):
            out[i, j] = x[row, j] * scale * weight[j]

    floats = types.float32[:, ::1]
    return Program(norm, (floats, types.int32[::1], types.float32[::1], floats, types.float32), threads)

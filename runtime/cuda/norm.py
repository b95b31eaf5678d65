"""Norms of a row or of each group of its values (heads), a block a group; and rows as they are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, types

from .jit import WARP, Program
from .reduce import over_block

VARIANTS = {"norm": ["rms", "layer"], "pack": [""]}
ADD, BIAS = 1, 2  # mode: add to what out holds; add a bias


def build(family: str, variant: str, lanes: int) -> Program:
    """`norm:rms`, `norm:layer` (mean taken off): (x, rows, weight, bias, out, eps, gain, group, mode).

    out[i] is row rows[i] of x, normed by groups: gain * (x - mean) / sqrt(mean square + eps) * weight + bias; or it is
    added to out[i]. out may be x where rows[i] = i. weight, bias: of all values of a row, or of so many groups that
    they repeat; bias counts if mode has BIAS. Grid: (rows, groups of a row).

    `pack`: (x, out): a copy under another name. Grid: rows.
    """
    threads, layer = (256 if lanes == WARP else lanes), variant == "layer"
    floats, vector = types.float32[:, ::1], types.float32[::1]
    if family == "pack":
        return Program(_copy(threads), (floats, floats), threads)
    total = over_block(threads)

    def norm(x, rows, weight, bias, out, eps, gain, group, mode):  # type: ignore[no-untyped-def]
        i, first, me = cuda.blockIdx.x, cuda.blockIdx.y * group, cuda.threadIdx.x
        row, known = rows[i], first % weight.shape[0]
        mean = np.float32(0.0)
        if layer:
            for j in range(me, group, threads):
                mean += x[row, first + j]
            mean = total(mean) / np.float32(group)
        squares = np.float32(0.0)
        for j in range(me, group, threads):
            value = x[row, first + j] - mean
            squares += value * value
        scale = gain / np.float32(math.sqrt(total(squares) / np.float32(group) + eps))
        for j in range(me, group, threads):
            value = (x[row, first + j] - mean) * scale * weight[known + j]
            if mode & BIAS:
                value += bias[known + j]
            if mode & ADD:
                value += out[i, first + j]
            out[i, first + j] = value

    numbers = types.float32, types.float32, types.int32, types.int32
    return Program(norm, (floats, types.int32[::1], vector, vector, floats, *numbers), threads)


def _copy(threads: int) -> Any:
    def pack(x, out):  # type: ignore[no-untyped-def]
        i = cuda.blockIdx.x
        for j in range(cuda.threadIdx.x, x.shape[1], threads):
            out[i, j] = x[i, j]

    return pack

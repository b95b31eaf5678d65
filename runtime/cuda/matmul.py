"""Products of packed weights and vectors: `matmul:KIND` for one token, `matmul_tile:KIND` for several."""

from __future__ import annotations

import numpy as np
from numba import cuda, types

from .jit import Program
from .repack import KINDS
from .rows import ROWS, SPLIT, TILE, four_rows, over_split, pick, pick_token, spread, tile
from .weights import Device, array_types, device

VARIANTS = {"matmul": list(KINDS), "matmul_tile": list(KINDS)}
SET, ADD, RELU = 0, 1, 2  # mode: out = y, out += y, out = relu(y), where y = W x
BIAS = 4  # added to a mode: y = W x + bias


def launch(kind: str, n: int, n_tok: int) -> tuple[str, tuple[int, int]]:
    """(kernel, grid) for n rows and n_tok tokens: one token is a grid of its own, several share decoded weights.

    A block of the first computes ROWS rows, of the second ROWS rows a warp.
    """
    if n_tok == 1:
        return f"matmul:{kind}", (-(-n // ROWS), 1)
    return f"matmul_tile:{kind}", (-(-n // (ROWS * SPLIT)), -(-n_tok // TILE))


def build(family: str, variant: str, lanes: int) -> Program:
    """(*W, x [max_tokens, >= k], out [max_tokens, >= n], bias [n], n, k, n_tok, mode); grid: `launch`.

    mode: SET, ADD or RELU, plus BIAS if the bias is to be added (else it is any array). x's width is a multiple of 4
    (of anything for plain floats), and so is the place in memory where it begins, in floats.
    """
    if family == "matmul":
        kernel = _single(variant, lanes)
    else:
        kernel = _tiled(variant, lanes)
    floats, w = types.float32[:, ::1], array_types(variant)
    numbers = (types.int32,) * 4
    return Program(spread(kernel, len(w)), (*w, floats, floats, types.float32[::1], *numbers), SPLIT * lanes)


@device
def _store(value, out, bias, t, row, mode):  # type: ignore[no-untyped-def]
    if mode & BIAS:
        value += bias[row]
    mode &= 3
    if mode == ADD:
        value += out[t, row]
    elif mode == RELU and value <= np.float32(0.0):
        value = np.float32(0.0)
    out[t, row] = value


def _single(kind: str, lanes: int) -> Device:
    products, sums = four_rows(kind, SPLIT * lanes), over_split(lanes)

    def matmul(w, x, out, bias, n, k, n_tok, mode):  # type: ignore[no-untyped-def]
        me, first, t = cuda.threadIdx.x, cuda.blockIdx.x * ROWS, cuda.blockIdx.y
        s = products(w, x, np.uint64(t), np.uint64(first), np.uint64(n - 1), np.uint64(k), np.uint64(me))
        s = sums(s[0], s[1], s[2], s[3])
        if me < ROWS and first + me < n and t < n_tok:
            _store(pick(s, me), out, bias, t, first + me, mode)

    return matmul


def _tiled(kind: str, lanes: int) -> Device:
    products = tile(kind, lanes)

    def matmul_tile(w, x, out, bias, n, k, n_tok, mode):  # type: ignore[no-untyped-def]
        lane, t = cuda.threadIdx.x % lanes, cuda.blockIdx.y * TILE
        row = (cuda.blockIdx.x * SPLIT + cuda.threadIdx.x // lanes) * ROWS
        last = np.uint64(n - 1)
        at = min(np.uint64(row), last)
        s = products(w, x, np.uint64(t), np.uint64(n_tok), at, last, np.uint64(k), np.uint64(lane))
        for i in range(lane, ROWS * TILE, lanes):
            r, tok = row + i % ROWS, t + i // ROWS
            if r < n and tok < n_tok:
                _store(pick(pick_token(s, i // ROWS), i % ROWS), out, bias, tok, r, mode)

    return matmul_tile

"""Dot products of rows of packed weights and float32 vectors: what matmul and ffn share.

Two ways, for the two shapes of a step. One token: a block of SPLIT warps computes ROWS rows, each warp over its share
of the runs; loads of all rows are under way before the first is used, and x is read once for them. Many tokens: a warp
computes ROWS rows for TILE tokens, and each run is decoded once for all of these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from .loads import eight
from .reduce import over_lanes
from .weights import READERS, Device, device, dot, plain, values

ROWS = 4  # rows of weights that threads compute together
SPLIT = 4  # warps of a block
TILE = 8  # tokens that share a decoded weight

_1, _2, _3, _4, _5, _6, _7 = (np.uint64(n) for n in range(1, 8))


def spread(function: Any, *counts: int) -> Any:
    """A kernel with flat parameters: each of the function's first parameters is a tuple of so many of them.

    It lives among the function's globals, where the simulator changes the meaning of `cuda` while the kernel runs.
    """
    rest = function.__code__.co_varnames[len(counts) : function.__code__.co_argcount]
    groups = [[f"w{i}_{j}" for j in range(count)] for i, count in enumerate(counts)]
    flat = ", ".join([name for group in groups for name in group] + list(rest))
    packed = ", ".join([f"({', '.join(group)},)" for group in groups] + list(rest))
    made: dict[str, Any] = {}
    text = f"def make(body):\n    def kernel({flat}):\n        body({packed})\n    return kernel\n"
    exec(compile(text, __file__, "exec"), function.__globals__, made)
    return made["make"](device(function))


def vector(kind: str) -> Device:
    """(x, t, j, k) -> run j of x[t] as 8 floats; beyond k, where rows of plain floats are filled up, zeros."""
    whole = READERS[kind].scales is not None

    @device
    def at(x, t, i, k):  # type: ignore[no-untyped-def]
        return x[t, i] if i < k else np.float32(0.0)

    def aligned(x, t, j, k):  # type: ignore[no-untyped-def]
        return eight(x, t, j << _3)

    def ragged(x, t, j, k):  # type: ignore[no-untyped-def]
        i = j << _3
        if k & _7 == 0 and x.shape[1] & 3 == 0:
            return eight(x, t, i)
        return (
            at(x, t, i, k), at(x, t, i + _1, k), at(x, t, i + _2, k), at(x, t, i + _3, k),
            at(x, t, i + _4, k), at(x, t, i + _5, k),
            at(x, t, i + _6, k), at(x, t, i + _7, k),
        )  # fmt: skip

    return device(aligned if whole else ragged)


@device
def _sum(v):  # type: ignore[no-untyped-def]
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))


@device
def _runs(k):  # type: ignore[no-untyped-def]
    return (k + _7) >> _3


def four_rows(kind: str, threads: int) -> Device:
    """(w, x, t, row, last, k, me) -> thread `me`'s part of the products of x[t] and rows row to row + 3.

    Rows beyond `last` count as that one. All numbers are uint64.
    """
    load, product, floats, step = READERS[kind].load, dot(kind), vector(kind), np.uint64(threads)

    def products(w, x, t, row, last, k, me):  # type: ignore[no-untyped-def]
        runs = _runs(k)
        g0, g1 = row * runs, min(row + _1, last) * runs
        g2, g3 = min(row + _2, last) * runs, min(row + _3, last) * runs
        s0 = s1 = s2 = s3 = np.float32(0.0)
        for j in range(me, runs, step):
            r0, r1, r2, r3 = load(w, g0, j), load(w, g1, j), load(w, g2, j), load(w, g3, j)
            v = floats(x, t, j, k)
            total = _sum(v)
            s0 += product(r0, v, total)
            s1 += product(r1, v, total)
            s2 += product(r2, v, total)
            s3 += product(r3, v, total)
        return s0, s1, s2, s3

    return device(products)


def one_row(kind: str, threads: int) -> Device:
    """(w, x, t, row, k, me) -> thread `me`'s part of the product of x[t] and one row."""
    load, product, floats, step = READERS[kind].load, dot(kind), vector(kind), np.uint64(threads)

    @device
    def one(r, x, t, j, k):  # type: ignore[no-untyped-def]
        v = floats(x, t, j, k)
        return product(r, v, _sum(v))

    def part(w, x, t, row, k, me):  # type: ignore[no-untyped-def]
        runs = _runs(k)
        g = row * runs
        s = np.float32(0.0)
        j = me
        while j + _3 * step < runs:  # four loads under way, as with four rows
            r0, r1 = load(w, g, j), load(w, g, j + step)
            r2, r3 = load(w, g, j + _2 * step), load(w, g, j + _3 * step)
            s += one(r0, x, t, j, k)
            s += one(r1, x, t, j + step, k)
            s += one(r2, x, t, j + _2 * step, k)
            s += one(r3, x, t, j + _3 * step, k)
            j += _4 * step
        while j < runs:
            s += one(load(w, g, j), x, t, j, k)
            j += step
        return s

    return device(part)


def over_split(lanes: int) -> Device:
    """(s0, s1, s2, s3) -> their sums over a block of SPLIT * lanes threads, in all of them; all must call it."""
    threads = SPLIT * lanes
    total = over_lanes(lanes, threads)

    def sums(s0, s1, s2, s3):  # type: ignore[no-untyped-def]
        shared = cuda.shared.array((ROWS, SPLIT), np.float32)
        me = cuda.threadIdx.x
        s0, s1, s2, s3 = total(s0), total(s1), total(s2), total(s3)
        part = me // lanes
        cuda.syncthreads()
        if me % lanes == 0:
            shared[0, part], shared[1, part], shared[2, part], shared[3, part] = s0, s1, s2, s3
        cuda.syncthreads()
        s0 = s1 = s2 = s3 = np.float32(0.0)
        for i in range(SPLIT):
            s0 += shared[0, i]
            s1 += shared[1, i]
            s2 += shared[2, i]
            s3 += shared[3, i]
        return s0, s1, s2, s3

    return cuda.jit(device=True)(sums)


@device
def pick(s, i):  # type: ignore[no-untyped-def]
    """s[i] of four, without a table in memory."""
    return (s[0] if i == 0 else s[1]) if i < 2 else (s[2] if i == 2 else s[3])


@device
def pick_token(s, i):  # type: ignore[no-untyped-def]
    """s[i] of the eight fours that `tile` returns."""
    if i < 4:
        return (s[0] if i == 0 else s[1]) if i < 2 else (s[2] if i == 2 else s[3])
    return (s[4] if i == 4 else s[5]) if i < 6 else (s[6] if i == 6 else s[7])


def tile(kind: str, lanes: int) -> Device:
    """(w, x, first, n_tok, row, last, k, lane) -> TILE tuples, of each token's products with ROWS rows, in all lanes.

    The tokens are those from `first` on; ones beyond n_tok repeat the last. All numbers are uint64.
    """
    load, floats, decoded, step = READERS[kind].load, vector(kind), values(kind), np.uint64(lanes)
    total = over_lanes(lanes, SPLIT * lanes)

    @device
    def more(s, x, t, n_tok, j, k, w0, w1, w2, w3):  # type: ignore[no-untyped-def]
        v = floats(x, min(t, n_tok - _1), j, k)
        return s[0] + plain(w0, v), s[1] + plain(w1, v), s[2] + plain(w2, v), s[3] + plain(w3, v)

    @device
    def totals(s):  # type: ignore[no-untyped-def]
        return total(s[0]), total(s[1]), total(s[2]), total(s[3])

    def products(w, x, first, n_tok, row, last, k, lane):  # type: ignore[no-untyped-def]
        runs = _runs(k)
        g0, g1 = row * runs, min(row + _1, last) * runs
        g2, g3 = min(row + _2, last) * runs, min(row + _3, last) * runs
        # The sums are variables, not an array, because an array might not end up in registers.
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = (np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0))
        for j in range(lane, runs, step):
            r0, r1, r2, r3 = load(w, g0, j), load(w, g1, j), load(w, g2, j), load(w, g3, j)
            w0, w1, w2, w3 = decoded(r0), decoded(r1), decoded(r2), decoded(r3)
            s0 = more(s0, x, first, n_tok, j, k, w0, w1, w2, w3)
            s1 = more(s1, x, first + _1, n_tok, j, k, w0, w1, w2, w3)
            s2 = more(s2, x, first + _2, n_tok, j, k, w0, w1, w2, w3)
            s3 = more(s3, x, first + _3, n_tok, j, k, w0, w1, w2, w3)
            s4 = more(s4, x, first + _4, n_tok, j, k, w0, w1, w2, w3)
            s5 = more(s5, x, first + _5, n_tok, j, k, w0, w1, w2, w3)
            s6 = more(s6, x, first + _6, n_tok, j, k, w0, w1, w2, w3)
            s7 = more(s7, x, first + _7, n_tok, j, k, w0, w1, w2, w3)
        return totals(s0), totals(s1), totals(s2), totals(s3), totals(s4), totals(s5), totals(s6), totals(s7)

    return device(products)

"""The greatest logits of each row: one of them, or the first k in order."""

from __future__ import annotations

import numpy as np
from numba import cuda, types

from .jit import WARP, Program
from .reduce import over_block

VARIANTS = {"argmax": [""], "topk": [""]}

_LOWEST, _HIGHEST = np.float32(-3.4028235e38), np.float32(3.4028235e38)
_NONE = np.float32(2**24)  # ids are reduced as float32, which is exact up to here
_KEEP = 4  # candidates that a thread of topk holds


def build(family: str, variant: str, lanes: int) -> Program:
    """Kernels with a block a row; of equal values the lower id comes first, and no NaN is ever chosen."""
    return _argmax(1024 if lanes == WARP else lanes) if family == "argmax" else _topk(512 if lanes == WARP else lanes)


def _argmax(threads: int) -> Program:
    """`argmax`: (logits [n, n_vocab], out int32 [n]). Grid: n. A row without any number gives 0."""
    largest = over_block(threads, largest=True)

    def argmax(logits, out):
        row, me = cuda.blockIdx.x, cuda.threadIdx.x
        mine, found = _LOWEST, _NONE
        for j in range(me, logits.shape[1], threads):
            if logits[row, j] > mine:
                mine, found = logits[row, j], np.float32(j)
        best = largest(mine)
        first = -largest(-found if mine == best else -_NONE)
        if me == 0:
            out[row] = np.int32(first) if first < _NONE else np.int32(0)

    return Program(argmax, (types.float32[:, ::1], types.int32[::1]), threads)


def _topk(threads: int) -> Program:
    """`topk`: (logits [n, n_vocab], k, ids int32 [n, k], values [n, k]), descending. Grid: n.

    A row with fewer than k numbers ends in ids of -1. Each thread keeps the best few of its own logits, and looks
    through them again only when all those have been taken.
    """
    largest = over_block(threads, largest=True)

    def collect(logits, row, me, after, after_id, best, ids):
        """The thread's greatest logits that come after (value, id) in the order of the result."""
        for i in range(_KEEP):
            best[i], ids[i] = _LOWEST, _NONE
        for j in range(me, logits.shape[1], threads):
            x = logits[row, j]
            if x > best[_KEEP - 1] and (x < after or (x == after and j > after_id)):
                for i in range(_KEEP - 1, 0, -1):
                    if x > best[i - 1]:
                        best[i], ids[i] = best[i - 1], ids[i - 1]
                    elif x > best[i]:
                        best[i], ids[i] = x, np.float32(j)
                if x > best[0]:
                    best[0], ids[0] = x, np.float32(j)

    search = cuda.jit(device=True)(collect)

    def topk(logits, k, ids, values):
        row, me = cuda.blockIdx.x, cuda.threadIdx.x
        best = cuda.local.array(_KEEP, np.float32)
        own = cuda.local.array(_KEEP, np.float32)
        search(logits, row, me, _HIGHEST, -1, best, own)
        for place in range(k):
            value = largest(best[0])
            first = -largest(-own[0] if best[0] == value else -_NONE)
            if me == 0:
                values[row, place] = value
                ids[row, place] = np.int32(first) if first < _NONE else np.int32(-1)
            if own[0] == first and first < _NONE:
                for i in range(1, _KEEP):
                    best[i - 1], own[i - 1] = best[i], own[i]
                best[_KEEP - 1], own[_KEEP - 1] = _LOWEST, _NONE
                if own[0] == _NONE:
                    search(logits, row, me, value, np.int32(first), best, own)

    signature = (types.float32[:, ::1], types.int32, types.int32[:, ::1], types.float32[:, ::1])
    return Program(topk, signature, threads)

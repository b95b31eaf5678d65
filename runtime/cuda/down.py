"""The second half of an FFN: h times the rows of ffn_down_t in several parts, and the sum of these.

`down:KIND` is for one token, `down_tile:KIND` for several, `merge` adds the parts up. Row j of ffn_down_t belongs to
neuron j and is read only if h[t, j] is not zero for some token of the tile. Neighbouring threads own neighbouring runs
of 8 columns; a warp goes over neurons while its threads keep their columns' sums.

The neurons are cut into parts, a part into WARPS shares, and all are summed in order: the result does not depend on
the device. 32 parts are for a large GPU: with n_embd 4096 they make 16 x 32 blocks of 8 warps, 31 warps for each of an
H200's 132 multiprocessors, with 43 of 11008 neurons each; four rows are under way in a warp, 18 KB a multiprocessor.
Tokens beyond a tile make blocks of their own, so they need fewer parts, and less memory for them (`part_count`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, types

from .jit import WARP, Program, simulated
from .reduce import FULL
from .repack import KINDS
from .rows import TILE, spread
from .weights import READERS, Device, array_types, device, values

VARIANTS = {"down": list(KINDS), "down_tile": list(KINDS), "merge": [""]}
WARPS = 8  # of a block, each with a share of its neurons; fewer where warps have fewer lanes, in the simulator
STRIDE = 4  # neurons that a lane looks at before its warp reads the active ones' rows
PARTS = 2 if simulated() else 32  # at most; the simulator needs milliseconds for a block
COLUMNS = 256  # of a block of merge
BASE, BIAS = 1, 2  # mode of merge

_1, _2, _3, _4, _5, _6, _7 = (np.uint64(n) for n in range(1, 8))


def part_count(n_tok: int) -> int:
    """Parts that n_tok tokens are computed in: PARTS for one tile of tokens, half for two, at last 1."""
    tiles = -(-n_tok // TILE)
    return max(1, PARTS >> (tiles - 1).bit_length())


def launch(kind: str, k: int, n_tok: int, lanes: int | None = None) -> tuple[str, tuple[int, int, int]]:
    """(kernel, grid) for rows of k weights; `parts` must be [part_count(n_tok), at least n_tok, k]."""
    columns = (lanes or (1 if simulated() else WARP)) * 8
    return f"{'down' if n_tok == 1 else 'down_tile'}:{kind}", (-(-k // columns), part_count(n_tok), -(-n_tok // TILE))


def merge_launch(k: int, n_tok: int) -> tuple[str, tuple[int, int]]:
    """(kernel, grid) of the sum of parts."""
    return "merge", (-(-k // COLUMNS), n_tok)


def build(family: str, variant: str, lanes: int) -> Program:
    """down, down_tile: (*W, h, parts [P, max_tokens, k], n, k, n_tok): parts[p, t] = the p-th share's sum.

    merge: (base, parts, bias [k], out, n_tok, mode): out[t] = base[t] + bias + parts[0, t] + parts[1, t] + ..., base if
    mode has BASE, bias if it has BIAS; base may be out. Grids: `launch` and `merge_launch`.
    """
    floats, parts = types.float32[:, ::1], types.float32[:, :, ::1]
    if family == "merge":
        threads = COLUMNS if lanes == WARP else 2 * lanes
        given = (floats, parts, types.float32[::1], floats, types.int32, types.int32)
        return Program(_merge(threads), given, threads)
    w = array_types(variant)
    kernel = spread(_down(variant, 1 if family == "down" else TILE, lanes), len(w))
    return Program(kernel, (*w, floats, parts, *(types.int32,) * 3), _warps(lanes) * lanes)


def _warps(lanes: int) -> int:
    return WARPS if lanes == WARP else 2


def _merge(threads: int) -> Any:
    def merge(base, parts, bias, out, n_tok, mode):  # type: ignore[no-untyped-def]
        t, first = cuda.blockIdx.y, cuda.blockIdx.x * COLUMNS
        if t < n_tok:
            for i in range(first + cuda.threadIdx.x, min(first + COLUMNS, parts.shape[2]), threads):
                total = base[t, i] if mode & BASE else np.float32(0.0)
                if mode & BIAS:
                    total += bias[i]
                for p in range(parts.shape[0]):
                    total += parts[p, t, i]
                out[t, i] = total

    return merge


def _ranks(lanes: int) -> Device:
    """(flag) -> (flags raised by lower lanes of the warp, by all of them); all threads of the block must call it."""
    if lanes == 1:

        def alone(flag):  # type: ignore[no-untyped-def]
            return 0, 1 if flag else 0

        return device(alone)
    if not simulated():

        def counted(flag):  # type: ignore[no-untyped-def]
            votes = np.uint32(cuda.ballot_sync(FULL, flag))
            below = np.uint32((np.uint32(1) << np.uint32(cuda.laneid)) - np.uint32(1))
            return cuda.popc(np.uint32(votes & below)), cuda.popc(votes)

        return device(counted)

    threads = _warps(lanes) * lanes

    def shared(flag):  # type: ignore[no-untyped-def]  # the simulator has no ballots
        flags = cuda.shared.array(threads, np.int32)
        me = cuda.threadIdx.x
        cuda.syncthreads()
        flags[me] = 1 if flag else 0
        cuda.syncthreads()
        first = me - me % lanes
        return sum(flags[first:me]), sum(flags[first : first + lanes])

    return device(shared)


def _adder(kind: str, tokens: int) -> Device:
    """(sums, h, t, n_tok, j, r) -> the sums, eights of floats by token, plus h[t, j] times a run of neuron j's row."""
    reader, decoded = READERS[kind], values(kind)
    codes, scales = reader.codes, reader.scales

    @device
    def plus(s, factor, v):  # type: ignore[no-untyped-def]
        return (
            s[0] + factor * v[0], s[1] + factor * v[1], s[2] + factor * v[2], s[3] + factor * v[3],
            s[4] + factor * v[4], s[5] + factor * v[5], s[6] + factor * v[6], s[7] + factor * v[7],
        )  # fmt: skip

    @device
    def of(s, h, t, n_tok, j, v):  # type: ignore[no-untyped-def]
        return plus(s, h[t, j] if t < n_tok else np.float32(0.0), v)

    def one(s, h, t, n_tok, j, r):  # type: ignore[no-untyped-def]
        return (plus(s[0], h[t, j], decoded(r)),)

    def scaled(s, h, t, n_tok, j, r):  # type: ignore[no-untyped-def]  # fewer products, where there is no minimum
        scale, _ = scales(r)
        return (plus(s[0], h[t, j] * scale, codes(r)),)

    def many(s, h, t, n_tok, j, r):  # type: ignore[no-untyped-def]
        v = decoded(r)
        return (
            of(s[0], h, t, n_tok, j, v), of(s[1], h, t + _1, n_tok, j, v),
            of(s[2], h, t + _2, n_tok, j, v), of(s[3], h, t + _3, n_tok, j, v),
            of(s[4], h, t + _4, n_tok, j, v), of(s[5], h, t + _5, n_tok, j, v),
            of(s[6], h, t + _6, n_tok, j, v), of(s[7], h, t + _7, n_tok, j, v),
        )  # fmt: skip

    if tokens > 1:
        return device(many)
    return device(one if scales is None or reader.has_min else scaled)


def _writer(lanes: int) -> Device:
    """(s, parts, t, k): sums a token's eights over the warps of a block into its part; all threads must call it."""
    warps, width = _warps(lanes), lanes * 8
    size = warps * width

    def write(s, parts, t, k, n_tok):  # type: ignore[no-untyped-def]
        shared = cuda.shared.array(size, np.float32)
        me = cuda.threadIdx.x
        cuda.syncthreads()
        at = me * 8
        shared[at], shared[at + 1], shared[at + 2], shared[at + 3] = s[0], s[1], s[2], s[3]
        shared[at + 4], shared[at + 5], shared[at + 6], shared[at + 7] = s[4], s[5], s[6], s[7]
        cuda.syncthreads()
        if t < n_tok:
            for c in range(me, width, warps * lanes):
                total = np.float32(0.0)
                for warp in range(warps):
                    total += shared[warp * width + c]
                column = cuda.blockIdx.x * width + c
                if column < k:
                    parts[cuda.blockIdx.y, t, column] = total

    return cuda.jit(device=True)(write)


def _down(kind: str, tokens: int, lanes: int) -> Any:
    load, add, ranks, write = READERS[kind].load, _adder(kind, tokens), _ranks(lanes), _writer(lanes)
    warps, listed = _warps(lanes), lanes * STRIDE
    list_size = warps * listed
    none = ((np.float32(0.0),) * 8,) * tokens

    def down(w, h, parts, n, k, n_tok):  # type: ignore[no-untyped-def]
        # Unsigned indices spare the checks for negative ones.
        lists = cuda.shared.array(list_size, np.uint32)
        warp, lane, t = cuda.threadIdx.x // lanes, cuda.threadIdx.x % lanes, cuda.blockIdx.z * tokens
        runs = np.uint64((k + 7) // 8)
        column = min(np.uint64(cuda.blockIdx.x * lanes + lane), runs - _1)
        share = (n + parts.shape[0] - 1) // parts.shape[0]
        each = (share + warps - 1) // warps
        begin = cuda.blockIdx.y * share + warp * each
        end = min(begin + each, min((cuda.blockIdx.y + 1) * share, n))
        mine, first, known = np.uint64(warp * listed), np.uint64(t), np.uint64(n_tok)
        sums = none
        # As many rounds for all warps, because all threads of a block must meet at its barriers.
        for start in range(begin, begin + each, listed):
            count = 0
            for i in range(STRIDE):
                j = start + i * lanes + lane
                active = False
                if j < end:
                    for token in range(t, min(t + tokens, n_tok)):
                        active = active or h[token, j] != np.float32(0.0)
                place, found = ranks(active)
                if active:
                    lists[warp * listed + count + place] = np.uint32(j)
                count += found
            cuda.syncthreads()
            at, full, stop = mine, mine + np.uint64(count // 4 * 4), mine + np.uint64(count)
            while at < full:
                a, b = np.uint64(lists[at]), np.uint64(lists[at + _1])
                c, d = np.uint64(lists[at + _2]), np.uint64(lists[at + _3])
                ra, rb = load(w, a * runs, column), load(w, b * runs, column)
                rc, rd = load(w, c * runs, column), load(w, d * runs, column)
                sums = add(sums, h, first, known, a, ra)
                sums = add(sums, h, first, known, b, rb)
                sums = add(sums, h, first, known, c, rc)
                sums = add(sums, h, first, known, d, rd)
                at += _4
            while at < stop:
                a = np.uint64(lists[at])
                sums = add(sums, h, first, known, a, load(w, a * runs, column))
                at += _1
            cuda.syncthreads()
        write(sums[0], parts, t, k, n_tok)
        if tokens > 1:
            write(sums[1], parts, t + 1, k, n_tok)
            write(sums[2], parts, t + 2, k, n_tok)
            write(sums[3], parts, t + 3, k, n_tok)
            write(sums[4], parts, t + 4, k, n_tok)
            write(sums[5], parts, t + 5, k, n_tok)
            write(sums[6], parts, t + 6, k, n_tok)
            write(sums[7], parts, t + 7, k, n_tok)

    return down

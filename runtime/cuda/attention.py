"""Causal attention over the paged KV cache, with grouped queries, a sliding window and an online softmax.

A block of threads takes a tile of queries that share a key-value head through one split of the cache blocks that they
see; its warps take turns at the blocks, keeping maxima and sums of their own (Milakov and Gimelshein 2018), and merge
at the end. Splits are merged by a second kernel, as in flash-decoding (Dao et al. 2023): one token of a long context
is work for the whole GPU. All orders are fixed, so equal launches give equal bits. Launches: attention_launch.py.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda, types

from ..cpu.layout import KV_BLOCK
from .attention_launch import MAX_SPLITS, SIZES, WARPS
from .jit import WARP, Program
from .reduce import over_block, over_lanes, wait_lanes

VARIANTS = {
    "attention": [f"{size}x{queries}" for size, choices in SIZES.items() for queries in choices],
    "attention_merge": [""],
}

_LOW = np.float32(-1e30)  # a score that no real one goes below
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_AHEAD = 8  # loads that a thread has under way


def build(family: str, variant: str, lanes: int) -> Program:
    """`attention:SIZExQUERIES` for heads of up to that size, or `attention_merge`."""
    if family == "attention_merge":
        return _merge(1024 if lanes == WARP else lanes)
    size, queries = (int(number) for number in variant.split("x"))
    return _attention(size, queries, lanes)


def _attention(size: int, queries: int, lanes: int) -> Program:
    """(q, keys, values, tables, seq_of, positions, out, parts, n_head, n_kv, dim_k, dim_v, scale, window, n_tok).

    q [n, n_head * dim_k]; keys and values as rope leaves them; tables int32 [n_seq, max_blocks]: cache blocks of each
    sequence; seq_of int32: the sequence of each token. Token t sees positions max(0, p - window + 1) to p =
    positions[t] (window 0: from 0). With one split, out [n, n_head * dim_v]; with more, parts [n_tok, splits, n_head,
    dim_v + 2]: the unnormalised output, its maximum and its sum.
    """
    # In the simulator only blocks of one row may wait within a row: there are several rows where a row is one thread.
    warps = WARPS if lanes == WARP else 2 if lanes == 1 else 1
    threads = lanes * warps
    per_lane, chunks, block = KV_BLOCK // lanes, size // lanes, KV_BLOCK
    largest, total, wait = over_lanes(lanes, threads, largest=True), over_lanes(lanes, threads), wait_lanes(lanes)
    ahead = _AHEAD
    panel_shape, weights_shape, merged_shape = (size, queries), (warps, block, queries), (size + 2, queries)
    acc_shape, score_shape = (queries, chunks), (queries, per_lane)

    def attention(
        q, keys, values, tables, seq_of, positions, out, parts, n_head, n_kv, dim_k, dim_v, scale, window, n_tok
    ):
        panel = cuda.shared.array(panel_shape, np.float32)
        weights = cuda.shared.array(weights_shape, np.float32)
        merged = cuda.shared.array(merged_shape, np.float32)
        first = cuda.local.array(queries, np.int32)  # first position that each query sees,
        last = cuda.local.array(queries, np.int32)  # and one past the last
        top = cuda.local.array(queries, np.float32)
        mass = cuda.local.array(queries, np.float32)  # this lane's share of the sum of weights
        acc = cuda.local.array(acc_shape, np.float32)
        score = cuda.local.array(score_shape, np.float32)

        me = cuda.threadIdx.x
        lane, warp = me % lanes, me // lanes
        split, splits = cuda.blockIdx.z, cuda.gridDim.z
        group = n_head // n_kv
        tiles = (group + queries - 1) // queries  # of a token's heads
        h, base = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * queries
        rows = max(1, queries // group)  # tokens of a tile
        token = cuda.blockIdx.y * rows
        rows = min(rows, n_tok - token)

        # Query i is head (base + i) % group of the tile's row (base + i) // group.
        for i in range(queries):
            row, head = (base + i) // group, h * group + (base + i) % group
            for d in range(me, dim_k, threads):
                panel[d, i] = q[token + row, head * dim_k + d] * scale if row < rows else _ZERO
            top[i], mass[i] = _LOW, _ZERO
            for c in range(chunks):
                acc[i, c] = _ZERO
        cuda.syncthreads()

        start = 0
        while start < rows:  # rows of one sequence at a time
            sequence = seq_of[token + start]
            end = start + 1
            while end < rows and seq_of[token + end] == sequence:
                end += 1
            low, high = 1 << 30, 0
            for i in range(queries):
                row = (base + i) // group
                first[i], last[i] = 0, 0
                if start <= row < end:
                    last[i] = positions[token + row] + 1
                    first[i] = max(0, last[i] - window) if window > 0 else 0
                    low, high = min(low, first[i]), max(high, last[i])
            begin = low // block
            n_blocks = (high + block - 1) // block - begin
            stop = begin + n_blocks * (split + 1) // splits
            for b in range(begin + n_blocks * split // splits + warp, stop, warps):
                page = tables[sequence, b]
                for i in range(queries):
                    for r in range(per_lane):
                        score[i, r] = _ZERO
                for r in range(per_lane):
                    at = lane + r * lanes
                    for d0 in range(0, dim_k - dim_k % ahead, ahead):
                        for u in range(ahead):
                            key = np.float32(keys[page, h, d0 + u, at])
                            for i in range(queries):
                                score[i, r] += panel[d0 + u, i] * key
                    for d in range(dim_k - dim_k % ahead, dim_k):
                        key = np.float32(keys[page, h, d, at])
                        for i in range(queries):
                            score[i, r] += panel[d, i] * key
                wait()  # whoever still reads the last block's weights
                for i in range(queries):
                    best = _LOW
                    for r in range(per_lane):
                        position = b * block + lane + r * lanes
                        if position < first[i] or position >= last[i]:
                            score[i, r] = _LOW
                        best = max(best, score[i, r])
                    best = max(top[i], largest(best))
                    factor = np.float32(math.exp(top[i] - best))
                    top[i] = best
                    mass[i] *= factor
                    for c in range(chunks):
                        acc[i, c] *= factor
                    for r in range(per_lane):
                        position = b * block + lane + r * lanes
                        seen = position >= first[i] and position < last[i]
                        weight = np.float32(math.exp(score[i, r] - best)) if seen else _ZERO
                        weights[warp, lane + r * lanes, i] = weight
                        mass[i] += weight
                wait()
                here = min(block, high - b * block)  # what lies behind has never been written
                for c in range(chunks):
                    d = lane + c * lanes
                    if d < dim_v:
                        for j0 in range(0, here - here % ahead, ahead):
                            for u in range(ahead):
                                value = np.float32(values[page, h, j0 + u, d])
                                for i in range(queries):
                                    acc[i, c] += weights[warp, j0 + u, i] * value
                        for j in range(here - here % ahead, here):
                            value = np.float32(values[page, h, j, d])
                            for i in range(queries):
                                acc[i, c] += weights[warp, j, i] * value
            start = end

        for i in range(queries):
            mass[i] = total(mass[i])
        for other in range(1, warps):  # the first warp adds the others, one by one
            if warp == other:
                for i in range(queries):
                    merged[size, i], merged[size + 1, i] = top[i], mass[i]
                    for c in range(chunks):
                        merged[lane + c * lanes, i] = acc[i, c]
            cuda.syncthreads()
            if warp == 0:
                for i in range(queries):
                    best = max(top[i], merged[size, i])
                    ours = np.float32(math.exp(top[i] - best))
                    theirs = np.float32(math.exp(merged[size, i] - best))
                    top[i] = best
                    mass[i] = mass[i] * ours + merged[size + 1, i] * theirs
                    for c in range(chunks):
                        acc[i, c] = acc[i, c] * ours + merged[lane + c * lanes, i] * theirs
            cuda.syncthreads()

        if warp == 0:
            for i in range(queries):
                row, head = (base + i) // group, h * group + (base + i) % group
                if row < rows and base + i < rows * group:
                    t = token + row
                    if splits == 1:
                        inverse = _ONE / mass[i]
                        for c in range(chunks):
                            if lane + c * lanes < dim_v:
                                out[t, head * dim_v + lane + c * lanes] = acc[i, c] * inverse
                    else:
                        part = ((t * splits + split) * n_head + head) * (dim_v + 2)
                        for c in range(chunks):
                            if lane + c * lanes < dim_v:
                                parts[part + lane + c * lanes] = acc[i, c]
                        if lane == 0:
                            parts[part + dim_v], parts[part + dim_v + 1] = top[i], mass[i]

    floats, cache, ints = types.float32[:, ::1], types.float16[:, :, :, ::1], types.int32[::1]
    arrays = (floats, cache, cache, types.int32[:, ::1], ints, ints, floats, types.float32[::1])
    sizes = (types.int32,) * 4
    return Program(attention, (*arrays, *sizes, types.float32, types.int32, types.int32), threads)


def _merge(threads: int) -> Program:
    """`attention_merge`: (parts, out, n_head, dim_v, splits, n_tok). Grid: (n_head, n_tok)."""
    largest, total = over_block(threads, largest=True), over_block(threads)

    def attention_merge(parts, out, n_head, dim_v, splits, n_tok):
        shares = cuda.shared.array(MAX_SPLITS, np.float32)
        sums = cuda.shared.array(threads, np.float32)
        head, t, me = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
        if t >= n_tok:
            return
        step = n_head * (dim_v + 2)
        base = t * splits * step + head * (dim_v + 2)
        best = _LOW
        for s in range(me, splits, threads):
            best = max(best, parts[base + s * step + dim_v])
        best = largest(best)
        mass = _ZERO
        for s in range(me, splits, threads):
            at = base + s * step + dim_v
            share = np.float32(math.exp(parts[at] - best)) if parts[at + 1] > _ZERO else _ZERO
            shares[s] = share
            mass += share * parts[at + 1]
        inverse = _ONE / total(mass)
        cuda.syncthreads()
        teams = max(1, threads // dim_v)  # each takes every so many splits; a thread of it, one dimension
        width = threads // teams
        team, lane = me // width, me % width
        for d0 in range(0, dim_v, width):
            value = _ZERO
            if team < teams and d0 + lane < dim_v:
                for s in range(team, splits, teams):
                    if shares[s] > _ZERO:
                        value += shares[s] * parts[base + s * step + d0 + lane]
            sums[me] = value
            cuda.syncthreads()
            if team == 0 and d0 + lane < dim_v:
                for other in range(1, teams):
                    value += sums[other * width + lane]
                out[t, head * dim_v + d0 + lane] = value * inverse
            cuda.syncthreads()

    signature = (types.float32[::1], types.float32[:, ::1]) + (types.int32,) * 4
    return Program(attention_merge, signature, threads)

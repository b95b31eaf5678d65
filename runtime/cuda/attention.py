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
from .jit import WARP, Program, simulated
from .reduce import over_block, over_lanes, wait_lanes

_SHAPES = [f"{size}x{queries}" for size, choices in SIZES.items() for queries in choices]
VARIANTS = {"attention": [*_SHAPES, *(f"{shape}:softcap" for shape in _SHAPES)], "attention_merge": [""]}

_LOW = np.float32(-1e30)  # a score that no real one goes below
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_AHEAD = 8  # loads of the cache that a thread has under way


@cuda.jit(device=True)
def _tanh(x):  # type: ignore[no-untyped-def]
    """Not math.tanh, which fast mode makes an instruction with errors of 5e-4."""
    e = np.float32(math.exp(-np.float32(2.0) * abs(x)))
    t = (_ONE - e) / (_ONE + e)
    return t if x >= _ZERO else -t


def build(family: str, variant: str, lanes: int) -> Program:
    """`attention:SIZExQUERIES` for heads of up to that size, `:softcap` with capped scores; or `attention_merge`."""
    if family == "attention_merge":
        return _merge(1024 if lanes == WARP else lanes)
    shape, _, capped = variant.partition(":")
    size, queries = (int(number) for number in shape.split("x"))
    return _attention(size, queries, bool(capped), lanes)


def _attention(size: int, queries: int, capped: bool, lanes: int) -> Program:
    """(q, keys, values, tables, seq_of, positions, out, parts, *sizes, scale, softcap, window, n_tok).

    sizes: n_head, n_kv, dim_k, dim_v. q [n, n_head * dim_k]; keys and values flat, as rope leaves them; tables int32
    [n_seq, max_blocks]: cache blocks of each sequence; seq_of int32 [n]: the sequence of each token. Token t sees
    positions max(0, p - window + 1) to p = positions[t] (window 0: from 0). capped: a score s is softcap * tanh(s /
    softcap). With one split, out [n, n_head * dim_v]; with more, parts [n_tok, splits, n_head, dim_v + 2]: the
    unnormalised output, its maximum and its sum.
    """
    # In the simulator only blocks of one row may wait within a row: there are several rows where a row is one thread.
    warps = WARPS if lanes == WARP else 2 if lanes == 1 else 1
    threads = lanes * warps
    per_lane, chunks, block = KV_BLOCK // lanes, size // lanes, KV_BLOCK
    largest, total, wait = over_lanes(lanes, threads, largest=True), over_lanes(lanes, threads), wait_lanes(lanes)
    dims_ahead, rows_ahead = _AHEAD, max(1, _AHEAD * lanes // size)
    panel_size, weights_size, merged_size = size * queries, warps * KV_BLOCK * queries, (size + 2) * queries
    acc_shape, score_shape = (queries, chunks), (queries, per_lane)
    align = None if simulated() else 16  # for loads of four

    def attention(
        q, keys, values, tables, seq_of, positions, out, parts,
        n_head, n_kv, dim_k, dim_v, scale, softcap, window, n_tok,
    ):  # fmt: skip
        panel = cuda.shared.array(panel_size, np.float32, align)  # scaled queries [dim_k][queries]
        weights = cuda.shared.array(weights_size, np.float32, align)  # [warps][KV_BLOCK][queries]
        merged = cuda.shared.array(merged_size, np.float32, align)
        row_of = cuda.local.array(queries, np.int32)  # token of the tile, or -1
        head_of = cuda.local.array(queries, np.int32)
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
        h = cuda.blockIdx.x // tiles
        rows = max(1, queries // group)  # tokens of a tile
        token = cuda.blockIdx.y * rows
        rows = min(rows, n_tok - token)

        row, member = 0, cuda.blockIdx.x % tiles * queries
        for i in range(queries):
            row_of[i] = row if row < rows and member < group else -1
            head_of[i] = h * group + member
            for d in range(me, dim_k, threads):
                x = q[token + row, head_of[i] * dim_k + d] if row_of[i] >= 0 else _ZERO
                panel[d * queries + i] = x * scale
            top[i], mass[i] = _LOW, _ZERO
            for c in range(chunks):
                acc[i, c] = _ZERO
            member += 1
            if member == group and tiles == 1:
                row, member = row + 1, 0
        cuda.syncthreads()

        # Offsets are unsigned: Numba would test signed ones for being negative.
        head_keys, head_values = np.uint64(block * dim_k), np.uint64(block * dim_v)
        own = np.uint64(warp * block * queries)
        start = 0
        while start < rows:  # rows of one sequence at a time
            sequence = seq_of[token + start]
            end = start + 1
            while end < rows and seq_of[token + end] == sequence:
                end += 1
            low, high = 1 << 30, 0
            for i in range(queries):
                first[i], last[i] = 0, 0
                if row_of[i] >= start and row_of[i] < end:
                    last[i] = positions[token + row_of[i]] + 1
                    first[i] = max(0, last[i] - window) if window > 0 else 0
                    low, high = min(low, first[i]), max(high, last[i])
            begin = low // block
            n_blocks = (high + block - 1) // block - begin
            stop = begin + n_blocks * (split + 1) // splits
            for b in range(begin + n_blocks * split // splits + warp, stop, warps):
                page = np.uint64(tables[sequence, b] * n_kv + h)
                for r in range(per_lane):
                    for i in range(queries):
                        score[i, r] = _ZERO
                    at, p = page * head_keys + np.uint64(lane + r * lanes), np.uint64(0)
                    for _ in range(dim_k // dims_ahead):
                        for u in range(dims_ahead):
                            key = np.float32(keys[at + np.uint64(u * block)])
                            for i in range(queries):
                                score[i, r] += panel[p + np.uint64(u * queries + i)] * key
                        at += np.uint64(dims_ahead * block)
                        p += np.uint64(dims_ahead * queries)
                    for _ in range(dim_k % dims_ahead):
                        key = np.float32(keys[at])
                        for i in range(queries):
                            score[i, r] += panel[p + np.uint64(i)] * key
                        at += np.uint64(block)
                        p += np.uint64(queries)
                wait()  # whoever still reads the last block's weights
                for i in range(queries):
                    best = _LOW
                    for r in range(per_lane):
                        position = b * block + lane + r * lanes
                        if capped:
                            score[i, r] = softcap * _tanh(score[i, r] / softcap)
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
                        weight = np.float32(math.exp(score[i, r] - best)) if score[i, r] > _LOW else _ZERO
                        weights[own + np.uint64((lane + r * lanes) * queries + i)] = weight
                        mass[i] += weight
                wait()
                here = min(block, high - b * block)  # what lies behind has never been written
                at, p = page * head_values, own
                for _ in range(here // rows_ahead):
                    for u in range(rows_ahead):
                        for c in range(chunks):  # past the end, the last dimension again, for nothing
                            value = np.float32(values[at + np.uint64(min(lane + c * lanes, dim_v - 1))])
                            for i in range(queries):
                                acc[i, c] += weights[p + np.uint64(u * queries + i)] * value
                        at += np.uint64(dim_v)
                    p += np.uint64(rows_ahead * queries)
                for _ in range(here % rows_ahead):
                    for c in range(chunks):
                        value = np.float32(values[at + np.uint64(min(lane + c * lanes, dim_v - 1))])
                        for i in range(queries):
                            acc[i, c] += weights[p + np.uint64(i)] * value
                    at += np.uint64(dim_v)
                    p += np.uint64(queries)
            start = end

        for i in range(queries):
            mass[i] = total(mass[i])
        for other in range(1, warps):  # the first warp adds the others, one by one
            if warp == other:
                for i in range(queries):
                    merged[i], merged[queries + i] = top[i], mass[i]
                    for c in range(chunks):
                        merged[(lane + c * lanes + 2) * queries + i] = acc[i, c]
            cuda.syncthreads()
            if warp == 0:
                for i in range(queries):
                    best = max(top[i], merged[i])
                    ours, theirs = np.float32(math.exp(top[i] - best)), np.float32(math.exp(merged[i] - best))
                    top[i] = best
                    mass[i] = mass[i] * ours + merged[queries + i] * theirs
                    for c in range(chunks):
                        acc[i, c] = acc[i, c] * ours + merged[(lane + c * lanes + 2) * queries + i] * theirs
            cuda.syncthreads()
        if warp > 0:
            return
        for i in range(queries):
            if row_of[i] >= 0:
                t, head = token + row_of[i], head_of[i]
                inverse = _ONE / mass[i] if splits == 1 else _ONE
                for c in range(chunks):
                    d = lane + c * lanes
                    if d < dim_v:
                        if splits == 1:
                            out[t, head * dim_v + d] = acc[i, c] * inverse
                        else:
                            parts[t, split, head, d] = acc[i, c]
                if splits > 1 and lane == 0:
                    parts[t, split, head, dim_v], parts[t, split, head, dim_v + 1] = top[i], mass[i]

    floats, cache, ints = types.float32[:, ::1], types.float16[::1], types.int32[::1]
    arrays = (floats, cache, cache, types.int32[:, ::1], ints, ints, floats, types.float32[:, :, :, ::1])
    sizes = (types.int32,) * 4
    numbers = types.float32, types.float32, types.int32, types.int32
    return Program(attention, (*arrays, *sizes, *numbers), threads)


def _merge(threads: int) -> Program:
    """`attention_merge`: (parts [n_tok, splits, n_head, dim_v + 2], out, n_tok). Grid: (n_head, n_tok)."""
    largest, total = over_block(threads, largest=True), over_block(threads)

    def attention_merge(parts, out, n_tok):
        shares = cuda.shared.array(MAX_SPLITS, np.float32)
        sums = cuda.shared.array(threads, np.float32)
        head, t, me = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
        if t >= n_tok:
            return
        splits, dim_v = parts.shape[1], parts.shape[3] - 2
        best = _LOW
        for s in range(me, splits, threads):
            best = max(best, parts[t, s, head, dim_v])
        best = largest(best)
        mass = _ZERO
        for s in range(me, splits, threads):
            part = parts[t, s, head, dim_v + 1]
            shares[s] = np.float32(math.exp(parts[t, s, head, dim_v] - best)) if part > _ZERO else _ZERO
            mass += shares[s] * part
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
                        value += shares[s] * parts[t, s, head, d0 + lane]
            sums[me] = value
            cuda.syncthreads()
            if team == 0 and d0 + lane < dim_v:
                for other in range(1, teams):
                    value += sums[other * width + lane]
                out[t, head * dim_v + d0 + lane] = value * inverse
            cuda.syncthreads()

    return Program(attention_merge, (types.float32[:, :, :, ::1], types.float32[:, ::1], types.int32), threads)

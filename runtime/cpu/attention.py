"""Causal attention over the paged KV cache, with grouped queries, a sliding window and an online softmax.

Work is split by (tile of query tokens, key-value head). The queries of a tile that share a head go through the cache
a few at a time, block by block, keeping a running maximum and sum (Milakov and Gimelshein 2018, as in FlashAttention).
"""

from __future__ import annotations

from typing import Any

from .layout import KV_BLOCK, Attention, Step
from .loads import f32_at, f64_at, i32_at, i64_at, load_f16, load_f32, put_f32, put_i32, store, store_dwords
from .simd import hmax, hsum, lane_numbers, splat_f32, splat_i32, where_less
from .tape import finish, take
from .tiles import tile_fma, tile_store, tile_zero
from .vector import LANES
from .vmath import exp, tanh
from .weights import inline

_LOW = -1e30  # a score that no real one goes below


def _pass(tokens: int, capped: bool) -> Any:
    """One pass of `tokens` queries over the cache blocks that they see."""
    block, lanes, low = KV_BLOCK, LANES, _LOW
    wide = LANES * 4

    @inline
    def attend(room, limits, keys, values, table, kv_head, n_kv, dim_k, dim_v, window, cap):
        """Leaves the unnormalised output in `o` [tokens][o_stride], sums in `state` [2][tokens] (maximum, sum).

        room: the thread's scratch, as laid out by `build`. limits: int32 [tokens], one past the last position that
        each query sees.
        """
        state, scores, weights, o, o_stride, q_panel = room
        last, first = 0, 1 << 30
        for t in range(tokens):
            put_f32(state + t * 4, low)
            put_f32(state + (tokens + t) * 4, 0.0)
            last = max(last, i32_at(limits + t * 4))
            first = min(first, i32_at(limits + t * 4))
        first = max(0, first - window) if window > 0 else 0
        for t in range(tokens):
            for c in range(0, dim_v, lanes):
                store(o + t * o_stride + c * 4, splat_f32(0.0, lanes))
        for b in range(first // block, (last + block - 1) // block):
            page = i32_at(table + b * 4) * n_kv + kv_head
            kb, vb = keys + page * dim_k * block * 2, values + page * dim_v * block * 2
            for j in range(0, block, lanes):
                tile = tile_zero(splat_f32(0.0, lanes), tokens)
                for d in range(dim_k):
                    tile = tile_fma(tile, load_f16(kb + (d * block + j) * 2, lanes), q_panel + d * 4 * tokens)
                tile_store(scores + j * 4, tile, block * 4)
            positions = lane_numbers(block) + splat_i32(b * block, block)
            for t in range(tokens):
                limit = i32_at(limits + t * 4)
                start = limit - window - 1 if window > 0 else -1  # the last position that is hidden
                hidden = splat_f32(low, block)
                s = load_f32(scores + t * block * 4, block)
                if capped:
                    s = splat_f32(cap, block) * tanh(s * splat_f32(1.0 / cap, block), block)
                s = where_less(positions, splat_i32(limit, block), s, hidden)
                s = where_less(splat_i32(start, block), positions, s, hidden)
                old = f32_at(state + t * 4)
                top = max(old, hmax(s))
                p = exp(s - splat_f32(top, block), block)
                nothing = splat_f32(0.0, block)
                p = where_less(positions, splat_i32(limit, block), p, nothing)
                p = where_less(splat_i32(start, block), positions, p, nothing)
                store_dwords(weights + t * 4, p, 4 * tokens)
                total = f32_at(state + (tokens + t) * 4)
                if top > old:
                    factor = hsum(exp(splat_f32(old - top, 4), 4)) * 0.25
                    total = total * factor
                    for c in range(0, dim_v, lanes):
                        at = o + t * o_stride + c * 4
                        store(at, load_f32(at, lanes) * splat_f32(factor, lanes))
                    put_f32(state + t * 4, top)
                put_f32(state + (tokens + t) * 4, total + hsum(p))
            here = min(block, last - b * block)
            for c in range(0, dim_v, lanes):
                tile = tile_zero(splat_f32(0.0, lanes), tokens)
                for j in range(here):
                    tile = tile_fma(tile, load_f16(vb + (j * dim_v + c) * 2, lanes), weights + j * 4 * tokens)
                tile_store(scores, tile, wide)
                for t in range(tokens):
                    at = o + t * o_stride + c * 4
                    store(at, load_f32(at, lanes) + load_f32(scores + t * wide, lanes))

    return attend


def build(family: str, variant: str) -> Any:
    """`attention`, and `attention:softcap` with scores cap * tanh(score / cap) (Gemma 2, arXiv:2408.00118)."""
    args_of, step_of = Attention, Step
    many, block, lanes = 4, KV_BLOCK, LANES
    attend_many, attend_one = _pass(many, variant == "softcap"), _pass(1, variant == "softcap")

    def attention(args, step, ith, turn):
        n_tiles, tiles = i64_at(step + step_of.n_tiles), i64_at(step + step_of.tiles)
        positions, tables = i64_at(step + step_of.positions), i64_at(step + step_of.tables)
        q, out = i64_at(args + args_of.q), i64_at(args + args_of.out)
        n_head, n_kv = i64_at(args + args_of.n_head), i64_at(args + args_of.n_kv)
        dim_k, dim_v = i64_at(args + args_of.dim_k), i64_at(args + args_of.dim_v)
        keys, values = i64_at(args + args_of.keys), i64_at(args + args_of.values)
        scale, window = f64_at(args + args_of.scale), i64_at(args + args_of.window)
        cap = f64_at(args + args_of.softcap)
        group = n_head // n_kv
        o_stride = ((dim_v + lanes - 1) // lanes) * lanes * 4
        scratch = i64_at(args + args_of.scratch) + ith * i64_at(args + args_of.scratch_bytes)
        state, limits = scratch, scratch + 64
        scores = scratch + 128
        weights = scores + many * block * 4
        o = weights + many * block * 4
        q_panel = o + many * o_stride
        room = (state, scores, weights, o, o_stride, q_panel)
        n_chunks = n_tiles * n_kv
        while True:
            chunk = take(args, turn, n_chunks)
            if chunk < 0:
                break
            tile, h = tiles + (chunk // n_kv) * 12, chunk % n_kv
            first, count = i32_at(tile), i32_at(tile + 4)
            table = i64_at(tables + i32_at(tile + 8) * 8)
            n_query = count * group
            at = 0
            while at < n_query:
                here = many if n_query - at > 1 else 1
                for t in range(here):
                    i = min(at + t, n_query - 1)  # a short tile repeats its last query
                    token, head = first + i // group, h * group + i % group
                    source = q + (token * n_head + head) * dim_k * 4
                    for d in range(dim_k):
                        put_f32(q_panel + (d * here + t) * 4, f32_at(source + d * 4) * scale)
                    put_i32(limits + t * 4, i32_at(positions + token * 4) + 1)
                if here == many:
                    attend_many(room, limits, keys, values, table, h, n_kv, dim_k, dim_v, window, cap)
                else:
                    attend_one(room, limits, keys, values, table, h, n_kv, dim_k, dim_v, window, cap)
                for t in range(min(here, n_query - at)):
                    i = at + t
                    token, head = first + i // group, h * group + i % group
                    target = out + (token * n_head + head) * dim_v * 4
                    inverse = 1.0 / f32_at(state + (here + t) * 4)
                    for d in range(dim_v):
                        put_f32(target + d * 4, f32_at(o + t * o_stride + d * 4) * inverse)
                at += here
            finish(args)
        return n_chunks

    return attention

"""Rotary position embedding of queries and keys, and storing keys and values in the KV cache.

The cache keeps keys of a block transposed, [head][dim][KV_BLOCK], so that attention scores of neighbouring positions
are neighbouring lanes; values are [head][KV_BLOCK][dim]. Both float16.
"""

from __future__ import annotations

from typing import Any

from .layout import KV_BLOCK, Rope, Step
from .loads import f32_at, i32_at, i64_at, put_f16, put_f32
from .tape import finish, take
from .weights import inline


def build(family: str, variant: str) -> Any:
    """`rope:norm` rotates pairs (2i, 2i+1), `rope:neox` pairs (i, i + rope_dim / 2)."""
    args_of, step_of, block = Rope, Step, KV_BLOCK
    neox = variant == "neox"

    @inline
    def rotate(x, table, rope_dim):
        half = rope_dim // 2
        for i in range(half):
            a = x + (i * 4 if neox else i * 8)
            b = a + (half * 4 if neox else 4)
            c, s = f32_at(table + i * 4), f32_at(table + (half + i) * 4)
            u, v = f32_at(a), f32_at(b)
            put_f32(a, u * c - v * s)
            put_f32(b, u * s + v * c)

    def rope(args, step, ith, turn):
        n_tok = i64_at(step + step_of.n_tok)
        q, k, v = i64_at(args + args_of.q), i64_at(args + args_of.k), i64_at(args + args_of.v)
        n_head, n_kv = i64_at(args + args_of.n_head), i64_at(args + args_of.n_kv)
        dim_k, dim_v, rope_dim = (
            i64_at(args + args_of.dim_k),
            i64_at(args + args_of.dim_v),
            i64_at(args + args_of.rope_dim),
        )
        keys, values = i64_at(args + args_of.keys), i64_at(args + args_of.values)
        positions, slots = i64_at(step + step_of.positions), i64_at(step + step_of.slots)
        group = n_head // n_kv
        n_chunks = n_tok * n_kv
        while True:
            c = take(args, turn, n_chunks)
            if c < 0:
                break
            t, h = c // n_kv, c % n_kv
            table = i64_at(args + args_of.table) + i32_at(positions + t * 4) * rope_dim * 4
            for g in range(group):
                rotate(q + ((t * n_head + h * group + g) * dim_k) * 4, table, rope_dim)
            key = k + ((t * n_kv + h) * dim_k) * 4
            rotate(key, table, rope_dim)
            slot = i32_at(slots + t * 4)
            at, lane = slot // block, slot % block
            to_k = keys + ((at * n_kv + h) * dim_k * block + lane) * 2
            for i in range(dim_k):
                put_f16(to_k + i * block * 2, f32_at(key + i * 4))
            value = v + ((t * n_kv + h) * dim_v) * 4
            to_v = values + ((at * n_kv + h) * block + lane) * dim_v * 2
            for i in range(dim_v):
                put_f16(to_v + i * 2, f32_at(value + i * 4))
            finish(args)
        return n_chunks

    return rope

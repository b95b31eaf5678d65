"""Rotary position embedding of queries and keys, and storing keys and values in the KV cache."""

from __future__ import annotations

from numba import cuda, types

from ..cpu.layout import KV_BLOCK
from .jit import WARP, Program

VARIANTS = {"rope": ["norm", "neox"]}


def build(family: str, variant: str, lanes: int) -> Program:
    """`rope:norm` rotates pairs (2i, 2i+1), `rope:neox` pairs (i, i + rope_dim / 2). Grid: (n_tok, n_kv).

    (q, k, v, positions, slots, table, keys, values, n_head, n_kv, dim_k, dim_v, rope_dim, n_tok). q [n, n_head * dim_k]
    is rotated in place; k and v [n, n_kv * dim] stay, and go, k rotated, to each token's slot in the cache, float16 and
    flat: keys [n_blocks][n_kv][dim_k][KV_BLOCK], values [n_blocks][n_kv][KV_BLOCK][dim_v]. table [n_ctx, rope_dim]:
    cosines, then sines, as RopeTable makes it.
    """
    threads, block = (128 if lanes == WARP else lanes), KV_BLOCK
    neox = variant == "neox"

    def rope(q, k, v, positions, slots, table, keys, values, n_head, n_kv, dim_k, dim_v, rope_dim, n_tok):
        t, h, me = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
        if t >= n_tok:
            return
        page, lane = slots[t] // block * n_kv + h, slots[t] % block
        to_keys, to_values = page * dim_k * block + lane, (page * block + lane) * dim_v
        position, half, group = positions[t], rope_dim // 2, n_head // n_kv
        for p in range(me, (group + 1) * half, threads):
            head, i = p // half, p % half
            a = i if neox else 2 * i
            b = i + half if neox else 2 * i + 1
            c, s = table[position, i], table[position, half + i]
            if head < group:
                at = (h * group + head) * dim_k
                x, y = q[t, at + a], q[t, at + b]
                q[t, at + a] = x * c - y * s
                q[t, at + b] = x * s + y * c
            else:
                x, y = k[t, h * dim_k + a], k[t, h * dim_k + b]
                keys[to_keys + a * block] = x * c - y * s
                keys[to_keys + b * block] = x * s + y * c
        for i in range(rope_dim + me, dim_k, threads):
            keys[to_keys + i * block] = k[t, h * dim_k + i]
        for i in range(me, dim_v, threads):
            values[to_values + i] = v[t, h * dim_v + i]

    floats, ints, cache = types.float32[:, ::1], types.int32[::1], types.float16[::1]
    sizes = (types.int32,) * 6
    return Program(rope, (floats, floats, floats, ints, ints, floats, cache, cache, *sizes), threads)

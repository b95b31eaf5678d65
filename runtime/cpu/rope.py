"""Rotary position embedding of queries and keys, and storing keys and values in the KV cache (kv_types.py)."""

from __future__ import annotations

from typing import Any

from .layout import KV_BLOCK, Rope, Step
from .loads import (
    f32_at,
    i32_at,
    i64_at,
    load_f32,
    put_f16,
    put_f32,
    store,
    store_bytes,
    store_dwords,
    store_f16,
    store_halves,
)
from .simd import (
    bor,
    bxor,
    hmax,
    narrow_i8,
    negate_even,
    part,
    round_to_i32,
    shl,
    splat_f32,
    splat_i32,
    spread,
    swap_pairs,
    vabs,
    vmin,
)
from .tape import finish, take
from .weights import inline

_RUN = 16  # tokens of a prompt that a thread takes at a time: neighbours share cache lines


@inline
def _quants_8(x):
    """Signed quants and scale of 32 values."""
    top = hmax(vabs(x))
    return narrow_i8(round_to_i32(x * splat_f32(127.0 / max(top, 1e-30), 32))), top / 127.0


@inline
def _nibbles(x, scale):
    """32 values by a scale, plus 8, two in a byte: the first 16 low."""
    inverse = 1.0 / scale if abs(scale) > 1e-30 else 0.0
    q = round_to_i32(vmin(x * splat_f32(inverse, 32), splat_f32(7.0, 32)))
    q = q + splat_i32(8, 32)
    return narrow_i8(bor(part(q, 0, 16), shl(part(q, 16, 16), 4)))


def build(family: str, variant: str) -> Any:
    """`rope:norm` rotates pairs (2i, 2i+1), `rope:neox` pairs (i, i + rope_dim / 2)."""
    args_of, step_of, block, run = Rope, Step, KV_BLOCK, _RUN
    neox = variant == "neox"

    @inline
    def rotate(x, table, rope_dim):
        half = rope_dim // 2
        i = 0
        while i + 16 <= half:
            c, s = load_f32(table + i * 4, 16), load_f32(table + (half + i) * 4, 16)
            if neox:
                u, v = load_f32(x + i * 4, 16), load_f32(x + (half + i) * 4, 16)
                store(x + i * 4, u * c - v * s)
                store(x + (half + i) * 4, u * s + v * c)
            else:
                pairs = load_f32(x + i * 8, 32)
                turned = negate_even(swap_pairs(pairs)) * spread(s, 0, 2, 32)
                store(x + i * 8, pairs * spread(c, 0, 2, 32) + turned)
            i += 16
        while i < half:
            a = x + (i * 4 if neox else i * 8)
            b = a + (half * 4 if neox else 4)
            cosine, sine = f32_at(table + i * 4), f32_at(table + (half + i) * 4)
            first, second = f32_at(a), f32_at(b)
            put_f32(a, first * cosine - second * sine)
            put_f32(b, first * sine + second * cosine)
            i += 1

    @inline
    def put_key(key, page, lane, dim, kind):
        if kind == 0:
            i = 0
            while i + 16 <= dim:
                store_halves(page + (i * block + lane) * 2, load_f32(key + i * 4, 16), block * 2)
                i += 16
            while i < dim:
                put_f16(page + (i * block + lane) * 2, f32_at(key + i * 4))
                i += 1
            return
        for i in range(0, dim, 32):
            x, quants = load_f32(key + i * 4, 32), page + 2 * block + lane * 4
            if kind == 1:
                q, scale = _quants_8(x)
                store_dwords(quants, bxor(q, -128), 4 * block)
                put_f16(page + lane * 2, scale)
                page += 34 * block
            else:  # the largest value is -8 times the scale, whatever its sign
                top, bottom = hmax(x), hmax(splat_f32(0.0, 32) - x)
                scale = (-top if top >= bottom else bottom) / 8.0
                store_dwords(quants, _nibbles(x, scale), 4 * block)
                put_f16(page + lane * 2, scale)
                page += 18 * block

    @inline
    def put_value(value, page, lane, dim, kind):
        if kind == 0:
            i, to = 0, page + lane * dim * 2
            while i + 16 <= dim:
                store_f16(to + i * 2, load_f32(value + i * 4, 16))
                i += 16
            while i < dim:
                put_f16(to + i * 2, f32_at(value + i * 4))
                i += 1
            return
        for i in range(0, dim, 32):
            x = load_f32(value + i * 4, 32)
            if kind == 1:
                q, scale = _quants_8(x)
                store_bytes(page + 2 * block + lane // 4 * 128 + lane % 4, q, 4)
                put_f16(page + lane * 2, scale)
                page += 34 * block
            else:  # scales that are not negative: weights times them have to be unsigned
                scale = max(hmax(x) / 7.0, hmax(splat_f32(0.0, 32) - x) / 8.0)
                store_bytes(page + 2 * block + lane // 4 * 64 + lane % 4, _nibbles(x, scale), 4)
                put_f16(page + lane * 2, scale)
                page += 18 * block

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
        key_type, value_type = i64_at(args + args_of.key_type), i64_at(args + args_of.value_type)
        key_bytes, value_bytes = i64_at(args + args_of.key_bytes), i64_at(args + args_of.value_bytes)
        positions, slots = i64_at(step + step_of.positions), i64_at(step + step_of.slots)
        group = n_head // n_kv
        each = run if n_tok > 2 * run else 1
        n_chunks = (n_tok + each - 1) // each * n_kv
        while True:
            c = take(args, turn, n_chunks)
            if c < 0:
                break
            h = c % n_kv
            for t in range(c // n_kv * each, min(n_tok, (c // n_kv + 1) * each)):
                table = i64_at(args + args_of.table) + i32_at(positions + t * 4) * rope_dim * 4
                for g in range(group):
                    rotate(q + ((t * n_head + h * group + g) * dim_k) * 4, table, rope_dim)
                key, value = k + ((t * n_kv + h) * dim_k) * 4, v + ((t * n_kv + h) * dim_v) * 4
                rotate(key, table, rope_dim)
                slot = i32_at(slots + t * 4)
                page, lane = slot // block * n_kv + h, slot % block
                put_key(key, keys + page * key_bytes, lane, dim_k, key_type)
                put_value(value, values + page * value_bytes, lane, dim_v, value_type)
            finish(args)
        return n_chunks

    return rope

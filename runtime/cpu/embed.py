"""Token embeddings: rows of the embedding table as float32, one kernel a weight type."""

from __future__ import annotations

from typing import Any

from .layout import Embed, Step
from .loads import f16_at, f32_at, f64_at, i32_at, i64_at, load_bf16, load_f16, load_f32, put_f32, store
from .simd import fma, hsum, part, splat_f32, spread, unsigned_to_f32
from .tape import finish, take
from .weights import FLOAT, PLAIN, SUPER, inline


def build(family: str, variant: str) -> Any:
    """Rows of the table times `gain`, by token id or, added to what is there, by position."""
    args_of, step_of = Embed, Step
    dequantise = dequantiser(variant)

    def embed(args, step, ith, turn):
        n_tok, ids = i64_at(step + step_of.n_tok), i64_at(step + i64_at(args + args_of.at))
        w, out, k, row_bytes = (
            i64_at(args + args_of.w),
            i64_at(args + args_of.out),
            i64_at(args + args_of.k),
            i64_at(args + args_of.row_bytes),
        )
        gain, add = f64_at(args + args_of.gain), i64_at(args + args_of.add)
        spare = i64_at(args + args_of.scratch) + ith * i64_at(args + args_of.scratch_bytes)
        while True:
            t = take(args, turn, n_tok)
            if t < 0:
                break
            to = out + t * k * 4
            row = w + i32_at(ids + t * 4) * row_bytes
            if add != 0:
                dequantise(row, spare, k)
                for i in range(k):
                    put_f32(to + i * 4, f32_at(to + i * 4) + f32_at(spare + i * 4) * gain)
            else:
                dequantise(row, to, k)
                if gain != 1.0:
                    for i in range(k):
                        put_f32(to + i * 4, f32_at(to + i * 4) * gain)
            finish(args)
        return n_tok

    return embed


def dequantiser(variant: str) -> Any:
    """(row address, output address, k): one row as float32."""
    if variant in FLOAT:
        size = FLOAT[variant]
        load = {"F32": load_f32, "F16": load_f16, "BF16": load_bf16}[variant]

        @inline
        def floats(p, to, k):
            for i in range(k):
                put_f32(to + i * 4, hsum(load(p + i * size, 1)))

        return floats
    if variant in PLAIN:
        t = PLAIN[variant]
        n_bytes, quants, has_min, offset = t.n_bytes, t.quants, t.has_min, -float(t.offset)

        @inline
        def plain(p, to, k):
            for b in range(k // 32):
                d = f16_at(p)
                m = f16_at(p + 2) if has_min else d * offset
                store(to + b * 128, fma(unsigned_to_f32(quants(p)), splat_f32(d, 32), splat_f32(m, 32)))
                p += n_bytes

        return plain
    s = SUPER[variant]
    n_bytes, quants, scales, minima, has_min, offset = (
        s.n_bytes,
        s.quants,
        s.scales,
        s.minima,
        s.has_min,
        -float(s.offset),
    )
    n_sub, group = 256 // s.group, s.group
    second, third, fourth = (i * 32 // group for i in (1, 2, 3))  # sub-blocks where they begin

    @inline
    def put(u, sc, mn, first, to):
        store(to, fma(unsigned_to_f32(u), spread(sc, first, group, 32), spread(mn, first, group, 32)))

    half_sub = n_sub // 2

    @inline
    def put_half(us, sc, mn, to):
        u0, u1, u2, u3 = us
        put(u0, sc, mn, 0, to)
        put(u1, sc, mn, second, to + 128)
        put(u2, sc, mn, third, to + 256)
        put(u3, sc, mn, fourth, to + 384)

    @inline
    def blocks(p, to, k):
        for i in range(k // 256):
            sc = scales(p)
            mn = minima(p) if has_min else sc * splat_f32(offset, n_sub)
            put_half(quants(p, 0), sc, mn, to + i * 1024)
            put_half(quants(p, 1), part(sc, half_sub, half_sub), part(mn, half_sub, half_sub), to + i * 1024 + 512)
            p += n_bytes

    return blocks

"""The down projection of the listed neurons: out += sum over neurons of h * row, the rows being ffn_down's columns.

A chunk is a span of output columns, summed over all listed neurons in their order, so the result does not depend on
how many threads there are. Four rows at a time share one pass over the sums.
"""

from __future__ import annotations

from typing import Any

from .layout import Choice, Down, Step
from .loads import f16_at, f32_at, i32_at, i64_at, load_bf16, load_f16, load_f32, prefetch, put_f32, store
from .simd import fma, hsum, part, splat_f32, spread, unsigned_to_f32
from .tape import finish, take
from .vector import LANES
from .weights import FLOAT, PLAIN, SUPER, Plain, Super, inline

SPAN = {**dict.fromkeys(FLOAT, 1), **dict.fromkeys(PLAIN, 32), **dict.fromkeys(SUPER, 256)}  # columns of a block


def _add_floats(name: str) -> Any:
    """(sums, row, columns, h): sums += h * row for float weights."""
    size = FLOAT[name]
    load = {"F32": load_f32, "F16": load_f16, "BF16": load_bf16}[name]
    lanes = LANES

    @inline
    def add(sums, p, n, h):
        i = 0
        scale = splat_f32(h, lanes)
        while i + lanes <= n:
            store(sums + i * 4, fma(load(p + i * size, lanes), scale, load_f32(sums + i * 4, lanes)))
            i += lanes
        while i < n:
            put_f32(sums + i * 4, f32_at(sums + i * 4) + hsum(load(p + i * size, 1)) * h)
            i += 1

    return add


def _add_plain(t: Plain) -> tuple[Any, Any]:
    """The same for blocks of 32, and (sums, four rows, columns, four h)."""
    size, quants, has_min, offset = t.n_bytes, t.quants, t.has_min, -float(t.offset)

    @inline
    def scaled(p, h):
        """(scale, minimum), each times h."""
        d = f16_at(p) * h
        return d, f16_at(p + 2) * h if has_min else d * offset

    @inline
    def add(sums, p, n, h):
        for b in range(n // 32):
            d, m = scaled(p, h)
            v = fma(unsigned_to_f32(quants(p)), splat_f32(d, 32), load_f32(sums + b * 128, 32) + splat_f32(m, 32))
            store(sums + b * 128, v)
            p += size

    @inline
    def add_four(sums, p0, p1, p2, p3, n, h0, h1, h2, h3):
        for b in range(n // 32):
            o = b * size
            d0, m0 = scaled(p0 + o, h0)
            d1, m1 = scaled(p1 + o, h1)
            d2, m2 = scaled(p2 + o, h2)
            d3, m3 = scaled(p3 + o, h3)
            v = load_f32(sums + b * 128, 32) + splat_f32((m0 + m1) + (m2 + m3), 32)
            v = fma(unsigned_to_f32(quants(p0 + o)), splat_f32(d0, 32), v)
            v = fma(unsigned_to_f32(quants(p1 + o)), splat_f32(d1, 32), v)
            v = fma(unsigned_to_f32(quants(p2 + o)), splat_f32(d2, 32), v)
            v = fma(unsigned_to_f32(quants(p3 + o)), splat_f32(d3, 32), v)
            store(sums + b * 128, v)

    return add, add_four


def _add_super(t: Super) -> Any:
    """The same for blocks of 256."""
    size, quants, scales, minima = t.n_bytes, t.quants, t.scales, t.minima
    has_min, offset, group = t.has_min, -float(t.offset), t.group
    n_sub = 256 // group
    second, third, fourth = (i * 32 // group for i in (1, 2, 3))  # sub-blocks where they begin
    half_sub = n_sub // 2

    @inline
    def put(sums, u, sc, mn, first):
        v = load_f32(sums, 32) + spread(mn, first, group, 32)
        store(sums, fma(unsigned_to_f32(u), spread(sc, first, group, 32), v))

    @inline
    def put_half(sums, us, sc, mn):
        u0, u1, u2, u3 = us
        put(sums, u0, sc, mn, 0)
        put(sums + 128, u1, sc, mn, second)
        put(sums + 256, u2, sc, mn, third)
        put(sums + 384, u3, sc, mn, fourth)

    @inline
    def add(sums, p, n, h):
        for b in range(n // 256):
            sc = scales(p) * splat_f32(h, n_sub)
            mn = minima(p) * splat_f32(h, n_sub) if has_min else sc * splat_f32(offset, n_sub)
            put_half(sums + b * 1024, quants(p, 0), sc, mn)
            put_half(sums + b * 1024 + 512, quants(p, 1), part(sc, half_sub, half_sub), part(mn, half_sub, half_sub))
            p += size

    return add


def build(family: str, variant: str) -> Any:
    """The kernel of a weight type."""
    args_of, step_of, choice_of = Down, Step, Choice
    four = variant in PLAIN
    if four:
        add, add_four = _add_plain(PLAIN[variant])
        block_bytes = PLAIN[variant].n_bytes
    elif variant in SUPER:
        add = add_four = _add_super(SUPER[variant])
        block_bytes = SUPER[variant].n_bytes
    else:
        add = add_four = _add_floats(variant)
        block_bytes = FLOAT[variant]
    block = SPAN[variant]

    @inline
    def fetch(p, n_bytes):
        for i in range(0, n_bytes, 64):
            prefetch(p + i, 64)

    def down(args, step, ith, turn):
        n_tok = i64_at(step + step_of.n_tok)
        count = i64_at(i64_at(args + args_of.choice) + choice_of.count)
        w, out, n = i64_at(args + args_of.w), i64_at(args + args_of.out), i64_at(args + args_of.n)
        h, h_stride = i64_at(args + args_of.h), i64_at(args + args_of.h_stride) * 4
        row_bytes, listed = i64_at(args + args_of.row_bytes), i64_at(args + args_of.list)
        columns, ahead = i64_at(args + args_of.columns), i64_at(args + args_of.ahead)
        sums = i64_at(args + args_of.scratch) + ith * i64_at(args + args_of.scratch_bytes)
        n_chunks = (n + columns - 1) // columns
        while True:
            first = take(args, turn, n_chunks) * columns
            if first < 0:
                break
            here = min(columns, n - first)
            span = here // block * block_bytes
            base = w + first // block * block_bytes
            for t in range(n_tok):
                for i in range(here):
                    put_f32(sums + (t * columns + i) * 4, 0.0)
            i = 0
            if four:
                while i + 4 <= count:
                    p0 = base + i32_at(listed + i * 4) * row_bytes
                    p1 = base + i32_at(listed + i * 4 + 4) * row_bytes
                    p2 = base + i32_at(listed + i * 4 + 8) * row_bytes
                    p3 = base + i32_at(listed + i * 4 + 12) * row_bytes
                    for j in range(4):
                        fetch(base + i32_at(listed + min(i + ahead + j, count - 1) * 4) * row_bytes, span)
                    for t in range(n_tok):
                        at = h + t * h_stride + i * 4
                        h0, h1, h2, h3 = f32_at(at), f32_at(at + 4), f32_at(at + 8), f32_at(at + 12)
                        if h0 != 0.0 or h1 != 0.0 or h2 != 0.0 or h3 != 0.0:
                            add_four(sums + t * columns * 4, p0, p1, p2, p3, here, h0, h1, h2, h3)
                    i += 4
            while i < count:
                p = base + i32_at(listed + i * 4) * row_bytes
                fetch(base + i32_at(listed + min(i + ahead, count - 1) * 4) * row_bytes, span)
                for t in range(n_tok):
                    value = f32_at(h + t * h_stride + i * 4)
                    if value != 0.0:
                        add(sums + t * columns * 4, p, here, value)
                i += 1
            for t in range(n_tok):
                for i in range(here):
                    at = out + (t * n + first + i) * 4
                    put_f32(at, f32_at(at) + f32_at(sums + (t * columns + i) * 4))
            finish(args)
        return n_chunks

    return down

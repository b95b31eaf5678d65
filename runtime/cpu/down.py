"""The down projection of the listed neurons: out += sum over neurons of h * row, the rows being ffn_down's columns.

The list is cut into a fixed number of parts, each summed in its own order into sums of its own, and then the parts are
added in theirs: whichever thread takes a part, the result is the same. Whole rows are read, since pages are what costs:
spans of columns would touch every row's pages once a span. Four rows at a time share one pass over the sums.
"""

from __future__ import annotations

from typing import Any

from .layout import AddParts, Choice, Down, Step
from .listed import fetch_first, fetch_row
from .loads import (
    f16_at,
    f32_at,
    i32_at,
    i64_at,
    load_bf16,
    load_f16,
    load_f32,
    load_i8,
    prefetch,
    put_f32,
    spaced_f16,
    splat_f16,
    store,
)
from .simd import concat, fma, hsum, less, nibbles_to_f32, part, splat_f32, spread, to_f32, unsigned_to_f32
from .tape import finish, take
from .vector import LANES
from .weights import FLOAT, PLAIN, SUPER, Plain, Super, inline

_lanes = LANES


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
    size, quants, has_min, offset = t.n_bytes, t.quants, t.has_min, t.offset
    signed, nibbles = t.name == "Q8_0", t.nibbles

    eight = 8 * size

    @inline
    def values(p):
        """32 quants as floats, the constant offset taken off."""
        if signed:
            return to_f32(load_i8(p + 2, 32))
        if nibbles:
            return nibbles_to_f32(load_i8(p + nibbles, 16), offset)
        if has_min:
            return unsigned_to_f32(quants(p))
        return to_f32(less(quants(p), offset))

    @inline
    def scale(p, h):
        """A block's scale times h, in all lanes."""
        d = splat_f16(p, p, 16) * h
        return concat(d, d)

    @inline
    def add(sums, p, n, h0):
        h = splat_f32(h0, 16)
        for b in range(n // 32):
            v = load_f32(sums + b * 128, 32)
            if has_min:
                v = v + scale(p + 2, h)
            store(sums + b * 128, fma(values(p), scale(p, h), v))
            p += size

    @inline
    def block_of_four(sums, p0, p1, p2, p3, factors):
        """factors: 8 a row, of this block the first; then likewise of the rows' minima together."""
        v = load_f32(sums, 32)
        if has_min:
            v = v + splat_f32(f32_at(factors + 128), 32)
        v = fma(values(p0), splat_f32(f32_at(factors), 32), v)
        v = fma(values(p1), splat_f32(f32_at(factors + 32), 32), v)
        v = fma(values(p2), splat_f32(f32_at(factors + 64), 32), v)
        store(sums, fma(values(p3), splat_f32(f32_at(factors + 96), 32), v))

    @inline
    def add_four(sums, p0, p1, p2, p3, n, f0, f1, f2, f3, n0, n1, n2, n3, factors):
        """n0 .. n3: the rows to fetch meanwhile; factors: the address of room for 40 floats."""
        h0, h1, h2, h3 = splat_f32(f0, 8), splat_f32(f1, 8), splat_f32(f2, 8), splat_f32(f3, 8)
        for _ in range(n // 256):
            prefetch(n0, eight)
            prefetch(n1, eight)
            prefetch(n2, eight)
            prefetch(n3, eight)
            store(factors, spaced_f16(p0, size, 8) * h0)
            store(factors + 32, spaced_f16(p1, size, 8) * h1)
            store(factors + 64, spaced_f16(p2, size, 8) * h2)
            store(factors + 96, spaced_f16(p3, size, 8) * h3)
            if has_min:
                m = spaced_f16(p0 + 2, size, 8) * h0 + spaced_f16(p1 + 2, size, 8) * h1
                m = m + (spaced_f16(p2 + 2, size, 8) * h2 + spaced_f16(p3 + 2, size, 8) * h3)
                store(factors + 128, m)
            for j in range(8):
                o = j * size
                block_of_four(sums + j * 128, p0 + o, p1 + o, p2 + o, p3 + o, factors + j * 4)
            sums += 1024
            p0, p1, p2, p3 = p0 + eight, p1 + eight, p2 + eight, p3 + eight
            n0, n1, n2, n3 = n0 + eight, n1 + eight, n2 + eight, n3 + eight
        for _ in range(n % 256 // 32):
            prefetch(n0, size)
            prefetch(n1, size)
            prefetch(n2, size)
            prefetch(n3, size)
            put_f32(factors, f16_at(p0) * f0)
            put_f32(factors + 32, f16_at(p1) * f1)
            put_f32(factors + 64, f16_at(p2) * f2)
            put_f32(factors + 96, f16_at(p3) * f3)
            if has_min:
                m = (f16_at(p0 + 2) * f0 + f16_at(p1 + 2) * f1) + (f16_at(p2 + 2) * f2 + f16_at(p3 + 2) * f3)
                put_f32(factors + 128, m)
            block_of_four(sums, p0, p1, p2, p3, factors)
            sums += 128
            p0, p1, p2, p3 = p0 + size, p1 + size, p2 + size, p3 + size
            n0, n1, n2, n3 = n0 + size, n1 + size, n2 + size, n3 + size

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
    """`down:TYPE`: the parts' sums. `add_parts`: out = or += parts, in order, and a bias."""
    return _add_parts() if family == "add_parts" else _down(variant)


@inline
def clear(p, n):
    """n floats become 0."""
    i = 0
    while i + _lanes <= n:
        store(p + i * 4, splat_f32(0.0, _lanes))
        i += _lanes
    while i < n:
        put_f32(p + i * 4, 0.0)
        i += 1


def _down(variant: str) -> Any:
    args_of, step_of, choice_of = Down, Step, Choice
    four = variant in PLAIN
    if four:
        add, add_four = _add_plain(PLAIN[variant])
    elif variant in SUPER:
        add = add_four = _add_super(SUPER[variant])
    else:
        add = add_four = _add_floats(variant)

    def down(args, step, ith, turn):
        n_tok = i64_at(step + step_of.n_tok)
        count = i64_at(i64_at(args + args_of.choice) + choice_of.count)
        w, out, n = i64_at(args + args_of.w), i64_at(args + args_of.out), i64_at(args + args_of.n)
        h, h_stride = i64_at(args + args_of.h), i64_at(args + args_of.h_stride) * 4
        row_bytes, listed = i64_at(args + args_of.row_bytes), i64_at(args + args_of.list)
        parts, ahead = i64_at(args + args_of.parts), i64_at(args + args_of.ahead)
        factors = i64_at(args + args_of.scratch) + ith * i64_at(args + args_of.scratch_bytes)
        while True:
            c = take(args, turn, parts)
            if c < 0:
                break
            sums = out + c * n_tok * n * 4
            clear(sums, n_tok * n)
            i, end = count * c // parts, count * (c + 1) // parts
            fetch_first(w, row_bytes, listed, i, end, ahead)
            if four:
                while i + 4 <= end:
                    p0 = w + i32_at(listed + i * 4) * row_bytes
                    p1 = w + i32_at(listed + i * 4 + 4) * row_bytes
                    p2 = w + i32_at(listed + i * 4 + 8) * row_bytes
                    p3 = w + i32_at(listed + i * 4 + 12) * row_bytes
                    n0 = w + i32_at(listed + min(i + ahead, end - 1) * 4) * row_bytes
                    n1 = w + i32_at(listed + min(i + ahead + 1, end - 1) * 4) * row_bytes
                    n2 = w + i32_at(listed + min(i + ahead + 2, end - 1) * 4) * row_bytes
                    n3 = w + i32_at(listed + min(i + ahead + 3, end - 1) * 4) * row_bytes
                    for t in range(n_tok):
                        at = h + t * h_stride + i * 4
                        h0, h1, h2, h3 = f32_at(at), f32_at(at + 4), f32_at(at + 8), f32_at(at + 12)
                        if h0 != 0.0 or h1 != 0.0 or h2 != 0.0 or h3 != 0.0:
                            add_four(sums + t * n * 4, p0, p1, p2, p3, n, h0, h1, h2, h3, n0, n1, n2, n3, factors)
                    i += 4
            while i < end:
                p = w + i32_at(listed + i * 4) * row_bytes
                fetch_row(w + i32_at(listed + min(i + ahead, end - 1) * 4) * row_bytes, row_bytes)
                for t in range(n_tok):
                    value = f32_at(h + t * h_stride + i * 4)
                    if value != 0.0:
                        add(sums + t * n * 4, p, n, value)
                i += 1
            finish(args)
        return parts

    return down


def _add_parts() -> Any:
    args_of, step_of, lanes, span = AddParts, Step, LANES, 256

    def add_parts(args, step, ith, turn):
        n_tok, n = i64_at(step + step_of.n_tok), i64_at(args + args_of.n)
        out, sums, parts = i64_at(args + args_of.out), i64_at(args + args_of.sums), i64_at(args + args_of.parts)
        bias, add = i64_at(args + args_of.bias), i64_at(args + args_of.add)
        spans = (n + span - 1) // span
        n_chunks, part_bytes = n_tok * spans, n_tok * n * 4
        while True:
            c = take(args, turn, n_chunks)
            if c < 0:
                break
            row, i = c // spans * n * 4, c % spans * span
            end = min(i + span, n)
            while i + lanes <= end:
                at = row + i * 4
                v = load_f32(sums + at, lanes)
                for p in range(1, parts):
                    v = v + load_f32(sums + p * part_bytes + at, lanes)
                if bias != 0:
                    v = v + load_f32(bias + i * 4, lanes)
                if add != 0:
                    v = v + load_f32(out + at, lanes)
                store(out + at, v)
                i += lanes
            while i < end:
                at = row + i * 4
                x = f32_at(sums + at)
                for p in range(1, parts):
                    x += f32_at(sums + p * part_bytes + at)
                if bias != 0:
                    x += f32_at(bias + i * 4)
                if add != 0:
                    x += f32_at(out + at)
                put_f32(out + at, x)
                i += 1
            finish(args)
        return n_chunks

    return add_parts

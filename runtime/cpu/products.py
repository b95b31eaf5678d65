"""How each family of weight types multiplies: row by row, or unpacked into panels for register tiles.

A plain or super type (weights.py) needs no code of its own here: its quants and scales are all that differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .loads import (
    f32_at,
    four_f16,
    load_bf16,
    load_f16,
    load_f32,
    load_i8,
    load_i32,
    prefetch,
    put_f32,
    splat_f16,
    store,
    store_quads,
)
from .simd import concat, fma, hsum, shl, splat_f32, splat_i32, spread, to_f32
from .tiles import dot4, tile_add, tile_dot4, tile_fma, tile_hsum, tile_scale, tile_zero
from .vector import LANES, WIDE
from .weights import FLOAT, PLAIN, SUPER, Plain, Super, inline

TOKENS = 8 if WIDE == 64 else 4  # tokens in a register tile
ROW_TOKENS = 4  # tokens that share one reading of a weight row
AHEAD = 8192  # bytes of weights to prefetch ahead: two pages, where the hardware's own stops at one


@dataclass(frozen=True)
class Product:
    """What the matmul kernel is built around.

    row_dot: (weights, xq, ld, ln, ls, k, ahead) -> float, one row with one token, fetching what is `ahead` bytes from
    each weight; float types read xf at xq. row_dots: the same numbers for ROW_TOKENS tokens, as a tuple. unpack: (four
    rows of weights, quants, scales, minima, k), rows into neighbouring columns of a panel. multiply: (quants, scales,
    minima, xq, xd, xs, k) -> tile, a panel of rows with a panel of tokens; multiply_half: with the first half of them,
    which gives the same numbers. group: weights that share a scale in a panel, 0 for float types.
    """

    row_dot: Any
    row_dots: Any
    unpack: Any
    multiply: Any
    multiply_half: Any
    group: int


def product(name: str) -> Product:
    """The product of a weight type, at this process's instruction-set level."""
    if name in PLAIN:
        return _plain(PLAIN[name])
    if name in SUPER:
        return _super(SUPER[name])
    return _float(name)


def _tile_product(group: int, big: bool, count: int) -> Any:
    """Product of a panel of rows and the first tokens of a panel, scales one a `group` of weights."""
    tokens, wide, lanes = TOKENS, WIDE, LANES
    quads = group // 4
    x_step = 1 if group == 32 else 2  # groups that share one activation scale

    @inline
    def multiply(quants, scales, minima, xq, xd, xs, k):
        total = tile_zero(splat_f32(0.0, lanes), count)
        for b in range(k // group):
            sums = tile_zero(splat_i32(0, lanes), count)
            for i in range(quads):
                at = b * quads + i
                sums = tile_dot4(sums, load_i8(quants + at * wide, wide), xq + at * 4 * tokens, big)
            total = tile_scale(total, sums, load_f32(scales + b * wide, lanes), xd + (b // x_step) * 4 * tokens)
            total = tile_fma(total, load_f32(minima + b * wide, lanes), xs + b * 4 * tokens)
        return total

    return multiply


def _accumulate(lanes: int, has_min: bool, offset: int, big: bool) -> Any:
    """A step of a row product, 4 * lanes weights: acc += scale * (u . q) * xd, and what the minimum or offset adds."""
    width, shift = 4 * lanes, offset.bit_length() - 1

    @inline
    def add(u, q, d, n, s, scale, minimum, acc):
        """scale, minimum: float lanes; without a minimum the sum starts at -offset * (sum of q)."""
        if has_min:
            ints = dot4(splat_i32(0, lanes), u, load_i8(q, width), big)
            acc = fma(minimum, load_f32(s, lanes), acc)
        else:
            ints = dot4(shl(load_i32(n, lanes), shift), u, load_i8(q, width), big)
        return fma(to_f32(ints), scale * load_f32(d, lanes), acc)

    return add


def _per_token(add: Any, count: int) -> Any:
    """`add` to each token's accumulator in a tuple; their activations lie `stride` bytes apart in all arrays."""
    if count == 1:

        @inline
        def one(u, q, d, n, s, stride, scale, minimum, acc):
            return (add(u, q, d, n, s, scale, minimum, acc[0]),)

        return one
    assert count == ROW_TOKENS == 4

    @inline
    def four(u, q, d, n, s, stride, scale, minimum, acc):
        two, three = 2 * stride, 3 * stride
        return (
            add(u, q, d, n, s, scale, minimum, acc[0]),
            add(u, q + stride, d + stride, n + stride, s + stride, scale, minimum, acc[1]),
            add(u, q + two, d + two, n + two, s + two, scale, minimum, acc[2]),
            add(u, q + three, d + three, n + three, s + three, scale, minimum, acc[3]),
        )

    return four


def _both(dots: Any) -> tuple[Any, Any]:
    """A product of a row by its count of tokens: (for one, as a number; for ROW_TOKENS, as a tuple)."""
    one, many = dots(1), dots(ROW_TOKENS)

    @inline
    def row_dot(p, q, d, n, s, k, ahead):
        return one(p, q, d, n, s, k, ahead)[0]

    return row_dot, many


def _plain(t: Plain) -> Product:
    size, quants, pair, big, has_min = t.n_bytes, t.quants, t.pair, t.big, t.has_min
    negative_offset = -float(t.offset)
    wide, far = WIDE, AHEAD
    two, four = 2 * size, 4 * size

    add_32, add_64 = (_accumulate(lanes, has_min, t.offset, big) for lanes in (8, 16))

    def dots(count: int) -> Any:
        each_32, each_64 = _per_token(add_32, count), _per_token(add_64, count)

        @inline
        def one_block(p, q, d, n, s, k, acc):
            """32 weights."""
            scale = splat_f16(p, p, 8)
            minimum = splat_f16(p + 2, p + 2, 8) if has_min else scale
            return each_32(quants(p), q, d, n, s, k, scale, minimum, acc)

        @inline
        def two_blocks(p, q, d, n, s, k, acc):
            """64 weights."""
            scale = splat_f16(p, p + size, 16)
            minimum = splat_f16(p + 2, p + size + 2, 16) if has_min else scale
            return each_64(pair(p, p + size), q, d, n, s, k, scale, minimum, acc)

        @inline
        def dots_64(p, q, d, n, s, k, ahead):
            a, b = tile_zero(splat_f32(0.0, 16), count), tile_zero(splat_f32(0.0, 16), count)
            i = 0
            while i + 128 <= k:
                prefetch(p + ahead, four)
                a = two_blocks(p, q + i, d + i, n + i, s + i, k, a)
                b = two_blocks(p + two, q + i + 64, d + i + 64, n + i + 64, s + i + 64, k, b)
                p += four
                i += 128
            if i + 64 <= k:
                prefetch(p + ahead, two)
                a = two_blocks(p, q + i, d + i, n + i, s + i, k, a)
                p += two
                i += 64
            last = tile_zero(splat_f32(0.0, 8), count)
            if i < k:
                last = one_block(p, q + i, d + i, n + i, s + i, k, last)
            return tile_add(tile_hsum(tile_add(a, b)), tile_hsum(last))

        @inline
        def dots_32(p, q, d, n, s, k, ahead):
            a, b = tile_zero(splat_f32(0.0, 8), count), tile_zero(splat_f32(0.0, 8), count)
            i = 0
            while i + 64 <= k:
                prefetch(p + ahead, two)
                a = one_block(p, q + i, d + i, n + i, s + i, k, a)
                b = one_block(p + size, q + i + 32, d + i + 32, n + i + 32, s + i + 32, k, b)
                p += two
                i += 64
            if i < k:
                a = one_block(p, q + i, d + i, n + i, s + i, k, a)
            return tile_hsum(tile_add(a, b))

        return dots_64 if WIDE == 64 else dots_32

    @inline
    def unpack(p0, p1, p2, p3, to_q, to_d, to_m, k):
        for b in range(k // 32):
            if b % 2 == 0:
                prefetch(p0 + far, two)
                prefetch(p1 + far, two)
                prefetch(p2 + far, two)
                prefetch(p3 + far, two)
            store_quads(to_q + b * 8 * wide, quants(p0), quants(p1), quants(p2), quants(p3), wide)
            d = four_f16(p0, p1, p2, p3)
            m = four_f16(p0 + 2, p1 + 2, p2 + 2, p3 + 2) if has_min else d * splat_f32(negative_offset, 4)
            store(to_d + b * wide, d)
            store(to_m + b * wide, m)
            p0 += size
            p1 += size
            p2 += size
            p3 += size

    multiply, multiply_half = (_tile_product(32, big, count) for count in (TOKENS, TOKENS // 2))
    return Product(*_both(dots), unpack, multiply, multiply_half, 32)


def scale_writer(t: Super) -> Any:
    """Scales and minima of four rows' blocks, side by side; `wide` bytes from sub-block to sub-block."""
    scales_of, minima_of, has_min, n_sub = t.scales, t.minima, t.has_min, 256 // t.group
    negative_offset = -float(t.offset)

    @inline
    def put_scales(p0, p1, p2, p3, to_d, to_m, wide):
        s0, s1, s2, s3 = scales_of(p0), scales_of(p1), scales_of(p2), scales_of(p3)
        store_quads(to_d, s0, s1, s2, s3, wide)
        if has_min:
            store_quads(to_m, minima_of(p0), minima_of(p1), minima_of(p2), minima_of(p3), wide)
        else:
            offset = splat_f32(negative_offset, n_sub)
            store_quads(to_m, s0 * offset, s1 * offset, s2 * offset, s3 * offset, wide)

    return put_scales


def _super(t: Super) -> Product:
    size, quants, scales_of, minima_of, big, has_min, group = (
        t.n_bytes,
        t.quants,
        t.scales,
        t.minima,
        t.big,
        t.has_min,
        t.group,
    )
    wide, far, put_scales = WIDE, AHEAD, scale_writer(t)
    n_sub = 256 // group
    repeat = group // 4  # lanes that share a scale

    add_32, add_64 = (_accumulate(lanes, has_min, t.offset, big) for lanes in (8, 16))

    # First sub-block of the second, third and fourth chunk of 64 or 32 weights.
    b1, b2, b3 = (i * 64 // group for i in (1, 2, 3))
    c1, c2, c3 = (i * 32 // group for i in (1, 2, 3))

    half_sub = n_sub // 2

    def dots(count: int) -> Any:
        each_32, each_64 = _per_token(add_32, count), _per_token(add_64, count)

        @inline
        def chunk_64(u, v, sc, mn, first, q, d, n, s, c, k, acc):
            """64 weights from column c on, whose sub-blocks' scales begin at lane `first`."""
            scale, minimum = spread(sc, first, repeat, 16), spread(mn, first, repeat, 16)
            return each_64(concat(u, v), q + c, d + c, n + c, s + c, k, scale, minimum, acc)

        @inline
        def dots_64(p, q, d, n, s, k, ahead):
            a, b = tile_zero(splat_f32(0.0, 16), count), tile_zero(splat_f32(0.0, 16), count)
            for i in range(0, k, 256):
                prefetch(p + ahead, size)
                sc = scales_of(p)
                mn = minima_of(p) if has_min else sc
                u0, u1, u2, u3 = quants(p, 0)
                v0, v1, v2, v3 = quants(p, 1)
                a = chunk_64(u0, u1, sc, mn, 0, q, d, n, s, i, k, a)
                b = chunk_64(u2, u3, sc, mn, b1, q, d, n, s, i + 64, k, b)
                a = chunk_64(v0, v1, sc, mn, b2, q, d, n, s, i + 128, k, a)
                b = chunk_64(v2, v3, sc, mn, b3, q, d, n, s, i + 192, k, b)
                p += size
            return tile_hsum(tile_add(a, b))

        @inline
        def chunk_32(u, sc, mn, first, q, d, n, s, c, k, acc):
            scale, minimum = spread(sc, first, repeat, 8), spread(mn, first, repeat, 8)
            return each_32(u, q + c, d + c, n + c, s + c, k, scale, minimum, acc)

        @inline
        def half_dot(us, sc, mn, q, d, n, s, c, k, a, b):
            """128 weights of one half, whose sub-blocks' scales begin at lane 0 of sc."""
            u0, u1, u2, u3 = us
            a = chunk_32(u0, sc, mn, 0, q, d, n, s, c, k, a)
            b = chunk_32(u1, sc, mn, c1, q, d, n, s, c + 32, k, b)
            a = chunk_32(u2, sc, mn, c2, q, d, n, s, c + 64, k, a)
            b = chunk_32(u3, sc, mn, c3, q, d, n, s, c + 96, k, b)
            return a, b

        @inline
        def dots_32(p, q, d, n, s, k, ahead):
            a, b = tile_zero(splat_f32(0.0, 8), count), tile_zero(splat_f32(0.0, 8), count)
            for i in range(0, k, 256):
                prefetch(p + ahead, size)
                sc = scales_of(p)
                mn = minima_of(p) if has_min else sc
                a, b = half_dot(quants(p, 0), sc, mn, q, d, n, s, i, k, a, b)
                high, low = spread(sc, half_sub, 1, half_sub), spread(mn, half_sub, 1, half_sub)
                a, b = half_dot(quants(p, 1), high, low, q, d, n, s, i + 128, k, a, b)
                p += size
            return tile_hsum(tile_add(a, b))

        return dots_64 if WIDE == 64 else dots_32

    @inline
    def unpack(p0, p1, p2, p3, to_q, to_d, to_m, k):
        for i in range(k // 256):
            prefetch(p0 + far, size)
            prefetch(p1 + far, size)
            prefetch(p2 + far, size)
            prefetch(p3 + far, size)
            for half in range(2):
                a0, b0, c0, d0 = quants(p0, half)
                a1, b1, c1, d1 = quants(p1, half)
                a2, b2, c2, d2 = quants(p2, half)
                a3, b3, c3, d3 = quants(p3, half)
                at = to_q + (i * 64 + half * 32) * wide
                store_quads(at, a0, a1, a2, a3, wide)
                store_quads(at + 8 * wide, b0, b1, b2, b3, wide)
                store_quads(at + 16 * wide, c0, c1, c2, c3, wide)
                store_quads(at + 24 * wide, d0, d1, d2, d3, wide)
            put_scales(p0, p1, p2, p3, to_d + i * n_sub * wide, to_m + i * n_sub * wide, wide)
            p0 += size
            p1 += size
            p2 += size
            p3 += size

    multiply, multiply_half = (_tile_product(group, big, count) for count in (TOKENS, TOKENS // 2))
    return Product(*_both(dots), unpack, multiply, multiply_half, group)


def _float(name: str) -> Product:
    size = FLOAT[name]
    load = {"F32": load_f32, "F16": load_f16, "BF16": load_bf16}[name]
    lanes, wide, tokens, far = LANES, WIDE, TOKENS, AHEAD
    vector, step = LANES * size, 2 * LANES * size

    @inline
    def scalar(p):
        return hsum(load(p, 1))

    @inline
    def add(v, x, d, n, s, scale, minimum, acc):
        return fma(v, load_f32(x, lanes), acc)

    @inline
    def add_one(v, x, d, n, s, scale, minimum, total):
        return total + v * f32_at(x)

    def dots(count: int) -> Any:
        each, each_one = _per_token(add, count), _per_token(add_one, count)

        @inline
        def row_dots(p, x, d, n, s, k, ahead):
            a, b = tile_zero(splat_f32(0.0, lanes), count), tile_zero(splat_f32(0.0, lanes), count)
            i, stride = 0, 4 * k
            while i + 2 * lanes <= k:
                prefetch(p + i * size + ahead, step)
                a = each(load(p + i * size, lanes), x + i * 4, 0, 0, 0, stride, 0, 0, a)
                b = each(load(p + (i + lanes) * size, lanes), x + (i + lanes) * 4, 0, 0, 0, stride, 0, 0, b)
                i += 2 * lanes
            totals = tile_hsum(tile_add(a, b))
            while i < k:
                totals = each_one(scalar(p + i * size), x + i * 4, 0, 0, 0, stride, 0, 0, totals)
                i += 1
            return totals

        return row_dots

    @inline
    def unpack(p0, p1, p2, p3, to, d, m, k):
        i = 0
        while i + lanes <= k:
            at = i * size
            prefetch(p0 + at + far, vector)
            prefetch(p1 + at + far, vector)
            prefetch(p2 + at + far, vector)
            prefetch(p3 + at + far, vector)
            v0, v1, v2, v3 = load(p0 + at, lanes), load(p1 + at, lanes), load(p2 + at, lanes), load(p3 + at, lanes)
            store_quads(to + i * wide, v0, v1, v2, v3, wide)
            i += lanes
        while i < k:
            at = i * size
            put_f32(to + i * wide, scalar(p0 + at))
            put_f32(to + i * wide + 4, scalar(p1 + at))
            put_f32(to + i * wide + 8, scalar(p2 + at))
            put_f32(to + i * wide + 12, scalar(p3 + at))
            i += 1

    def of_tokens(count: int) -> Any:
        @inline
        def multiply(panel, d, m, x, xd, xs, k):
            total = tile_zero(splat_f32(0.0, lanes), count)
            for i in range(k):
                total = tile_fma(total, load_f32(panel + i * wide, lanes), x + i * 4 * tokens)
            return total

        return multiply

    return Product(*_both(dots), unpack, of_tokens(tokens), of_tokens(tokens // 2), 0)

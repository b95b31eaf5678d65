"""Matrix products of weights and packed activations, one kernel a weight type, for any number of tokens.

Few tokens: each weight row is read once and multiplied with every token's activations, 64 (or 32) weights an
instruction. Many tokens: 16 (or 8) rows at a time are unpacked into a panel of bytes that stays in the cache, and a
register tile of rows x tokens walks over it. Both accumulate exact integer sums by block, scaled in float32.
"""

from __future__ import annotations

from typing import Any

from .layout import TILE_MIN, MatMul
from .simd import (
    LANES,
    WIDE,
    concat,
    dot4,
    f16_at,
    f32_at,
    fma,
    hsum,
    i64_at,
    load_bf16,
    load_f16,
    load_f32,
    load_i8,
    load_i32,
    put_f32,
    shl,
    splat_f16,
    splat_f32,
    splat_i32,
    spread,
    store,
    store_dwords,
    tile_dot4,
    tile_fma,
    tile_scale,
    tile_store,
    tile_zero,
    to_f32,
)
from .tape import finish, take
from .weights import FLOAT, PLAIN, SUPER, Plain, Super, inline

TOKENS = 8 if WIDE == 64 else 4  # tokens in a register tile
ROWS = LANES  # weight rows in it


def build(family: str, variant: str) -> Any:
    if variant in PLAIN:
        return _kernel(*_plain(PLAIN[variant]))
    if variant in SUPER:
        return _kernel(*_super(SUPER[variant]))
    return _kernel(*_float(variant))


def _kernel(row_dot: Any, unpack: Any, multiply: Any, quantised: bool, group: int) -> Any:
    """The kernel around a type's row product, panel unpacker and tile product."""
    rows, tokens, tile_min, wide, lanes = ROWS, TOKENS, TILE_MIN, WIDE, LANES
    args_of = MatMul
    sums_by_16 = group == 16
    scale_bytes = 4 * ROWS // group if group else 0  # of the scales, a weight column

    @inline
    def put(args, out, r, value):
        """Write one output: plus its bias, plus what is there if the op adds."""
        bias = i64_at(args + args_of.bias)
        if bias != 0:
            value += f32_at(bias + r * 4)
        if i64_at(args + args_of.add) != 0:
            value += f32_at(out)
        put_f32(out, value)

    @inline
    def by_rows(args, n_tok, turn):
        w, out, k, n = (
            i64_at(args + args_of.w),
            i64_at(args + args_of.out),
            i64_at(args + args_of.k),
            i64_at(args + args_of.n),
        )
        row_bytes, stride = i64_at(args + args_of.row_bytes), i64_at(args + args_of.out_stride)
        chunk = i64_at(args + args_of.chunk)
        xq, xd = i64_at(args + args_of.xq), i64_at(args + args_of.xd)
        xn, xs, xf = i64_at(args + args_of.xn), i64_at(args + args_of.xs), i64_at(args + args_of.xf)
        n_chunks = (n + chunk - 1) // chunk
        while True:
            first = take(args, turn, n_chunks) * chunk
            if first < 0:
                break
            for r in range(first, min(first + chunk, n)):
                for t in range(n_tok):
                    o = t * k
                    if quantised:
                        value = row_dot(w + r * row_bytes, xq + o, xd + o, xn + o, xs + o, k)
                    else:
                        value = row_dot(w + r * row_bytes, xf + 4 * o, 0, 0, 0, k)
                    put(args, out + (t * stride + r) * 4, r, value)
            finish(args)
        return n_chunks

    @inline
    def write_tile(args, tile_at, out, stride, r0, n, t0, n_tok):
        bias, add = i64_at(args + args_of.bias), i64_at(args + args_of.add)
        for t in range(min(tokens, n_tok - t0)):
            target = out + ((t0 + t) * stride + r0) * 4
            if r0 + rows <= n:
                v = load_f32(tile_at + t * wide, lanes)
                if bias != 0:
                    v = v + load_f32(bias + r0 * 4, lanes)
                if add != 0:
                    v = v + load_f32(target, lanes)
                store(target, v)
            else:
                for r in range(n - r0):
                    put(args, target + r * 4, r0 + r, f32_at(tile_at + t * wide + r * 4))

    @inline
    def by_tiles(args, n_tok, ith, turn):
        w, out, k, n = (
            i64_at(args + args_of.w),
            i64_at(args + args_of.out),
            i64_at(args + args_of.k),
            i64_at(args + args_of.n),
        )
        row_bytes, stride = i64_at(args + args_of.row_bytes), i64_at(args + args_of.out_stride)
        panels = i64_at(args + args_of.panels)
        xq, xd, xf = i64_at(args + args_of.xq), i64_at(args + args_of.xd), i64_at(args + args_of.xf)
        xs = i64_at(args + args_of.xn) if sums_by_16 else i64_at(args + args_of.xs)
        tile_at = i64_at(args + args_of.scratch) + ith * i64_at(args + args_of.scratch_bytes)
        quants = tile_at + tokens * wide
        if quantised:
            scales = quants + panels * k * rows
            minima = scales + panels * k * scale_bytes
        n_chunks = (n + panels * rows - 1) // (panels * rows)
        while True:
            first = take(args, turn, n_chunks) * panels * rows
            if first < 0:
                break
            here = min(panels, (n - first + rows - 1) // rows)
            for g in range(here):
                for j in range(rows):
                    r = min(first + g * rows + j, n - 1)
                    if quantised:
                        unpack(
                            w + r * row_bytes,
                            quants + g * k * rows + j * 4,
                            scales + g * k * scale_bytes + j * 4,
                            minima + g * k * scale_bytes + j * 4,
                            k,
                        )
                    else:
                        unpack(w + r * row_bytes, quants + g * k * wide + j * 4, 0, 0, k)
            for t0 in range(0, n_tok, tokens):
                p = t0 // tokens
                for g in range(here):
                    if quantised:
                        x_sums = xs + p * (k // group) * tokens * 4
                        tile = multiply(
                            quants + g * k * rows,
                            scales + g * k * scale_bytes,
                            minima + g * k * scale_bytes,
                            xq + p * k * tokens,
                            xd + p * (k // 32) * tokens * 4,
                            x_sums,
                            k,
                        )
                    else:
                        tile = multiply(quants + g * k * wide, 0, 0, xf + p * k * tokens * 4, 0, 0, k)
                    tile_store(tile_at, tile, wide)
                    write_tile(args, tile_at, out, stride, first + g * rows, n, t0, n_tok)
            finish(args)
        return n_chunks

    def matmul(args, step, ith, turn):
        n_tok = i64_at(step + i64_at(args + args_of.count))
        if n_tok < tile_min:
            return by_rows(args, n_tok, turn)
        return by_tiles(args, n_tok, ith, turn)

    return matmul


def _tile_product(group: int, big: bool) -> Any:
    """Product of a panel of rows and a panel of tokens, scales one a `group` of weights."""
    tokens, wide, lanes = TOKENS, WIDE, LANES
    quads = group // 4
    x_step = 1 if group == 32 else 2  # groups that share one activation scale

    @inline
    def multiply(quants, scales, minima, xq, xd, xs, k):
        total = tile_zero(splat_f32(0.0, lanes), tokens)
        for b in range(k // group):
            sums = tile_zero(splat_i32(0, lanes), tokens)
            for i in range(quads):
                at = b * quads + i
                sums = tile_dot4(sums, load_i8(quants + at * wide, wide), xq + at * 4 * tokens, big)
            total = tile_scale(total, sums, load_f32(scales + b * wide, lanes), xd + (b // x_step) * 4 * tokens)
            total = tile_fma(total, load_f32(minima + b * wide, lanes), xs + b * 4 * tokens)
        return total

    return multiply


def _plain(t: Plain) -> tuple[Any, Any, Any, bool, int]:
    size, quants, pair, big, has_min = t.n_bytes, t.quants, t.pair, t.big, t.has_min
    shift = t.offset.bit_length() - 1
    negative_offset = -float(t.offset)
    wide = WIDE
    two = 2 * size

    @inline
    def one_block(p, q, d, n, s, acc):
        """32 weights."""
        if has_min:
            ints = dot4(splat_i32(0, 8), quants(p), load_i8(q, 32), big)
            acc = fma(splat_f16(p + 2, p + 2, 8), load_f32(s, 8), acc)
        else:
            ints = dot4(shl(load_i32(n, 8), shift), quants(p), load_i8(q, 32), big)
        return fma(to_f32(ints), splat_f16(p, p, 8) * load_f32(d, 8), acc)

    @inline
    def two_blocks(p, q, d, n, s, acc):
        """64 weights."""
        if has_min:
            ints = dot4(splat_i32(0, 16), pair(p, p + size), load_i8(q, 64), big)
            acc = fma(splat_f16(p + 2, p + size + 2, 16), load_f32(s, 16), acc)
        else:
            ints = dot4(shl(load_i32(n, 16), shift), pair(p, p + size), load_i8(q, 64), big)
        return fma(to_f32(ints), splat_f16(p, p + size, 16) * load_f32(d, 16), acc)

    @inline
    def row_dot_64(p, q, d, n, s, k):
        a, b = splat_f32(0.0, 16), splat_f32(0.0, 16)
        i = 0
        while i + 128 <= k:
            a = two_blocks(p, q + i, d + i, n + i, s + i, a)
            b = two_blocks(p + two, q + i + 64, d + i + 64, n + i + 64, s + i + 64, b)
            p += 2 * two
            i += 128
        if i + 64 <= k:
            a = two_blocks(p, q + i, d + i, n + i, s + i, a)
            p += two
            i += 64
        total = hsum(a + b)
        if i < k:
            total += hsum(one_block(p, q + i, d + i, n + i, s + i, splat_f32(0.0, 8)))
        return total

    @inline
    def row_dot_32(p, q, d, n, s, k):
        a, b = splat_f32(0.0, 8), splat_f32(0.0, 8)
        i = 0
        while i + 64 <= k:
            a = one_block(p, q + i, d + i, n + i, s + i, a)
            b = one_block(p + size, q + i + 32, d + i + 32, n + i + 32, s + i + 32, b)
            p += two
            i += 64
        if i < k:
            a = one_block(p, q + i, d + i, n + i, s + i, a)
        return hsum(a + b)

    @inline
    def unpack(p, to_q, to_d, to_m, k):
        for b in range(k // 32):
            store_dwords(to_q + b * 8 * wide, quants(p), wide)
            d = f16_at(p)
            put_f32(to_d + b * wide, d)
            put_f32(to_m + b * wide, f16_at(p + 2) if has_min else d * negative_offset)
            p += size

    return (row_dot_64 if WIDE == 64 else row_dot_32), unpack, _tile_product(32, big), True, 32


def _super(t: Super) -> tuple[Any, Any, Any, bool, int]:
    size, quants, scales_of, minima_of, big, has_min, group = (
        t.n_bytes,
        t.quants,
        t.scales,
        t.minima,
        t.big,
        t.has_min,
        t.group,
    )
    shift = t.offset.bit_length() - 1
    negative_offset = -float(t.offset)
    wide = WIDE
    n_sub = 256 // group
    repeat = group // 4  # lanes that share a scale

    @inline
    def chunk_32(u, q, d, n, s, scale, minimum, acc):
        """32 weights; scale and minimum as 8 lanes."""
        if has_min:
            ints = dot4(splat_i32(0, 8), u, load_i8(q, 32), big)
            acc = fma(minimum, load_f32(s, 8), acc)
        else:
            ints = dot4(shl(load_i32(n, 8), shift), u, load_i8(q, 32), big)
        return fma(to_f32(ints), scale * load_f32(d, 8), acc)

    @inline
    def chunk_64(u, v, q, d, n, s, scale, minimum, acc):
        """64 weights; scale and minimum as 16 lanes."""
        if has_min:
            ints = dot4(splat_i32(0, 16), concat(u, v), load_i8(q, 64), big)
            acc = fma(minimum, load_f32(s, 16), acc)
        else:
            ints = dot4(shl(load_i32(n, 16), shift), concat(u, v), load_i8(q, 64), big)
        return fma(to_f32(ints), scale * load_f32(d, 16), acc)

    # First sub-block of the second, third and fourth chunk of 64 or 32 weights.
    b1, b2, b3 = (i * 64 // group for i in (1, 2, 3))
    c1, c2, c3 = (i * 32 // group for i in (1, 2, 3))

    @inline
    def row_dot_64(p, q, d, n, s, k):
        a, b = splat_f32(0.0, 16), splat_f32(0.0, 16)
        for i in range(0, k, 256):
            sc = scales_of(p)
            mn = minima_of(p) if has_min else sc
            u0, u1, u2, u3 = quants(p, 0)
            v0, v1, v2, v3 = quants(p, 1)
            c = i
            a = chunk_64(u0, u1, q + c, d + c, n + c, s + c, spread(sc, 0, repeat, 16), spread(mn, 0, repeat, 16), a)
            c = i + 64
            b = chunk_64(u2, u3, q + c, d + c, n + c, s + c, spread(sc, b1, repeat, 16), spread(mn, b1, repeat, 16), b)
            c = i + 128
            a = chunk_64(v0, v1, q + c, d + c, n + c, s + c, spread(sc, b2, repeat, 16), spread(mn, b2, repeat, 16), a)
            c = i + 192
            b = chunk_64(v2, v3, q + c, d + c, n + c, s + c, spread(sc, b3, repeat, 16), spread(mn, b3, repeat, 16), b)
            p += size
        return hsum(a + b)

    @inline
    def half_dot(us, sc, mn, q, d, n, s, a, b):
        """128 weights of one half, whose sub-blocks' scales begin at lane 0 of sc."""
        u0, u1, u2, u3 = us
        a = chunk_32(u0, q, d, n, s, spread(sc, 0, repeat, 8), spread(mn, 0, repeat, 8), a)
        c = 32
        b = chunk_32(u1, q + c, d + c, n + c, s + c, spread(sc, c1, repeat, 8), spread(mn, c1, repeat, 8), b)
        c = 64
        a = chunk_32(u2, q + c, d + c, n + c, s + c, spread(sc, c2, repeat, 8), spread(mn, c2, repeat, 8), a)
        c = 96
        b = chunk_32(u3, q + c, d + c, n + c, s + c, spread(sc, c3, repeat, 8), spread(mn, c3, repeat, 8), b)
        return a, b

    half_sub = n_sub // 2

    @inline
    def row_dot_32(p, q, d, n, s, k):
        a, b = splat_f32(0.0, 8), splat_f32(0.0, 8)
        for i in range(0, k, 256):
            sc = scales_of(p)
            mn = minima_of(p) if has_min else sc
            a, b = half_dot(quants(p, 0), sc, mn, q + i, d + i, n + i, s + i, a, b)
            c = i + 128
            high, low = spread(sc, half_sub, 1, half_sub), spread(mn, half_sub, 1, half_sub)
            a, b = half_dot(quants(p, 1), high, low, q + c, d + c, n + c, s + c, a, b)
            p += size
        return hsum(a + b)

    @inline
    def unpack(p, to_q, to_d, to_m, k):
        for i in range(k // 256):
            for half in range(2):
                u0, u1, u2, u3 = quants(p, half)
                at = to_q + (i * 64 + half * 32) * wide
                store_dwords(at, u0, wide)
                store_dwords(at + 8 * wide, u1, wide)
                store_dwords(at + 16 * wide, u2, wide)
                store_dwords(at + 24 * wide, u3, wide)
            sc = scales_of(p)
            store_dwords(to_d + i * n_sub * wide, sc, wide)
            if has_min:
                store_dwords(to_m + i * n_sub * wide, minima_of(p), wide)
            else:
                store_dwords(to_m + i * n_sub * wide, sc * splat_f32(negative_offset, n_sub), wide)
            p += size

    return (row_dot_64 if WIDE == 64 else row_dot_32), unpack, _tile_product(group, big), True, group


def _float(name: str) -> tuple[Any, Any, Any, bool, int]:
    size = FLOAT[name]
    load = {"F32": load_f32, "F16": load_f16, "BF16": load_bf16}[name]
    lanes, wide, tokens = LANES, WIDE, TOKENS

    @inline
    def scalar(p):
        return hsum(load(p, 1))

    @inline
    def row_dot(p, x, d, n, s, k):
        a, b = splat_f32(0.0, lanes), splat_f32(0.0, lanes)
        i = 0
        while i + 2 * lanes <= k:
            a = fma(load(p + i * size, lanes), load_f32(x + i * 4, lanes), a)
            b = fma(load(p + (i + lanes) * size, lanes), load_f32(x + (i + lanes) * 4, lanes), b)
            i += 2 * lanes
        total = hsum(a + b)
        while i < k:
            total += scalar(p + i * size) * f32_at(x + i * 4)
            i += 1
        return total

    @inline
    def unpack(p, to, d, m, k):
        i = 0
        while i + lanes <= k:
            store_dwords(to + i * wide, load(p + i * size, lanes), wide)
            i += lanes
        while i < k:
            put_f32(to + i * wide, scalar(p + i * size))
            i += 1

    @inline
    def multiply(panel, d, m, x, xd, xs, k):
        total = tile_zero(splat_f32(0.0, lanes), tokens)
        for i in range(k):
            total = tile_fma(total, load_f32(panel + i * wide, lanes), x + i * 4 * tokens)
        return total

    return row_dot, unpack, multiply, False, 0

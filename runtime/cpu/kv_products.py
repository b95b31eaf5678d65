"""What attention computes with a page of keys or of values (kv_types.py), by their type, for a few queries at a time.

Scores and weights are float32 [query][KV_BLOCK] of a block. Whatever the number of queries, each one's numbers come of
the same operations in the same order.

float16       multiplied as float32. Where many queries read a page it is converted before, once.
q8_0, q4_0    dot products of bytes. For keys, queries are quantised to 8 bits by 32 dims. For values, weights times the
              positions' scales are quantised to 16 bits by block, as two bytes: with one, the small weights of a block
              would be lost, and there may be many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .layout import KV_BLOCK
from .loads import f32_at, load_f16, load_f32, load_i8, prefetch, put_f32, put_i32, store, store_dwords
from .simd import (
    band,
    fma,
    hmax,
    hsum,
    less,
    narrow_i8,
    round_to_i32,
    shr,
    splat_f32,
    splat_i32,
    to_i32,
    vabs,
    where_less,
)
from .tiles import (
    tile_dot4,
    tile_dot4_by,
    tile_fma,
    tile_fma_by,
    tile_load,
    tile_scale,
    tile_splat_i32,
    tile_store,
    tile_words,
    tile_zero,
)
from .vector import LANES, WIDE
from .weights import inline

BITS = {"f16": 0, "q8_0": 8, "q4_0": 4}
_ROW = KV_BLOCK * 4  # bytes of a query's scores, or weights, of a block
_LARGE = 65535.0  # a quantised weight


@dataclass(frozen=True)
class Keys:
    """panel: (query, to, t, count, dim, scale) puts query t into a panel of `count`; panel_bytes: of a query, for 32
    dims. few: by number of queries, (to, page, panel, dim, ahead) -> their scores; many: the same for `most` queries,
    from a page as `convert` (page, to, dim) leaves it. Without convert pages are read as they are."""

    panel: Any
    panel_bytes: int
    few: dict[int, Any]
    many: Any
    most: int
    convert: Any


@dataclass(frozen=True)
class Values:
    """few, many, most, convert: as of keys, (o, stride, weights, page, dim, first, end, full, spare, ahead): add to
    outputs what positions first to end - 1 of the page have; full: all its positions are seen by all queries."""

    few: dict[int, Any]
    many: Any
    most: int
    convert: Any


_FLOATS = 8 if WIDE == 64 else 4  # most queries whose sums stay in registers
_INTS = 4 if WIDE == 64 else 3
FEW = (1, 3, 4)  # queries of one token that are worth a loop of their own; 2 go as 3


def keys(kind: str) -> Keys:
    """The products with keys of a type."""
    bits = BITS[kind]
    if bits:
        few = {count: _int_scores(count, bits) for count in FEW if count <= _INTS}
        return Keys(_int_panel(bits), 40, few, few[_INTS], _INTS, None)
    few = {count: _float_scores(count, 2) for count in FEW}
    return Keys(_float_panel(), 128, few, _float_scores(_FLOATS, 4), _FLOATS, _convert)


def values(kind: str) -> Values:
    """The products with values of a type."""
    bits = BITS[kind]
    if bits:
        few = {count: _int_mix(count, bits) for count in FEW if count <= _INTS}
        return Values(few, few[_INTS], _INTS, None)
    few = {count: _float_mix(count, 2) for count in FEW}
    return Values(few, _float_mix(_FLOATS, 4), _FLOATS, _convert)


@inline
def _convert(page, to, dim):
    for i in range(0, KV_BLOCK * dim, 16):
        store(to + i * 4, load_f16(page + i * 2, 16))


# --- float16 -------------------------------------------------------------------------------------------------------


def _float_panel() -> Any:
    @inline
    def panel(query, to, t, count, dim, scale):
        d = 0
        while d + 16 <= dim:
            store_dwords(to + (d * count + t) * 4, load_f32(query + d * 4, 16) * splat_f32(scale, 16), 4 * count)
            d += 16
        while d < dim:
            put_f32(to + (d * count + t) * 4, f32_at(query + d * 4) * scale)
            d += 1

    return panel


def _float_scores(count: int, size: int) -> Any:
    lanes, block, row = LANES, KV_BLOCK, _ROW
    load = load_f16 if size == 2 else load_f32

    @inline
    def scores(to, page, panel, dim, ahead):
        for j in range(0, block, 2 * lanes):
            a, b = tile_zero(splat_f32(0.0, lanes), count), tile_zero(splat_f32(0.0, lanes), count)
            for d in range(dim):
                at = (d * block + j) * size
                if size == 2:
                    prefetch(ahead + at, 1)
                a = tile_fma(a, load(page + at, lanes), panel + d * 4 * count)
                b = tile_fma(b, load(page + at + lanes * size, lanes), panel + d * 4 * count)
            tile_store(to + j * 4, a, row)
            tile_store(to + (j + lanes) * 4, b, row)

    return scores


def _float_mix(count: int, size: int) -> Any:
    lanes, row = LANES, _ROW
    load = load_f16 if size == 2 else load_f32

    @inline
    def mix(o, stride, weights, page, dim, first, end, full, spare, ahead):
        for c in range(0, dim, 2 * lanes):
            a = tile_load(splat_f32(0.0, lanes), o + c * 4, stride, count)
            b = tile_load(splat_f32(0.0, lanes), o + (c + lanes) * 4, stride, count)
            for j in range(first, end):
                at = (j * dim + c) * size
                if size == 2:
                    prefetch(ahead + at, 1)
                a = tile_fma_by(a, load(page + at, lanes), weights + j * 4, row)
                b = tile_fma_by(b, load(page + at + lanes * size, lanes), weights + j * 4, row)
            tile_store(o + c * 4, a, stride)
            tile_store(o + (c + lanes) * 4, b, stride)

    return mix


# --- quantised -----------------------------------------------------------------------------------------------------


def _int_panel(bits: int) -> Any:
    """Of each 32 dims, for `count` queries: quants [8][count][4], what keys' offset adds [count], scales [count]."""
    offset = 1 << (bits - 1)

    @inline
    def panel(query, to, t, count, dim, scale):
        for d in range(0, dim, 32):
            at = to + d // 32 * 40 * count
            x = load_f32(query + d * 4, 32) * splat_f32(scale, 32)
            top = hmax(vabs(x))
            q = round_to_i32(x * splat_f32(127.0 / max(top, 1e-30), 32))
            store_dwords(at + t * 4, narrow_i8(q), 4 * count)
            put_i32(at + 32 * count + t * 4, -offset * hsum(q))
            put_f32(at + 36 * count + t * 4, top / 127.0)

    return panel


def _int_scores(count: int, bits: int) -> Any:
    lanes, wide, block, row = LANES, WIDE, KV_BLOCK, _ROW
    group_bytes = block * (2 + 4 * bits)
    line = 8 * lanes  # bytes of a four of both vectors

    @inline
    def scores(to, page, panel, dim, ahead):
        for j in range(0, block, 2 * lanes):
            a, b = tile_zero(splat_f32(0.0, lanes), count), tile_zero(splat_f32(0.0, lanes), count)
            for g in range(dim // 32):
                at, x = g * group_bytes, panel + g * 40 * count
                prefetch(ahead + at, 64)
                m = tile_splat_i32(splat_i32(0, lanes), x + 32 * count, count)
                n = m
                for i in range(bits):
                    four = at + 2 * block + (i * block + j) * 4
                    prefetch(ahead + four, line)
                    u, v = load_i8(page + four, wide), load_i8(page + four + wide, wide)
                    if bits == 8:
                        m = tile_dot4(m, u, x + i * 4 * count, True)
                        n = tile_dot4(n, v, x + i * 4 * count, True)
                    else:
                        m = tile_dot4(m, band(u, 15), x + i * 4 * count, False)
                        n = tile_dot4(n, band(v, 15), x + i * 4 * count, False)
                        m = tile_dot4(m, shr(u, 4), x + (4 + i) * 4 * count, False)
                        n = tile_dot4(n, shr(v, 4), x + (4 + i) * 4 * count, False)
                a = tile_scale(a, m, load_f16(page + at + j * 2, lanes), x + 36 * count)
                b = tile_scale(b, n, load_f16(page + at + (j + lanes) * 2, lanes), x + 36 * count)
            tile_store(to + j * 4, a, row)
            tile_store(to + (j + lanes) * 4, b, row)

    return scores


def _int_mix(count: int, bits: int) -> Any:
    lanes, wide, block, row, large = LANES, WIDE, KV_BLOCK, _ROW, _LARGE
    group_bytes = block * (2 + 4 * bits)

    @inline
    def mix(o, stride, weights, page, dim, first, end, full, spare, ahead):
        """spare: count quantised weights, 32 high bytes, 32 low ones; scales [count], and what they came from."""
        scales, factors = spare + 64 * count, spare + 68 * count
        zero = splat_f32(0.0, block)
        for g in range(dim // 32):
            at = g * group_bytes
            prefetch(ahead + at, 64)
            s = load_f16(page + at, block)
            # The largest scale among positions that a query sees; what it does not see must not round its weights.
            top = hmax(s) if full else 0.0
            for t in range(count):
                if not full:
                    top = hmax(where_less(zero, load_f32(weights + t * row, block), s, zero))
                top = max(top, 1e-30)
                put_f32(scales + t * 4, top * (1.0 / large))
                put_f32(factors + t * 4, large / top)
            for t in range(count):
                p = load_f32(weights + t * row, block)
                seen = where_less(zero, p, s * splat_f32(f32_at(factors + t * 4), block), zero)
                u = to_i32(fma(p, seen, splat_f32(0.5, block)))
                store(spare + t * 64, narrow_i8(shr(u, 8)))
                store(spare + t * 64 + 32, narrow_i8(u))
            for n in range(0, 16, lanes):
                h, f = tile_zero(splat_i32(0, lanes), count), tile_zero(splat_i32(0, lanes), count)
                k, m = h, f
                for i in range(block // 4):
                    w = spare + i * 4
                    if bits == 8:
                        four = at + 2 * block + (i * block + n) * 4
                        prefetch(ahead + four, 1)
                        prefetch(ahead + four + 64, 1)
                        u, v = load_i8(page + four, wide), load_i8(page + four + 64, wide)
                    else:
                        four = at + 2 * block + (i * 16 + n) * 4
                        prefetch(ahead + four, 1)
                        both = load_i8(page + four, wide)
                        u, v = less(band(both, 15), 8), less(shr(both, 4), 8)
                    h, f = tile_dot4_by(h, w, 64, u), tile_dot4_by(f, w + 32, 64, u)
                    k, m = tile_dot4_by(k, w, 64, v), tile_dot4_by(m, w + 32, 64, v)
                one = splat_f32(1.0, lanes)
                to = o + (g * 32 + n) * 4
                a = tile_load(one, to, stride, count)
                b = tile_load(one, to + 64, stride, count)
                tile_store(to, tile_scale(a, tile_words(h, f), one, scales), stride)
                tile_store(to + 64, tile_scale(b, tile_words(k, m), one, scales), stride)

    return mix

"""Encoders of the K-quants: a super-block of 256 weights at a time, a sub-block a lane.

Sub-blocks first find scales (and minima) of their own. The super-block's scale makes integers of them; those are then
chosen anew, each among its neighbours by the error that it really has, in turns with the super-block's scale, which is
fitted to all its weights by least squares.
"""

from __future__ import annotations

from typing import Any

from .encode import BYTES, SCALES, bytes_writer
from .loads import f16_at, i64_at, load_f32, load_i8, put_f16, put_i32, store
from .scale_search import asymmetric, inverse, rounder, symmetric
from .simd import (
    band,
    bor,
    fma,
    hmax,
    hsum,
    narrow_i8,
    shl,
    shr,
    splat_f32,
    to_i32,
    where_less,
)
from .weights import inline

# Of types with minima: lanes, size, greatest integer, greatest integer scale, candidates and rounds of the search.
_ASYMMETRIC = {
    "Q2_K": (16, 16, 3, 15, (1.6, 0.15, 16), 3),
    "Q4_K": (8, 32, 15, 63, (14.0, 0.2, 10), 3),
    "Q5_K": (8, 32, 31, 63, (30.0, 0.2, 10), 3),
}
# Of types without: half the range of the integers and of the integer scales, candidates and rounds.
_SYMMETRIC = {"Q3_K": (4, 32, (2.8, 0.2, 12), 3), "Q6_K": (32, 128, (30.8, 0.2, 12), 2)}
_TURNS = 3  # that scales of sub-blocks and of the super-block take


def encoder(variant: str) -> tuple[int, int, int, Any]:
    """(lanes, size, bytes, encode_group) for encode.groups."""
    return _asymmetric(variant) if variant in _ASYMMETRIC else _symmetric(variant)


@inline
def rounded_f16(address, value):
    """A scale as float16 stores it, there and as what it then is."""
    put_f16(address, min(max(value, -65504.0), 65504.0))
    return f16_at(address)


def _asymmetric(variant: str) -> tuple[int, int, int, Any]:
    lanes, size, most, top, candidates, rounds = _ASYMMETRIC[variant]
    search = asymmetric(lanes, size, most, candidates, rounds, False)
    rounded, rounded_scale, inverted = rounder(lanes, 0, most), rounder(lanes, 0, top), inverse(lanes)
    write = bytes_writer(lanes, size)
    row, turns, bytes_at, scales_at = 4 * lanes, _TURNS, BYTES, SCALES
    n_bytes, pack = {"Q2_K": (84, _pack_q2_k), "Q4_K": (144, _pack_q4_k), "Q5_K": (176, _pack_q5_k)}[variant]

    @inline
    def encode_group(x, w, scratch, out):
        zero = splat_f32(0.0, lanes)
        halves = scratch + scales_at
        scale, minimum = search(x, w)
        minimum = zero - minimum
        d = rounded_f16(halves, hmax(scale) / top)
        e = rounded_f16(halves + 2, hmax(minimum) / top)
        s = rounded_scale(scale * inverted(splat_f32(d, lanes)))
        m = rounded_scale(minimum * inverted(splat_f32(e, lanes)))
        for turn in range(turns):
            best, best_s, best_m = splat_f32(1e38, lanes), s, m
            for c in range(9):
                new_s = rounded_scale(s + splat_f32(c // 3 - 1, lanes))
                new_m = rounded_scale(m + splat_f32(c % 3 - 1, lanes))
                step, base = new_s * splat_f32(d, lanes), new_m * splat_f32(e, lanes)
                inv = inverted(step)
                shift = base * inv
                error = zero
                for i in range(size):
                    v = load_f32(x + i * row, lanes)
                    r = fma(rounded(fma(v, inv, shift)), step, zero - (v + base))
                    error = fma(r * r, load_f32(w + i * row, lanes), error)
                best_s = where_less(error, best, new_s, best_s)
                best_m = where_less(error, best, new_m, best_m)
                best = where_less(error, best, error, best)
            s, m = best_s, best_m
            if turn < turns - 1:
                inv = inverted(s * splat_f32(d, lanes))
                shift = m * splat_f32(e, lanes) * inv
                sw, sq, sx, sxq, sqq = zero, zero, zero, zero, zero
                for i in range(size):
                    v, u = load_f32(x + i * row, lanes), load_f32(w + i * row, lanes)
                    q = rounded(fma(v, inv, shift))
                    sw = sw + u
                    sq = fma(u, q, sq)
                    sx = fma(u, v, sx)
                    sxq = fma(u * v, q, sxq)
                    sqq = fma(u * q, q, sqq)
                a, b, c = hsum(s * s * sqq), -hsum(s * m * sq), hsum(m * m * sw)
                p, r = hsum(s * sxq), -hsum(m * sx)
                det = a * c - b * b
                if det > 1e-5 * a * c:
                    d = rounded_f16(halves, (c * p - b * r) / det)
                    e = rounded_f16(halves + 2, (a * r - b * p) / det)
                elif a > 0.0:
                    d = rounded_f16(halves, (p - b * e) / a)
        inv = inverted(s * splat_f32(d, lanes))
        shift = m * splat_f32(e, lanes) * inv
        for i in range(0, size, 4):
            at = x + i * row
            q0 = rounded(fma(load_f32(at, lanes), inv, shift))
            q1 = rounded(fma(load_f32(at + row, lanes), inv, shift))
            q2 = rounded(fma(load_f32(at + 2 * row, lanes), inv, shift))
            q3 = rounded(fma(load_f32(at + 3 * row, lanes), inv, shift))
            write(q0, q1, q2, q3, scratch + bytes_at + i)
        store(halves + 16, narrow_i8(to_i32(s)))
        store(halves + 32, narrow_i8(to_i32(m)))
        pack(scratch + bytes_at, halves, out)

    return lanes, size, n_bytes, encode_group


def _symmetric(variant: str) -> tuple[int, int, int, Any]:
    lanes, size = 16, 16
    half, top, candidates, rounds = _SYMMETRIC[variant]
    search = symmetric(lanes, size, half, candidates, rounds)
    rounded, rounded_scale, inverted = rounder(lanes, -half, half - 1), rounder(lanes, -top, top - 1), inverse(lanes)
    write = bytes_writer(lanes, size)
    row, turns, bytes_at, scales_at = 4 * lanes, _TURNS, BYTES, SCALES
    n_bytes, pack = {"Q3_K": (110, _pack_q3_k), "Q6_K": (210, _pack_q6_k)}[variant]

    @inline
    def encode_group(x, w, scratch, out):
        zero = splat_f32(0.0, lanes)
        halves = scratch + scales_at
        scale = search(x, w)
        high, low = hmax(scale), hmax(zero - scale)
        # The range of the integer scales is longer by one below zero.
        d = rounded_f16(halves, (-high if high > low else low) / top)
        s = rounded_scale(scale * inverted(splat_f32(d, lanes)))
        for turn in range(turns):
            best, best_s, best_xq, best_qq = splat_f32(1e38, lanes), s, zero, zero
            for c in range(3):
                new_s = rounded_scale(s + splat_f32(c - 1, lanes))
                step = new_s * splat_f32(d, lanes)
                inv = inverted(step)
                error, sxq, sqq = zero, zero, zero
                for i in range(size):
                    v, u = load_f32(x + i * row, lanes), load_f32(w + i * row, lanes)
                    q = rounded(v * inv)
                    r = fma(q, step, zero - v)
                    error = fma(r * r, u, error)
                    uq = u * q
                    sxq = fma(uq, v, sxq)
                    sqq = fma(uq, q, sqq)
                best_s = where_less(error, best, new_s, best_s)
                best_xq = where_less(error, best, sxq, best_xq)
                best_qq = where_less(error, best, sqq, best_qq)
                best = where_less(error, best, error, best)
            s = best_s
            below = hsum(s * s * best_qq)
            if turn < turns - 1 and below > 0.0:
                d = rounded_f16(halves, hsum(s * best_xq) / below)
        inv, offset = inverted(s * splat_f32(d, lanes)), splat_f32(half, lanes)
        for i in range(0, size, 4):
            at = x + i * row
            q0 = rounded(load_f32(at, lanes) * inv) + offset
            q1 = rounded(load_f32(at + row, lanes) * inv) + offset
            q2 = rounded(load_f32(at + 2 * row, lanes) * inv) + offset
            q3 = rounded(load_f32(at + 3 * row, lanes) * inv) + offset
            write(q0, q1, q2, q3, scratch + bytes_at + i)
        store(halves + 16, narrow_i8(to_i32(s)))
        pack(scratch + bytes_at, halves, out)

    return lanes, size, n_bytes, encode_group


# --- packing: 256 integers as bytes, and at `halves` d, dmin, 16 bytes further the scales, then the minima -----------


@inline
def _two_bits(q, to):
    """The lowest two bits of 256 bytes as 64 bytes."""
    for half in range(2):
        p = q + half * 128
        a, b = band(load_i8(p, 32), 3), band(load_i8(p + 32, 32), 3)
        c, d = band(load_i8(p + 64, 32), 3), band(load_i8(p + 96, 32), 3)
        store(to + half * 32, bor(bor(a, shl(b, 2)), bor(shl(c, 4), shl(d, 6))))


@inline
def _pack_q2_k(q, halves, out):
    store(out, bor(load_i8(halves + 16, 16), shl(load_i8(halves + 32, 16), 4)))
    _two_bits(q, out + 16)
    store(out + 80, load_i8(halves, 4))


@inline
def _pack_q3_k(q, halves, out):
    bits = shr(load_i8(q + 224, 32), 2)
    for j in range(6, -1, -1):
        bits = bor(shl(bits, 1), shr(load_i8(q + j * 32, 32), 2))
    store(out, bits)
    _two_bits(q, out + 32)
    low, high = i64_at(halves + 16), i64_at(halves + 24)
    # Six bits of scale + 32 (32 is the sixth bit turned, and what comes from above it is masked).
    a, b = (low ^ 0x20202020) & 0x3F3F3F3F, ((low >> 32) ^ 0x20202020) & 0x3F3F3F3F
    c, d = (high ^ 0x20202020) & 0x3F3F3F3F, ((high >> 32) ^ 0x20202020) & 0x3F3F3F3F
    nibbles, pairs = 0x0F0F0F0F, 0x03030303
    put_i32(out + 96, (a & nibbles) | (c & nibbles) << 4)
    put_i32(out + 100, (b & nibbles) | (d & nibbles) << 4)
    top = (a >> 4 & pairs) | (b >> 4 & pairs) << 2 | (c >> 4 & pairs) << 4 | (d >> 4 & pairs) << 6
    put_i32(out + 104, top)
    store(out + 108, load_i8(halves, 2))


@inline
def _six_bit(halves, out):
    """d, dmin, then 8 scales and 8 minima of six bits each in 12 bytes."""
    store(out, load_i8(halves, 4))
    scales, minima = i64_at(halves + 16), i64_at(halves + 32)
    a, b = scales & 0xFFFFFFFF, scales >> 32  # no byte is above 63
    c, d = minima & 0xFFFFFFFF, minima >> 32
    put_i32(out + 4, a | (b & 0x30303030) << 2)
    put_i32(out + 8, c | (d & 0x30303030) << 2)
    put_i32(out + 12, (b & 0x0F0F0F0F) | (d & 0x0F0F0F0F) << 4)


@inline
def _four_bits(q, to):
    """The lowest four bits of 256 bytes as 128 bytes."""
    for i in range(4):
        low, high = load_i8(q + i * 64, 32), load_i8(q + i * 64 + 32, 32)
        store(to + i * 32, bor(band(low, 15), shl(high, 4)))


@inline
def _pack_q4_k(q, halves, out):
    _six_bit(halves, out)
    _four_bits(q, out + 16)


@inline
def _pack_q5_k(q, halves, out):
    _six_bit(halves, out)
    bits = shr(load_i8(q + 224, 32), 4)
    for j in range(6, -1, -1):
        bits = bor(shl(bits, 1), shr(load_i8(q + j * 32, 32), 4))
    store(out + 16, bits)
    _four_bits(q, out + 48)


@inline
def _pack_q6_k(q, halves, out):
    for half in range(2):
        p = q + half * 128
        a, b = load_i8(p, 32), load_i8(p + 32, 32)
        c, d = load_i8(p + 64, 32), load_i8(p + 96, 32)
        store(out + half * 64, bor(band(a, 15), shl(c, 4)))
        store(out + half * 64 + 32, bor(band(b, 15), shl(d, 4)))
        bits = bor(bor(shr(a, 4), shl(shr(b, 4), 2)), bor(shl(shr(c, 4), 4), shl(shr(d, 4), 6)))
        store(out + 128 + half * 32, bits)
    store(out + 192, load_i8(halves + 16, 16))
    store(out + 208, load_i8(halves, 2))

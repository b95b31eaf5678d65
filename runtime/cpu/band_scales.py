"""Scales of bands: those of each type's blocks, a lane a row, out of the bytes that weave.py has put side by side.

A plain type's block begins with its float16 scales and, if it has any, minima. A super type's begins with its float16
factors and then has its sub-blocks' scales as the file packs them, a vector of bytes for each byte of a row.
"""

from __future__ import annotations

from typing import Any

from .loads import load_f16, load_i8, store
from .simd import band, bor, shl, shr, splat_f32, to_f32, unsigned_to_f32
from .vector import LANES
from .weights import inline

_lanes = LANES
_vector = 4 * LANES  # bytes of a float for each row


@inline
def _six_bit(p, d, m, scales, minima):
    """Q4_K, Q5_K: 12 bytes hold eight scales and eight minima of 6 bits."""
    for i in range(4):
        a, b = load_i8(p + i * _lanes, _lanes), load_i8(p + (4 + i) * _lanes, _lanes)
        c = load_i8(p + (8 + i) * _lanes, _lanes)
        first, last = scales + i * _vector, scales + (4 + i) * _vector
        store(first, unsigned_to_f32(band(a, 63)) * d)
        store(last, unsigned_to_f32(bor(band(c, 15), shl(shr(a, 6), 4))) * d)
        first, last = minima + i * _vector, minima + (4 + i) * _vector
        store(first, unsigned_to_f32(band(b, 63)) * m)
        store(last, unsigned_to_f32(bor(shr(c, 4), shl(shr(b, 6), 4))) * m)


@inline
def _signed_bytes(p, d, m, scales, minima):
    """Q6_K."""
    for i in range(16):
        store(scales + i * _vector, to_f32(load_i8(p + i * _lanes, _lanes)) * d)


@inline
def _nibbles(p, d, m, scales, minima):
    """Q2_K: scales low, minima high."""
    for i in range(16):
        both = load_i8(p + i * _lanes, _lanes)
        store(scales + i * _vector, unsigned_to_f32(band(both, 15)) * d)
        store(minima + i * _vector, unsigned_to_f32(shr(both, 4)) * m)


@inline
def _put_offset(low, high, d, to):
    store(to, (unsigned_to_f32(bor(low, shl(band(high, 3), 4))) - splat_f32(32.0, _lanes)) * d)


@inline
def _four_and_two(p, d, m, scales, minima):
    """Q3_K: sixteen of 6 bits less 32; bytes 0 to 7 have the low four, 8 to 11 the others."""
    for i in range(4):
        a, b = load_i8(p + i * _lanes, _lanes), load_i8(p + (4 + i) * _lanes, _lanes)
        c = load_i8(p + (8 + i) * _lanes, _lanes)
        to = scales + i * _vector
        _put_offset(band(a, 15), c, d, to)
        _put_offset(band(b, 15), shr(c, 2), d, to + 4 * _vector)
        _put_offset(shr(a, 4), shr(c, 4), d, to + 8 * _vector)
        _put_offset(shr(b, 4), shr(c, 6), d, to + 12 * _vector)


_BY_TYPE = {
    "Q2_K": _nibbles,
    "Q3_K": _four_and_two,
    "Q4_K": _six_bit,
    "Q5_K": _six_bit,
    "Q6_K": _signed_bytes,
}


def scale_reader(kind: str, has_min: bool) -> Any:
    """(p, scales, minima): write the scales of the super block at p, and the minima (subtracted, so negative)."""
    read, n = _BY_TYPE[kind], 2 if has_min else 1

    @inline
    def put_scales(p, scales, minima):
        d = load_f16(p, _lanes)
        m = d
        if has_min:
            m = load_f16(p + 2 * _lanes, _lanes) * splat_f32(-1.0, _lanes)
        read(p + 2 * n * _lanes, d, m, scales, minima)

    return put_scales

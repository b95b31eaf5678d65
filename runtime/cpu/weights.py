"""Weight types: how each GGUF block becomes unsigned bytes, scales and minima.

A weight is `scale * q + minimum`, with q an unsigned byte; types with a signed q have the constant minimum
`-offset * scale`. Layouts: ggml's block structures (gguf-py quants.py has the same as NumPy).

A *plain* type has blocks of 32 weights with one scale. A *super* type has blocks of 256 with 8 or 16 sub-blocks.
The functions here are compiled into the matmul and embedding kernels; `p` is the address of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numba import njit

from .loads import f16_at, i32_at, i64_at, load_i8
from .simd import (
    band,
    bits_to_bytes,
    bor,
    bxor,
    bytes_of,
    concat,
    nibbles,
    shl,
    shr,
    splat_f32,
    to_f32,
    unsigned_to_f32,
)

inline = njit(
    forceinline=True, error_model="numpy", fastmath={"contract", "nsz"}, no_cpython_wrapper=True, no_cfunc_wrapper=True
)


@dataclass(frozen=True)
class Plain:
    """Blocks of 32: bytes a block, 32 quants, and the minimum's place (None: -offset * scale)."""

    name: str
    n_bytes: int
    quants: Any  # (p) -> 32 unsigned bytes
    pair: Any  # (p, q) -> 64 unsigned bytes of the blocks at p and q
    bits: int  # of a quant
    offset: int = 0
    nibbles: int = 0  # where the block's quants are just 16 bytes of nibbles: their place

    @property
    def has_min(self) -> bool:
        return self.offset == 0

    @property
    def big(self) -> bool:
        """Quants may exceed 127."""
        return self.bits == 8


@dataclass(frozen=True)
class Super:
    """Blocks of 256: `scales(p)` gives the sub-blocks' scales then, if any, their minima, as float lanes."""

    name: str
    n_bytes: int
    group: int  # weights with one scale: 16 or 32
    quants: Any  # (p, half): 128 weights of one half as 4 vectors of 32 unsigned bytes
    scales: Any  # (p) -> f32 lanes, 256 // group of them
    minima: Any  # (p) -> likewise, or None
    bits: int  # of a quant
    places: tuple[int, int, int, int]  # of the sub-blocks' scales: their place, bytes; of float16 factors: place, count
    offset: int = 0

    @property
    def has_min(self) -> bool:
        return self.offset == 0

    @property
    def big(self) -> bool:
        """Quants may exceed 127."""
        return self.bits == 8


# --- plain types ---------------------------------------------------------------------------------------------------


@inline
def _q4_0(p):
    return nibbles(load_i8(p + 2, 16))


@inline
def _q4_0_pair(p, q):
    return nibbles(concat(load_i8(p + 2, 16), load_i8(q + 2, 16)))


@inline
def _q4_1(p):
    return nibbles(load_i8(p + 4, 16))


@inline
def _q4_1_pair(p, q):
    return nibbles(concat(load_i8(p + 4, 16), load_i8(q + 4, 16)))


@inline
def _q5_0(p):
    return bor(nibbles(load_i8(p + 6, 16)), bits_to_bytes(i32_at(p + 2), 16))


@inline
def _q5_0_pair(p, q):
    return concat(_q5_0(p), _q5_0(q))


@inline
def _q5_1(p):
    return bor(nibbles(load_i8(p + 8, 16)), bits_to_bytes(i32_at(p + 4), 16))


@inline
def _q5_1_pair(p, q):
    return concat(_q5_1(p), _q5_1(q))


@inline
def _q8_0(p):
    return bxor(load_i8(p + 2, 32), -128)


@inline
def _q8_0_pair(p, q):
    return bxor(concat(load_i8(p + 2, 32), load_i8(q + 2, 32)), -128)


# --- super types ---------------------------------------------------------------------------------------------------


@inline
def _six_bit(p):
    """The 12 bytes of Q4_K and Q5_K at p -> (8 scales, 8 minima), each 6 bits, as two 64-bit words of bytes."""
    low = i64_at(p)
    a, b, c = low & 0xFFFFFFFF, (low >> 32) & 0xFFFFFFFF, i32_at(p + 8) & 0xFFFFFFFF
    scale = (a & 0x3F3F3F3F) | (((c & 0x0F0F0F0F) | ((a >> 2) & 0x30303030)) << 32)
    minimum = (b & 0x3F3F3F3F) | ((((c >> 4) & 0x0F0F0F0F) | ((b >> 2) & 0x30303030)) << 32)
    return scale, minimum


@inline
def _q45_scales(p):
    return unsigned_to_f32(bytes_of(_six_bit(p + 4)[0])) * splat_f32(f16_at(p), 8)


@inline
def _q45_minima(p):
    return unsigned_to_f32(bytes_of(_six_bit(p + 4)[1])) * splat_f32(-f16_at(p + 2), 8)


@inline
def _q4_k(p, half):
    a, b = load_i8(p + 16 + half * 64, 32), load_i8(p + 48 + half * 64, 32)
    return band(a, 15), band(shr(a, 4), 15), band(b, 15), band(shr(b, 4), 15)


@inline
def _q5_k(p, half):
    a, b = load_i8(p + 48 + half * 64, 32), load_i8(p + 80 + half * 64, 32)
    h = load_i8(p + 16, 32)
    if half:
        h = shr(h, 4)
    return (
        bor(band(a, 15), shl(band(h, 1), 4)),
        bor(band(shr(a, 4), 15), shl(band(h, 2), 3)),
        bor(band(b, 15), shl(band(h, 4), 2)),
        bor(band(shr(b, 4), 15), shl(band(h, 8), 1)),
    )


@inline
def _q6_k(p, half):
    a, b = load_i8(p + half * 64, 32), load_i8(p + 32 + half * 64, 32)
    h = load_i8(p + 128 + half * 32, 32)
    return (
        bor(band(a, 15), shl(band(h, 3), 4)),
        bor(band(b, 15), shl(band(h, 12), 2)),
        bor(band(shr(a, 4), 15), band(h, 48)),
        bor(band(shr(b, 4), 15), band(shr(h, 2), 48)),
    )


@inline
def _q6_k_scales(p):
    return to_f32(load_i8(p + 192, 16)) * splat_f32(f16_at(p + 208), 16)


@inline
def _two_bits(q):
    return band(q, 3), band(shr(q, 2), 3), band(shr(q, 4), 3), band(shr(q, 6), 3)


@inline
def _q2_k(p, half):
    return _two_bits(load_i8(p + 16 + half * 32, 32))


@inline
def _q2_k_scales(p):
    return unsigned_to_f32(band(load_i8(p, 16), 15)) * splat_f32(f16_at(p + 80), 16)


@inline
def _q2_k_minima(p):
    return unsigned_to_f32(band(shr(load_i8(p, 16), 4), 15)) * splat_f32(-f16_at(p + 82), 16)


@inline
def _q3_k(p, half):
    a, b, c, d = _two_bits(load_i8(p + 32 + half * 32, 32))
    h = load_i8(p, 32)
    if half:
        h = shr(h, 4)
    return (
        bor(a, shl(band(h, 1), 2)),
        bor(b, shl(band(h, 2), 1)),
        bor(c, band(h, 4)),
        bor(d, band(shr(h, 1), 4)),
    )


@inline
def _q3_k_scales(p):
    low, high = i64_at(p + 96), i32_at(p + 104) & 0xFFFFFFFF
    a, b = low & 0xFFFFFFFF, (low >> 32) & 0xFFFFFFFF
    first = (a & 0x0F0F0F0F) | ((high & 0x03030303) << 4)
    second = (b & 0x0F0F0F0F) | (((high >> 2) & 0x03030303) << 4)
    third = ((a >> 4) & 0x0F0F0F0F) | (((high >> 4) & 0x03030303) << 4)
    fourth = ((b >> 4) & 0x0F0F0F0F) | (((high >> 6) & 0x03030303) << 4)
    signed = concat(bytes_of(first | (second << 32)), bytes_of(third | (fourth << 32)))
    return (unsigned_to_f32(signed) - splat_f32(32.0, 16)) * splat_f32(f16_at(p + 108), 16)


PLAIN = {
    t.name: t
    for t in (
        Plain("Q4_0", 18, _q4_0, _q4_0_pair, 4, offset=8, nibbles=2),
        Plain("Q4_1", 20, _q4_1, _q4_1_pair, 4, nibbles=4),
        Plain("Q5_0", 22, _q5_0, _q5_0_pair, 5, offset=16),
        Plain("Q5_1", 24, _q5_1, _q5_1_pair, 5),
        Plain("Q8_0", 34, _q8_0, _q8_0_pair, 8, offset=128),
    )
}
SUPER = {
    t.name: t
    for t in (
        Super("Q2_K", 84, 16, _q2_k, _q2_k_scales, _q2_k_minima, 2, (0, 16, 80, 2)),
        Super("Q3_K", 110, 16, _q3_k, _q3_k_scales, None, 3, (96, 12, 108, 1), offset=4),
        Super("Q4_K", 144, 32, _q4_k, _q45_scales, _q45_minima, 4, (4, 12, 0, 2)),
        Super("Q5_K", 176, 32, _q5_k, _q45_scales, _q45_minima, 5, (4, 12, 0, 2)),
        Super("Q6_K", 210, 16, _q6_k, _q6_k_scales, None, 6, (192, 16, 208, 1), offset=32),
    )
}
FLOAT = {"F32": 4, "F16": 2, "BF16": 2}  # bytes a weight

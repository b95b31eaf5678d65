"""Reading packed weights (repack.py) in kernels: for each type, how a run of 8 weights becomes float32.

A weight is `scale * code + minimum`, one scale and one minimum a run. A matrix is a tuple of its arrays.
A reader is in two parts, so that a kernel can send for several runs before it needs the first of them: `load` brings
what a run has in memory, and the others work on that.

Codes become floats without conversion instructions, which are slow on some devices: a code put into the low bits of
2**23's float32 is that float32 plus the code, times a power of two if it is not in the lowest bits; exact throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda, types

from .jit import simulated
from .loads import above, as_float, four, half, two
from .repack import PACKINGS

Device = Callable[..., Any]


def device(function: Device) -> Device:
    """A device function that is always inlined: tuples of arrays then cost nothing."""
    made: Device = cuda.jit(device=True, **({} if simulated() else {"forceinline": True}))(function)
    return made


@dataclass(frozen=True)
class Reader:
    """A type's device functions; scales is None for floats, whose codes are the weights.

    load(w, g, j) -> what is stored of run j (uint64) of the row whose first run is g (uint64), a tuple.
    codes(r) -> its 8 codes as float32, centred on zero in types without a minimum; scales(r) -> scale, minimum.
    """

    load: Device
    codes: Device
    scales: Device | None = None
    has_min: bool = True


_1, _2, _3, _4, _5 = (np.uint64(n) for n in range(1, 6))
_LOW = np.uint32(0x0F0F0F0F)


# --- codes ---------------------------------------------------------------------------------------------------------


@device
def _at_0(word, mask, offset):  # type: ignore[no-untyped-def]
    """The code under a mask whose lowest bit is bit 0, less an offset; _at_4 and so on: likewise from bit 4 on."""
    return above(word, mask) - (np.float32(2**23) + offset)


@device
def _at_4(word, mask, offset):  # type: ignore[no-untyped-def]
    return above(word, mask) * np.float32(2**-4) - (np.float32(2**19) + offset)


@device
def _at_8(word, mask, offset):  # type: ignore[no-untyped-def]
    return above(word, mask) * np.float32(2**-8) - (np.float32(2**15) + offset)


@device
def _at_12(word, mask, offset):  # type: ignore[no-untyped-def]
    return above(word, mask) * np.float32(2**-12) - (np.float32(2**11) + offset)


@device
def _word_codes(word, offset):  # type: ignore[no-untyped-def]
    """8 codes of 4 bits, the lowest first."""
    high = np.uint32(word >> np.uint32(16))
    return (
        _at_0(word, np.uint32(0xF), offset),
        _at_4(word, np.uint32(0xF0), offset),
        _at_8(word, np.uint32(0xF00), offset),
        _at_12(word, np.uint32(0xF000), offset),
        _at_0(high, np.uint32(0xF), offset),
        _at_4(high, np.uint32(0xF0), offset),
        _at_8(high, np.uint32(0xF00), offset),
        _at_12(high, np.uint32(0xF000), offset),
    )


@device
def _byte_codes(low, high, offset):  # type: ignore[no-untyped-def]
    """8 codes that are the bytes of two words."""
    low_2, high_2 = np.uint32(low >> np.uint32(16)), np.uint32(high >> np.uint32(16))
    return (
        _at_0(low, np.uint32(0xFF), offset),
        _at_8(low, np.uint32(0xFF00), offset),
        _at_0(low_2, np.uint32(0xFF), offset),
        _at_8(low_2, np.uint32(0xFF00), offset),
        _at_0(high, np.uint32(0xFF), offset),
        _at_8(high, np.uint32(0xFF00), offset),
        _at_0(high_2, np.uint32(0xFF), offset),
        _at_8(high_2, np.uint32(0xFF00), offset),
    )


@device
def _twos(run):  # type: ignore[no-untyped-def]
    """Two-bit codes (repack._spread), as the bytes of two words at bits 4 and 5; other bits are set, too."""
    word = np.uint32(run)
    word = np.uint32(word | np.uint32(word << np.uint32(20)))
    return word, np.uint32(word >> np.uint32(2))


@device
def _ones(run):  # type: ignore[no-untyped-def]
    """Bits (repack._ones): the first four at bit 3 of the bytes of a word, the others at bit 7; other bits are set."""
    copies = np.uint64(run) * np.uint64(1 + 2**9 + 2**18 + 2**27)
    return np.uint32(copies & np.uint64(0xFFFFFFFF))


@device
def _five_bits(word, run):  # type: ignore[no-untyped-def]
    """Low nibbles and a fifth bit each, as the bytes of two words."""
    bits, mask = _ones(run), np.uint32(0x10101010)
    low = np.uint32(np.uint32(word & _LOW) | np.uint32(np.uint32(bits << np.uint32(1)) & mask))
    nibbles = np.uint32(np.uint32(word >> np.uint32(4)) & _LOW)
    return low, np.uint32(nibbles | np.uint32(np.uint32(bits >> np.uint32(3)) & mask))


# --- floats --------------------------------------------------------------------------------------------------------


@device
def _load_f32(w, g, j):  # type: ignore[no-untyped-def]
    at = (g + j) << _3
    return four(w[0], at), four(w[0], at + _4)


@device
def _codes_f32(r):  # type: ignore[no-untyped-def]
    a, b = r
    return (
        as_float(a[0]), as_float(a[1]), as_float(a[2]), as_float(a[3]),
        as_float(b[0]), as_float(b[1]), as_float(b[2]), as_float(b[3]),
    )  # fmt: skip


@device
def _load_f16(w, g, j):  # type: ignore[no-untyped-def]
    return four(w[0], (g + j) << _2)


@device
def _upper(word):  # type: ignore[no-untyped-def]
    return half(np.uint32(word >> np.uint32(16)))


@device
def _codes_f16(r):  # type: ignore[no-untyped-def]
    return half(r[0]), _upper(r[0]), half(r[1]), _upper(r[1]), half(r[2]), _upper(r[2]), half(r[3]), _upper(r[3])


@device
def _bf16_low(word):  # type: ignore[no-untyped-def]
    return as_float(np.uint32(word << np.uint32(16)))


@device
def _bf16_high(word):  # type: ignore[no-untyped-def]
    return as_float(np.uint32(word & np.uint32(0xFFFF0000)))


@device
def _codes_bf16(r):  # type: ignore[no-untyped-def]
    return (
        _bf16_low(r[0]), _bf16_high(r[0]), _bf16_low(r[1]), _bf16_high(r[1]),
        _bf16_low(r[2]), _bf16_high(r[2]), _bf16_low(r[3]), _bf16_high(r[3]),
    )  # fmt: skip


# --- blocks of 32 --------------------------------------------------------------------------------------------------


@device
def _load_word(w, g, j):  # type: ignore[no-untyped-def]
    """Codes and a scale (and minimum) for four runs."""
    return w[0][g + j], w[1][(g >> _2) + (j >> _2)]


@device
def _load_word_high(w, g, j):  # type: ignore[no-untyped-def]
    return w[0][g + j], w[1][g + j], w[2][(g >> _2) + (j >> _2)]


@device
def _load_q8_0(w, g, j):  # type: ignore[no-untyped-def]
    a, b = two(w[0], (g + j) << _1)
    return a, b, w[1][(g >> _2) + (j >> _2)]


@device
def _codes_q4_0(r):  # type: ignore[no-untyped-def]
    return _word_codes(r[0], np.float32(8.0))


@device
def _codes_q4_1(r):  # type: ignore[no-untyped-def]
    return _word_codes(r[0], np.float32(0.0))


@device
def _codes_q5_0(r):  # type: ignore[no-untyped-def]
    low, high = _five_bits(r[0], r[1])
    return _byte_codes(low, high, np.float32(16.0))


@device
def _codes_q5_1(r):  # type: ignore[no-untyped-def]
    low, high = _five_bits(r[0], r[1])
    return _byte_codes(low, high, np.float32(0.0))


@device
def _codes_q8_0(r):  # type: ignore[no-untyped-def]
    return _byte_codes(r[0], r[1], np.float32(128.0))


@device
def _scale_1(r):  # type: ignore[no-untyped-def]
    return half(np.uint32(r[1])), np.float32(0.0)


@device
def _scale_2(r):  # type: ignore[no-untyped-def]
    return half(np.uint32(r[2])), np.float32(0.0)


@device
def _scale_min_1(r):  # type: ignore[no-untyped-def]
    return half(r[1]), _upper(r[1])


@device
def _scale_min_2(r):  # type: ignore[no-untyped-def]
    return half(r[2]), _upper(r[2])


# --- blocks of 256 -------------------------------------------------------------------------------------------------


@device
def _load_q2_k(w, g, j):  # type: ignore[no-untyped-def]
    return w[0][g + j], w[1][(g >> _1) + (j >> _1)], w[2][(g >> _5) + (j >> _5)]


@device
def _load_q4_k(w, g, j):  # type: ignore[no-untyped-def]
    return w[0][g + j], w[1][(g >> _2) + (j >> _2)], w[2][(g >> _5) + (j >> _5)]


@device
def _load_q5_k(w, g, j):  # type: ignore[no-untyped-def]
    return w[0][g + j], w[1][g + j], w[2][(g >> _2) + (j >> _2)], w[3][(g >> _5) + (j >> _5)]


@device
def _load_q36_k(w, g, j):  # type: ignore[no-untyped-def]
    return w[0][g + j], w[1][g + j], w[2][(g >> _1) + (j >> _1)], w[3][(g >> _5) + (j >> _5)]


@device
def _codes_q2_k(r):  # type: ignore[no-untyped-def]
    low, high = _twos(r[0])
    mask = np.uint32(0x30303030)
    low, high = np.uint32(low & mask), np.uint32(high & mask)
    return _byte_codes(np.uint32(low >> np.uint32(4)), np.uint32(high >> np.uint32(4)), np.float32(0.0))


@device
def _codes_q3_k(r):  # type: ignore[no-untyped-def]
    a, b = _twos(r[0])
    bits, two_bits, third = _ones(r[1]), np.uint32(0x03030303), np.uint32(0x04040404)
    low = np.uint32(np.uint32(a >> np.uint32(4)) & two_bits)
    high = np.uint32(np.uint32(b >> np.uint32(4)) & two_bits)
    low = np.uint32(low | np.uint32(np.uint32(bits >> np.uint32(1)) & third))
    high = np.uint32(high | np.uint32(np.uint32(bits >> np.uint32(5)) & third))
    return _byte_codes(low, high, np.float32(4.0))


@device
def _codes_q6_k(r):  # type: ignore[no-untyped-def]
    a, b = _twos(r[1])
    mask = np.uint32(0x30303030)
    low = np.uint32(np.uint32(r[0] & _LOW) | np.uint32(a & mask))
    nibbles = np.uint32(np.uint32(r[0] >> np.uint32(4)) & _LOW)
    return _byte_codes(low, np.uint32(nibbles | np.uint32(b & mask)), np.float32(32.0))


@device
def _scales_q2_k(r):  # type: ignore[no-untyped-def]
    both = np.uint32(r[1])
    scale = _at_0(both, np.uint32(0xF), np.float32(0.0))
    minimum = _at_4(both, np.uint32(0xF0), np.float32(0.0))
    return half(r[2]) * scale, -_upper(r[2]) * minimum


@device
def _six_bits(both, pair):  # type: ignore[no-untyped-def]
    word = np.uint32(both)
    scale = _at_0(word, np.uint32(0xFF), np.float32(0.0))
    return half(pair) * scale, -_upper(pair) * _at_8(word, np.uint32(0xFF00), np.float32(0.0))


@device
def _scales_q4_k(r):  # type: ignore[no-untyped-def]
    return _six_bits(r[1], r[2])


@device
def _scales_q5_k(r):  # type: ignore[no-untyped-def]
    return _six_bits(r[2], r[3])


@device
def _scales_q36_k(r):  # type: ignore[no-untyped-def]
    return half(np.uint32(r[3])) * np.float32(r[2]), np.float32(0.0)


READERS = {
    "F32": Reader(_load_f32, _codes_f32),
    "F16": Reader(_load_f16, _codes_f16),
    "BF16": Reader(_load_f16, _codes_bf16),
    "Q4_0": Reader(_load_word, _codes_q4_0, _scale_1, has_min=False),
    "Q4_1": Reader(_load_word, _codes_q4_1, _scale_min_1),
    "Q5_0": Reader(_load_word_high, _codes_q5_0, _scale_2, has_min=False),
    "Q5_1": Reader(_load_word_high, _codes_q5_1, _scale_min_2),
    "Q8_0": Reader(_load_q8_0, _codes_q8_0, _scale_2, has_min=False),
    "Q2_K": Reader(_load_q2_k, _codes_q2_k, _scales_q2_k),
    "Q3_K": Reader(_load_q36_k, _codes_q3_k, _scales_q36_k, has_min=False),
    "Q4_K": Reader(_load_q4_k, _codes_q4_1, _scales_q4_k),
    "Q5_K": Reader(_load_q5_k, _codes_q5_1, _scales_q5_k),
    "Q6_K": Reader(_load_q36_k, _codes_q6_k, _scales_q36_k, has_min=False),
}


# --- what kernels use ----------------------------------------------------------------------------------------------


@device
def plain(q, x):  # type: ignore[no-untyped-def]
    """The dot product of two eights of floats."""
    first = q[0] * x[0] + q[1] * x[1] + q[2] * x[2] + q[3] * x[3]
    return first + q[4] * x[4] + q[5] * x[5] + q[6] * x[6] + q[7] * x[7]


@cache
def dot(kind: str) -> Device:
    """(r, x, total) -> the dot product of a loaded run and 8 floats x, whose sum is `total`."""
    reader = READERS[kind]
    codes, scales, has_min = reader.codes, reader.scales, reader.has_min

    def floats(r, x, total):  # type: ignore[no-untyped-def]
        return plain(codes(r), x)

    def scaled(r, x, total):  # type: ignore[no-untyped-def]
        scale, minimum = scales(r)
        product = scale * plain(codes(r), x)
        return product + minimum * total if has_min else product

    return device(floats if scales is None else scaled)


@cache
def values(kind: str) -> Device:
    """(r) -> the 8 weights of a loaded run as float32."""
    reader = READERS[kind]
    codes, scales, has_min = reader.codes, reader.scales, reader.has_min

    def scaled(r):  # type: ignore[no-untyped-def]
        q, (s, m) = codes(r), scales(r)
        if has_min:
            return (
                q[0] * s + m, q[1] * s + m, q[2] * s + m, q[3] * s + m,
                q[4] * s + m, q[5] * s + m, q[6] * s + m, q[7] * s + m,
            )  # fmt: skip
        return q[0] * s, q[1] * s, q[2] * s, q[3] * s, q[4] * s, q[5] * s, q[6] * s, q[7] * s

    return codes if scales is None else device(scaled)


def array_types(kind: str) -> tuple[Any, ...]:
    """Numba's types of a matrix's arrays."""
    return tuple(getattr(types, np.dtype(dtype).name)[::1] for dtype, _ in PACKINGS[kind].arrays)

"""Products of four listed rows at a time with a token's activations, for types with blocks of 32 weights.

Four rows share the loads of the activations and hide each other's latencies, and 8 blocks' scales are converted and
multiplied with the activations' at once: listed rows come from memory, not from a cache, and the instructions must not
take longer than the reading. Sums of quants times the constant offset, or a block's minimum, are added 8 blocks at once
too. A row's number does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .loads import f16_at, f32_at, i32_at, load_f32, load_i8, prefetch, spaced_f16, splat_f16
from .simd import fma, hsum, part, splat_f32, splat_i32, spread, to_f32
from .tiles import dot4
from .vector import WIDE
from .weights import Plain, inline

ROWS = 4  # rows at a time


@inline
def fetch_row(p, n_bytes):
    """Ask for a row."""
    for i in range(0, n_bytes, 64):
        prefetch(p + i, 64)


@inline
def fetch_first(w, row_bytes, listed, first, end, ahead):
    """Ask for the rows that a part of the list begins with, before the first is wanted."""
    for i in range(first, min(first + ahead, end)):
        fetch_row(w + i32_at(listed + i * 4) * row_bytes, row_bytes)


def four_rows(t: Plain) -> Any:
    """(four rows, xq, xd, xs, k, four rows to fetch meanwhile) -> four products."""
    size, quants, pair, big, has_min = t.n_bytes, t.quants, t.pair, t.big, t.has_min
    zero, factor = np.float32(0), np.float32(1 if has_min else -t.offset)  # factor: of what the sums `rest` hold
    four_blocks, eight, lanes = 4 * size, 8 * size, WIDE // 4

    @inline
    def add(u, q, scale, acc):
        """WIDE weights."""
        return fma(to_f32(dot4(splat_i32(0, lanes), u, load_i8(q, WIDE), big)), scale, acc)

    @inline
    def blocks_64(p, q, d, acc):
        """8 blocks, scales in d's lanes, by twos."""
        acc = add(pair(p, p + size), q, spread(d, 0, 8, 16), acc)
        acc = add(pair(p + 2 * size, p + 3 * size), q + 64, spread(d, 2, 8, 16), acc)
        acc = add(pair(p + 4 * size, p + 5 * size), q + 128, spread(d, 4, 8, 16), acc)
        return add(pair(p + 6 * size, p + 7 * size), q + 192, spread(d, 6, 8, 16), acc)

    @inline
    def blocks_32(p, q, d, acc):
        """8 blocks, one by one."""
        acc = add(quants(p), q, spread(d, 0, 8, 8), acc)
        acc = add(quants(p + size), q + 32, spread(d, 1, 8, 8), acc)
        acc = add(quants(p + 2 * size), q + 64, spread(d, 2, 8, 8), acc)
        acc = add(quants(p + 3 * size), q + 96, spread(d, 3, 8, 8), acc)
        acc = add(quants(p + 4 * size), q + 128, spread(d, 4, 8, 8), acc)
        acc = add(quants(p + 5 * size), q + 160, spread(d, 5, 8, 8), acc)
        acc = add(quants(p + 6 * size), q + 192, spread(d, 6, 8, 8), acc)
        return add(quants(p + 7 * size), q + 224, spread(d, 7, 8, 8), acc)

    blocks = blocks_64 if WIDE == 64 else blocks_32

    @inline
    def add_eight(p, q, xd, xs, acc, rest):
        """256 weights; xd, xs: 8 lanes."""
        d = spaced_f16(p, size, 8)
        rest = fma(spaced_f16(p + 2, size, 8) if has_min else d, xs, rest)
        return blocks(p, q, d * xd, acc), rest

    @inline
    def add_one(p, q, xd, xs, acc, rest):
        """32 weights; xd, xs: numbers; acc: 8 lanes, rest: a number."""
        ints = dot4(splat_i32(0, 8), quants(p), load_i8(q, 32), big)
        acc = fma(to_f32(ints), splat_f16(p, p, 8) * splat_f32(xd, 8), acc)
        return acc, rest + f16_at(p + 2 if has_min else p) * xs

    @inline
    def total(acc, rest, last, more):
        eighth = part(acc, 0, 8) + part(acc, 8, 8) if lanes == 16 else acc
        return hsum(fma(rest, splat_f32(factor, 8), eighth + last)) + more * factor

    @inline
    def four(p0, p1, p2, p3, q, d, s, k, n0, n1, n2, n3):
        a0 = a1 = a2 = a3 = splat_f32(0.0, lanes)
        r0 = r1 = r2 = r3 = splat_f32(0.0, 8)
        half = k // 256 * four_blocks  # rows come faster when both halves are fetched at once
        for _ in range(k // 256):
            prefetch(n0, four_blocks)
            prefetch(n0 + half, four_blocks)
            prefetch(n1, four_blocks)
            prefetch(n1 + half, four_blocks)
            prefetch(n2, four_blocks)
            prefetch(n2 + half, four_blocks)
            prefetch(n3, four_blocks)
            prefetch(n3 + half, four_blocks)
            xd, xs = load_f32(d, 8), load_f32(s, 8)
            a0, r0 = add_eight(p0, q, xd, xs, a0, r0)
            a1, r1 = add_eight(p1, q, xd, xs, a1, r1)
            a2, r2 = add_eight(p2, q, xd, xs, a2, r2)
            a3, r3 = add_eight(p3, q, xd, xs, a3, r3)
            p0, p1, p2, p3 = p0 + eight, p1 + eight, p2 + eight, p3 + eight
            n0, n1, n2, n3 = n0 + four_blocks, n1 + four_blocks, n2 + four_blocks, n3 + four_blocks
            q, d, s = q + 256, d + 32, s + 32
        n0, n1, n2, n3 = n0 + half, n1 + half, n2 + half, n3 + half
        b0 = b1 = b2 = b3 = splat_f32(0.0, 8)
        m0 = m1 = m2 = m3 = zero
        for _ in range(k % 256 // 32):
            prefetch(n0, size)
            prefetch(n1, size)
            prefetch(n2, size)
            prefetch(n3, size)
            xd, xs = f32_at(d), f32_at(s)
            b0, m0 = add_one(p0, q, xd, xs, b0, m0)
            b1, m1 = add_one(p1, q, xd, xs, b1, m1)
            b2, m2 = add_one(p2, q, xd, xs, b2, m2)
            b3, m3 = add_one(p3, q, xd, xs, b3, m3)
            p0, p1, p2, p3 = p0 + size, p1 + size, p2 + size, p3 + size
            n0, n1, n2, n3 = n0 + size, n1 + size, n2 + size, n3 + size
            q, d, s = q + 32, d + 4, s + 4
        return total(a0, r0, b0, m0), total(a1, r1, b1, m1), total(a2, r2, b2, m2), total(a3, r3, b3, m3)

    return four

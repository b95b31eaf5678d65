"""Interleaving rows of quantised weights into bands (band_vectors.py), once, when a model is loaded.

A band takes as many bytes as its rows; block follows block. Of a plain type, a block has its rows' float16 scales,
minima if any, and planes; of a super type, its float16 factors, the bytes of its sub-blocks' scales, and eight times
planes.
"""

from __future__ import annotations

from typing import Any

from .band_vectors import plane_bytes, store_band
from .layout import Weave
from .loads import i8_at, i64_at, put_i8, store_quads
from .tape import finish, take
from .vector import LANES, WIDE
from .weights import PLAIN, SUPER, inline


def build(family: str, variant: str) -> Any:
    """`weave:TYPE`: rows w [n, k] into bands at out; the last band repeats the last row."""
    args_of, lanes, wide = Weave, LANES, WIDE
    super_ = variant in SUPER
    t: Any = SUPER[variant] if super_ else PLAIN[variant]
    size, quants, bits, block = t.n_bytes, t.quants, t.bits, 256 if super_ else 32
    planes = plane_bytes(bits)
    scales_at, n_scales, factors_at, n_factors = t.places if super_ else (0, 0, 0, 2 if t.has_min else 1)
    head = lanes * (2 * n_factors + n_scales)
    chunk_bytes = 16 * lanes * 2  # of a row's 32 columns: eight vectors

    @inline
    def stage_plain(p0, p1, p2, p3, to):
        store_quads(to, quants(p0), quants(p1), quants(p2), quants(p3), wide)

    @inline
    def stage_super(p0, p1, p2, p3, to):
        for half in range(2):
            a0, b0, c0, d0 = quants(p0, half)
            a1, b1, c1, d1 = quants(p1, half)
            a2, b2, c2, d2 = quants(p2, half)
            a3, b3, c3, d3 = quants(p3, half)
            at = to + half * 32 * wide
            store_quads(at, a0, a1, a2, a3, wide)
            store_quads(at + 8 * wide, b0, b1, b2, b3, wide)
            store_quads(at + 16 * wide, c0, c1, c2, c3, wide)
            store_quads(at + 24 * wide, d0, d1, d2, d3, wide)

    stage = stage_super if super_ else stage_plain

    @inline
    def put_bytes(p, row, count, to):
        """`count` bytes of a row, each to the vector of its like."""
        for i in range(count):
            put_i8(to + i * lanes + row, i8_at(p + i))

    @inline
    def put_halves(p, row, to):
        for i in range(n_factors):
            put_i8(to + (i * lanes + row) * 2, i8_at(p + 2 * i))
            put_i8(to + (i * lanes + row) * 2 + 1, i8_at(p + 2 * i + 1))

    def weave(args, step, ith, turn):
        w, out, k, n = (
            i64_at(args + args_of.w),
            i64_at(args + args_of.out),
            i64_at(args + args_of.k),
            i64_at(args + args_of.n),
        )
        row_bytes = k // block * size
        spare = i64_at(args + args_of.scratch) + ith * i64_at(args + args_of.scratch_bytes)
        n_chunks = (n + lanes - 1) // lanes
        while True:
            c = take(args, turn, n_chunks)
            if c < 0:
                break
            to = out + c * lanes * row_bytes
            for b in range(k // block):
                for j in range(0, lanes, 4):
                    r = c * lanes + j
                    p0, p1 = w + min(r, n - 1) * row_bytes + b * size, w + min(r + 1, n - 1) * row_bytes + b * size
                    p2, p3 = w + min(r + 2, n - 1) * row_bytes + b * size, w + min(r + 3, n - 1) * row_bytes + b * size
                    stage(p0, p1, p2, p3, spare + j * 4)
                for row in range(lanes):
                    p = w + min(c * lanes + row, n - 1) * row_bytes + b * size
                    put_halves(p + factors_at, row, to)
                    put_bytes(p + scales_at, row, n_scales, to + 2 * n_factors * lanes)
                to += head
                for i in range(block // 32):
                    store_band(to, spare + i * chunk_bytes, bits)
                    to += planes
            finish(args)
        return n_chunks

    return weave

"""Products of quantised weights with few tokens, several rows at a time: the numbers of tiles without their panels.

A strip is staged, which is to say unpacked into the thread's scratch, and then multiplied with each token's
activations. Staging costs about as much as three tokens' products, so a token alone goes faster by rows, where its
numbers need not be those that it has among others.
"""

from __future__ import annotations

from typing import Any

from .layout import ROWS_MAX, MatMul
from .loads import f32_at, i8_at, i64_at, load_f32, prefetch, put_i8, store
from .products import scale_writer
from .simd import fma, splat_f32, to_f32
from .strip_vectors import (
    STRIP_ROWS,
    STRIP_VECTOR,
    put_strip,
    put_strip_nibbles,
    strip_bases,
    strip_dot,
    strip_f16,
)
from .tape import finish, take
from .weights import PLAIN, SUPER, Plain, Super, inline

STRIP = 256  # columns of a strip


def _each_base(quants: Any) -> Any:
    """(bases, offset) -> the quants of the rows that are `offset` bytes from their bases, as a tuple."""
    if STRIP_ROWS == 8:

        @inline
        def two(bases, offset):
            return quants(bases[0] + offset), quants(bases[1] + offset)

        return two

    @inline
    def four(bases, offset):
        return (
            quants(bases[0] + offset),
            quants(bases[1] + offset),
            quants(bases[2] + offset),
            quants(bases[3] + offset),
        )

    return four


def _extend(group: int, big: bool) -> Any:
    """What a strip's blocks of 32 columns add to the sums of one token, as _tile_product does it."""
    lanes, wide, block = STRIP_ROWS, STRIP_VECTOR, 32 * STRIP_ROWS

    @inline
    def by_32(quants, scales, minima, xq, xd, xs, n_blocks, sums):
        for b in range(n_blocks):
            scale = load_f32(scales + b * wide, lanes) * splat_f32(f32_at(xd + b * 4), lanes)
            sums = fma(to_f32(strip_dot(quants + b * block, xq + b * 32, big, 0)[0]), scale, sums)
            sums = fma(load_f32(minima + b * wide, lanes), splat_f32(f32_at(xs + b * 4), lanes), sums)
        return sums

    @inline
    def by_16(quants, scales, minima, xq, xd, xs, n_blocks, sums):
        for b in range(n_blocks):
            first, last = strip_dot(quants + b * block, xq + b * 32, big, 1)
            d, s, at = splat_f32(f32_at(xd + b * 4), lanes), xs + b * 8, 2 * b * wide
            sums = fma(to_f32(first), load_f32(scales + at, lanes) * d, sums)
            sums = fma(load_f32(minima + at, lanes), splat_f32(f32_at(s), lanes), sums)
            sums = fma(to_f32(last), load_f32(scales + at + wide, lanes) * d, sums)
            sums = fma(load_f32(minima + at + wide, lanes), splat_f32(f32_at(s + 4), lanes), sums)
        return sums

    return by_32 if group == 32 else by_16


def _plain(t: Plain) -> Any:
    """(rows of weights, bytes of a row, next, quants, scales, minima, blocks): stage a strip, fetching what is next."""
    size, quants, has_min, negative_offset = t.n_bytes, t.quants, t.has_min, -float(t.offset)
    nibbles, each_base = t.nibbles, _each_base(quants)
    strip_rows, strip_wide, block, block_bytes = STRIP_ROWS, STRIP_VECTOR, 32 * STRIP_ROWS, STRIP_ROWS * size

    @inline
    def put_rows(to, i, bases, stride):
        if nibbles:
            put_strip_nibbles(to, i, bases, i * stride + nibbles)
        else:
            put_strip(to, i, each_base(bases, i * stride))

    @inline
    def stage(p, stride, later, to_q, to_d, to_m, n_blocks):
        for b in range(n_blocks):
            prefetch(later, block_bytes)
            later += block_bytes
            to, bases = to_q + b * block, strip_bases(p + b * size, stride)
            put_rows(to, 0, bases, stride)
            put_rows(to, 1, bases, stride)
            put_rows(to, 2, bases, stride)
            put_rows(to, 3, bases, stride)
            d = strip_f16(bases, stride)
            store(to_d + b * strip_wide, d)
            if has_min:
                store(to_m + b * strip_wide, strip_f16(strip_bases(p + b * size + 2, stride), stride))
            else:
                store(to_m + b * strip_wide, d * splat_f32(negative_offset, strip_rows))

    return stage


def _super(t: Super) -> Any:
    """The same of a type with blocks of 256."""
    size, quants, put_scales = t.n_bytes, t.quants, scale_writer(t)
    strip_rows, strip_wide, block, fetched = STRIP_ROWS, STRIP_VECTOR, 32 * STRIP_ROWS, STRIP_ROWS // 4 * size
    two_rows = strip_rows == 8

    @inline
    def put_half(p, stride, half, to, i):
        """128 columns of rows i, i + 4, ..."""
        first = p + i * stride
        if two_rows:
            (a0, b0, c0, d0), (a1, b1, c1, d1) = quants(first, half), quants(first + 4 * stride, half)
            put_strip(to, i, (a0, a1))
            put_strip(to + block, i, (b0, b1))
            put_strip(to + 2 * block, i, (c0, c1))
            put_strip(to + 3 * block, i, (d0, d1))
        else:
            (a0, b0, c0, d0), (a1, b1, c1, d1) = quants(first, half), quants(first + 4 * stride, half)
            first += 8 * stride
            (a2, b2, c2, d2), (a3, b3, c3, d3) = quants(first, half), quants(first + 4 * stride, half)
            put_strip(to, i, (a0, a1, a2, a3))
            put_strip(to + block, i, (b0, b1, b2, b3))
            put_strip(to + 2 * block, i, (c0, c1, c2, c3))
            put_strip(to + 3 * block, i, (d0, d1, d2, d3))

    @inline
    def stage(p, stride, later, to_q, to_d, to_m, n_blocks):
        for i in range(4):
            prefetch(later, fetched)
            later += fetched
            put_half(p, stride, 0, to_q, i)
            put_half(p, stride, 1, to_q + 4 * block, i)
        for i in range(0, strip_rows, 4):
            q = p + i * stride
            put_scales(q, q + stride, q + 2 * stride, q + 3 * stride, to_d + i * 4, to_m + i * 4, strip_wide)

    return stage


def strips(kind: str, put: Any) -> Any:
    """(args, n_tok, ith, turn): the product of few tokens; put: (args, address, row, value) writes one output."""
    t: Any = PLAIN.get(kind) or SUPER[kind]
    group = t.group if kind in SUPER else 32
    block, size, sums_by_16 = 256 if kind in SUPER else 32, t.n_bytes, group == 16
    stage, extend = _super(t) if kind in SUPER else _plain(t), _extend(group, t.big)
    strip, strip_rows, wide, most, args_of = STRIP, STRIP_ROWS, STRIP_VECTOR, ROWS_MAX, MatMul

    @inline
    def by_strips(args, n_tok, ith, turn):
        """Few tokens, with the tiles' sums: strip_rows rows at a time, staged STRIP columns at a time."""
        w, out, k, n = (
            i64_at(args + args_of.w),
            i64_at(args + args_of.out),
            i64_at(args + args_of.k),
            i64_at(args + args_of.n),
        )
        row_bytes, stride = i64_at(args + args_of.row_bytes), i64_at(args + args_of.out_stride)
        xq, xd = i64_at(args + args_of.xq), i64_at(args + args_of.xd)
        xs = i64_at(args + args_of.xn) if sums_by_16 else i64_at(args + args_of.xs)
        x_sums = k // 16 if sums_by_16 else k // 32  # of a token
        bias, add = i64_at(args + args_of.bias), i64_at(args + args_of.add)
        chunk = (i64_at(args + args_of.chunk) + strip_rows - 1) // strip_rows * strip_rows
        totals = i64_at(args + args_of.scratch) + ith * i64_at(args + args_of.scratch_bytes)
        quants = totals + most * wide
        scales = quants + strip * strip_rows
        minima = scales + strip // 16 * wide
        if n < strip_rows:  # a copy in which the last row fills up
            copy = minima + strip // 16 * wide
            for j in range(strip_rows):
                for i in range(row_bytes):
                    put_i8(copy + j * row_bytes + i, i8_at(w + min(j, n - 1) * row_bytes + i))
            w = copy
        n_chunks = (n + chunk - 1) // chunk
        while True:
            first = take(args, turn, n_chunks) * chunk
            if first < 0:
                break
            for r in range(first, min(first + chunk, n), strip_rows):
                for t in range(n_tok):
                    store(totals + t * wide, splat_f32(0.0, strip_rows))
                start = max(0, min(r, n - strip_rows))  # the last strip begins in the one before
                row = w + start * row_bytes
                for c in range(0, k, strip):
                    n_blocks = min(k - c, strip) // 32
                    later = row + strip_rows * (row_bytes + c // block * size)
                    stage(row + c // block * size, row_bytes, later, quants, scales, minima, n_blocks)
                    for t in range(n_tok):
                        x, d = xq + t * k + c, xd + (t * k + c) // 32 * 4
                        s = xs + (t * x_sums + c // 16) * 4 if sums_by_16 else xs + (t * x_sums + c // 32) * 4
                        total = load_f32(totals + t * wide, strip_rows)
                        store(totals + t * wide, extend(quants, scales, minima, x, d, s, n_blocks, total))
                for t in range(n_tok):
                    target = out + (t * stride + r) * 4
                    if r + strip_rows <= n:
                        v = load_f32(totals + t * wide, strip_rows)
                        if bias != 0:
                            v = v + load_f32(bias + r * 4, strip_rows)
                        if add != 0:
                            v = v + load_f32(target, strip_rows)
                        store(target, v)
                    else:
                        for i in range(n - r):
                            put(args, target + i * 4, r + i, f32_at(totals + t * wide + (r - start + i) * 4))
            finish(args)
        return n_chunks

    return by_strips

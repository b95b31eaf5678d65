"""Matrix products of weights as they lie in a file and packed activations, one kernel a weight type, for any number of
tokens. (Weights that were interleaved at load have a kernel of their own: bands.py.)

By rows: a weight row is multiplied with one token's activations (or four tokens'), 64 (or 32) weights an instruction.
By tiles, for many tokens: 16 (or 8) rows at a time are unpacked into a panel of bytes that stays in the cache, and a
register tile of rows x tokens walks over it. Both accumulate exact integer sums by block, scaled in float32, in orders
that differ: what a token gets depends on the way chosen for it, and never on the tokens beside it.
"""

from __future__ import annotations

from typing import Any

from .layout import MatMul, Step
from .loads import (
    f32_at,
    i64_at,
    load_f32,
    put_f32,
    store,
)
from .products import AHEAD, ROW_TOKENS, TOKENS, Product, product
from .tape import finish, take
from .tiles import tile_store
from .vector import LANES, WIDE
from .weights import inline


def build(family: str, variant: str) -> Any:
    """The kernel of a weight type: the loops around its product."""
    p = product(variant)
    return kernel(p, rows_fill(p))


def rows_fill(p: Product) -> Any:
    """(w, row bytes, first row, panels, rows, quants, scales, minima, spare, k): unpack rows into panels."""
    unpack, quantised, rows, wide = p.unpack, p.group > 0, LANES, WIDE
    scale_bytes = 4 * LANES // p.group if p.group else 0

    @inline
    def fill(w, row_bytes, first, here, n, quants, scales, minima, spare, k):
        for g in range(here):
            for j in range(0, rows, 4):
                r, last = first + g * rows + j, n - 1
                r0, r1 = w + min(r, last) * row_bytes, w + min(r + 1, last) * row_bytes
                r2, r3 = w + min(r + 2, last) * row_bytes, w + min(r + 3, last) * row_bytes
                if quantised:
                    at = g * k * scale_bytes + j * 4
                    unpack(r0, r1, r2, r3, quants + g * k * rows + j * 4, scales + at, minima + at, k)
                else:
                    unpack(r0, r1, r2, r3, quants + g * k * wide + j * 4, 0, 0, k)

    return fill


def slab(p: Product, fill: Any) -> tuple[Any, Any]:
    """What kernels of many tokens share: `put` one output, and multiply some rows of a matrix with all tokens.

    The second: (args, tile, w, first row, row panels, xq, xd, xs, xf, out, tokens); xs: of the sums, those that the
    type's groups need; tile: the address of the thread's scratch.
    """
    multiply, multiply_half, quantised, group = p.multiply, p.multiply_half, p.group > 0, p.group
    rows, tokens, wide, lanes = LANES, TOKENS, WIDE, LANES
    args_of = MatMul
    scale_bytes = 4 * LANES // group if group else 0  # of the scales, a weight column

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
    def write_tile(args, tile_at, out, stride, r0, n, t0, count):
        bias, add = i64_at(args + args_of.bias), i64_at(args + args_of.add)
        for t in range(count):
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
    def tiles(args, tile_at, w, first, here, xq, xd, xs, xf, out, n_tok):
        k, n = i64_at(args + args_of.k), i64_at(args + args_of.n)
        row_bytes, stride = i64_at(args + args_of.row_bytes), i64_at(args + args_of.out_stride)
        panels = i64_at(args + args_of.panels)
        quants = tile_at + tokens * wide
        scales = quants + panels * k * rows
        minima = scales + panels * k * scale_bytes
        spare = minima + panels * k * scale_bytes
        fill(w, row_bytes, first, here, n, quants, scales, minima, spare, k)
        for t0 in range(0, n_tok, tokens):
            if quantised:
                x, d, s = xq + t0 * k, xd + t0 * (k // 32) * 4, xs + t0 * (k // group) * 4
            else:
                x, d, s = xf + t0 * k * 4, 0, 0
            rest = min(tokens, n_tok - t0)
            for g in range(here):
                panel = quants + g * k * (rows if quantised else wide)
                scale, minimum = scales + g * k * scale_bytes, minima + g * k * scale_bytes
                if rest > tokens // 2:
                    tile_store(tile_at, multiply(panel, scale, minimum, x, d, s, k), wide)
                else:
                    tile_store(tile_at, multiply_half(panel, scale, minimum, x, d, s, k), wide)
                write_tile(args, tile_at, out, stride, first + g * rows, n, t0, rest)

    return put, tiles


def kernel(p: Product, fill: Any, few: bool = True) -> Any:
    """The kernel around a product; fill makes the panels for many tokens. few: it serves few tokens too, by rows."""
    row_dot, row_dots, quantised, sums_by_16 = p.row_dot, p.row_dots, p.group > 0, p.group == 16
    rows, together, ahead = LANES, ROW_TOKENS, AHEAD
    args_of, step_of = MatMul, Step
    put, tiles = slab(p, fill)

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
        xq, ld = i64_at(args + args_of.xq), i64_at(args + args_of.ld)
        ln, ls, xf = i64_at(args + args_of.ln), i64_at(args + args_of.ls), i64_at(args + args_of.xf)
        n_chunks = (n + chunk - 1) // chunk
        while True:
            first = take(args, turn, n_chunks) * chunk
            if first < 0:
                break
            for r in range(first, min(first + chunk, n)):
                t = 0
                while t + together <= n_tok:
                    o = t * k
                    if quantised:
                        values = row_dots(w + r * row_bytes, xq + o, ld + o, ln + o, ls + o, k, ahead)
                    else:
                        values = row_dots(w + r * row_bytes, xf + 4 * o, 0, 0, 0, k, ahead)
                    at = out + (t * stride + r) * 4
                    put(args, at, r, values[0])
                    put(args, at + stride * 4, r, values[1])
                    put(args, at + stride * 8, r, values[2])
                    put(args, at + stride * 12, r, values[3])
                    t += together
                while t < n_tok:
                    o = t * k
                    if quantised:
                        value = row_dot(w + r * row_bytes, xq + o, ld + o, ln + o, ls + o, k, ahead)
                    else:
                        value = row_dot(w + r * row_bytes, xf + 4 * o, 0, 0, 0, k, ahead)
                    put(args, out + (t * stride + r) * 4, r, value)
                    t += 1
            finish(args)
        return n_chunks

    @inline
    def by_tiles(args, n_tok, ith, turn):
        w, out, n = i64_at(args + args_of.w), i64_at(args + args_of.out), i64_at(args + args_of.n)
        panels = i64_at(args + args_of.panels)
        xq, xd, xf = i64_at(args + args_of.xq), i64_at(args + args_of.xd), i64_at(args + args_of.xf)
        xs = i64_at(args + args_of.xn) if sums_by_16 else i64_at(args + args_of.xs)
        tile_at = i64_at(args + args_of.scratch) + ith * i64_at(args + args_of.scratch_bytes)
        n_chunks = (n + panels * rows - 1) // (panels * rows)
        while True:
            first = take(args, turn, n_chunks) * panels * rows
            if first < 0:
                break
            here = min(panels, (n - first + rows - 1) // rows)
            tiles(args, tile_at, w, first, here, xq, xd, xs, xf, out, n_tok)
            finish(args)
        return n_chunks

    def matmul(args, step, ith, turn):
        n_tok = i64_at(step + i64_at(args + args_of.count))
        if few and n_tok < i64_at(step + step_of.tile_min):
            return by_rows(args, n_tok, turn)
        return by_tiles(args, n_tok, ith, turn)

    return matmul

"""Products of pairs of a token and an expert with that expert's matrix, one kernel a weight type.

An expert's matrix is a block of rows, multiplied as matmul.py multiplies a whole matrix. The pairs of an expert lie
side by side, in the order of tokens (route.py). Few tokens: each row of the experts that have pairs is read once and
multiplied with the activations of each pair. Many tokens: each expert's pairs begin a panel of activations.
"""

from __future__ import annotations

from typing import Any

from .layout import Item, MatMul, Routing, Step
from .loads import i32_at, i64_at, put_f32
from .matmul import rows_fill, slab
from .products import AHEAD, product
from .tape import finish, take
from .vector import LANES
from .weights import inline


def build(family: str, variant: str) -> Any:
    """out[pair] = matrix of its expert . x: by rows that of its token if `pairs` is given, and else its own."""
    p = product(variant)
    row_dot, quantised, sums_by_16 = p.row_dot, p.group > 0, p.group == 16
    rows, ahead = LANES, AHEAD
    args_of, item_of, routing_of, step_of, item_bytes = MatMul, Item, Routing, Step, 8 * len(Item)
    _, tiles = slab(p, rows_fill(p))

    @inline
    def by_rows(args, n_items, turn):
        w, out, k, n = (
            i64_at(args + args_of.w),
            i64_at(args + args_of.out),
            i64_at(args + args_of.k),
            i64_at(args + args_of.n),
        )
        row_bytes, chunk = i64_at(args + args_of.row_bytes), i64_at(args + args_of.chunk)
        items, pairs = i64_at(args + args_of.items), i64_at(args + args_of.pairs)
        xq, ld = i64_at(args + args_of.xq), i64_at(args + args_of.ld)
        ln, ls, xf = i64_at(args + args_of.ln), i64_at(args + args_of.ls), i64_at(args + args_of.xf)
        per_item = (n + chunk - 1) // chunk
        n_chunks = n_items * per_item
        matrix = n * row_bytes
        while True:
            c = take(args, turn, n_chunks)
            if c < 0:
                break
            item = items + c // per_item * item_bytes
            first = c % per_item * chunk
            expert = i64_at(item + item_of.expert)
            begin = i64_at(item + item_of.first)
            end = begin + i64_at(item + item_of.count)
            # What comes after an expert's last rows is the next expert that has pairs.
            beyond = 0
            if c // per_item + 1 < n_items:
                beyond = ahead + (i64_at(item + item_bytes + item_of.expert) - expert - 1) * matrix
            for r in range(first, min(first + chunk, n)):
                row = w + expert * matrix + r * row_bytes
                later = ahead if (r + 1) * row_bytes + ahead <= matrix else beyond
                for at in range(begin, end):
                    o = at * k
                    if pairs != 0:
                        o = i32_at(pairs + at * 4) * k
                    if quantised:
                        value = row_dot(row, xq + o, ld + o, ln + o, ls + o, k, later)
                    else:
                        value = row_dot(row, xf + 4 * o, 0, 0, 0, k, later)
                    put_f32(out + (at * n + r) * 4, value)
            finish(args)
        return n_chunks

    @inline
    def by_tiles(args, n_items, ith, turn):
        w, out, k, n = (
            i64_at(args + args_of.w),
            i64_at(args + args_of.out),
            i64_at(args + args_of.k),
            i64_at(args + args_of.n),
        )
        panels, items = i64_at(args + args_of.panels), i64_at(args + args_of.items)
        xq, xd, xf = i64_at(args + args_of.xq), i64_at(args + args_of.xd), i64_at(args + args_of.xf)
        xs = i64_at(args + args_of.xn) if sums_by_16 else i64_at(args + args_of.xs)
        sums = k // 16 if sums_by_16 else k // 32  # of a pair
        tile_at = i64_at(args + args_of.scratch) + ith * i64_at(args + args_of.scratch_bytes)
        matrix = n * i64_at(args + args_of.row_bytes)
        per_item = (n + panels * rows - 1) // (panels * rows)
        n_chunks = n_items * per_item
        while True:
            c = take(args, turn, n_chunks)
            if c < 0:
                break
            item = items + c // per_item * item_bytes
            first = c % per_item * panels * rows
            here = min(panels, (n - first + rows - 1) // rows)
            at, count = i64_at(item + item_of.first), i64_at(item + item_of.count)
            tiles(
                args,
                tile_at,
                w + i64_at(item + item_of.expert) * matrix,
                first,
                here,
                xq + at * k,
                xd + at * (k // 32) * 4,
                xs + at * sums * 4,
                xf + at * k * 4,
                out + at * n * 4,
                count,
            )
            finish(args)
        return n_chunks

    def experts(args, step, ith, turn):
        n_items = i64_at(i64_at(args + args_of.routing) + routing_of.experts)
        if i64_at(step + step_of.n_tok) < i64_at(step + step_of.tile_min):
            return by_rows(args, n_items, turn)
        return by_tiles(args, n_items, ith, turn)

    return experts

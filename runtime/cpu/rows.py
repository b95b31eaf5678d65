"""Products of the listed weight rows (gate or up of the active neurons) with the packed activations of few tokens."""

from __future__ import annotations

from typing import Any

from .layout import Choice, Rows, Step
from .listed import ROWS, fetch_first, four_rows
from .loads import f32_at, f64_at, i32_at, i64_at, prefetch, put_f32, store
from .pack import neuron
from .products import product
from .simd import hsum
from .tape import finish, take
from .vector import LANES
from .weights import PLAIN, inline

_args_of = Rows


def build(family: str, variant: str) -> Any:
    """`rows:TYPE`: out[token, i] = row list[i] . x[token], rows fetched in the list's order.

    `rows:TYPE:NAME`: that times the activated gate of the neuron, so the list's h; below the threshold it is 0.
    """
    args_of, step_of, choice_of, lanes = Rows, Step, Choice, LANES
    kind, _, activation = variant.partition(":")
    activated = activation != ""
    neurons = neuron(activation or "relu")
    products = _by_fours(kind) if kind in PLAIN else _one_by_one(kind)

    def rows(args, step, ith, turn):
        n_tok = i64_at(step + step_of.n_tok)
        n = i64_at(i64_at(args + args_of.choice) + choice_of.count)
        out, stride = i64_at(args + args_of.out), i64_at(args + args_of.out_stride)
        gates, threshold = i64_at(args + args_of.gates), f64_at(args + args_of.threshold)
        # Large chunks, as fetching begins anew in each: what is fetched beyond one would serve another thread.
        chunk = n // i64_at(args + args_of.parts) + 1
        n_chunks = (n + chunk - 1) // chunk
        while True:
            first = take(args, turn, n_chunks) * chunk
            if first < 0:
                break
            end = min(first + chunk, n)
            products(args, n_tok, first, end)
            if activated:
                for t in range(n_tok):
                    i = first
                    while i < end:
                        at = (t * stride + i) * 4
                        if i + lanes <= end:
                            store(out + at, neurons(gates + at, out + at, 0, 0, threshold, lanes))
                            i += lanes
                        else:
                            put_f32(out + at, hsum(neurons(gates + at, out + at, 0, 0, threshold, 1)))
                            i += 1
            finish(args)
        return n_chunks

    return rows


@inline
def _put(args, t, i, r, value):
    """Write the product of row r, the list's i-th, with token t: plus its bias."""
    bias = i64_at(args + _args_of.bias)
    if bias != 0:
        value += f32_at(bias + r * 4)
    put_f32(i64_at(args + _args_of.out) + (t * i64_at(args + _args_of.out_stride) + i) * 4, value)


def _by_fours(kind: str) -> Any:
    """(args, tokens, first, end): the products of a part of the list, four rows at a time; past the end, its last."""
    args_of, four, together, tail = Rows, four_rows(PLAIN[kind]), ROWS, ROWS - 1

    @inline
    def products(args, n_tok, first, end):
        w, k, row_bytes = i64_at(args + args_of.w), i64_at(args + args_of.k), i64_at(args + args_of.row_bytes)
        listed, ahead = i64_at(args + args_of.list), i64_at(args + args_of.ahead)
        xq, xd, xs = i64_at(args + args_of.xq), i64_at(args + args_of.xd), i64_at(args + args_of.xs)
        last = end - 1
        fetch_first(w, row_bytes, listed, first, end, ahead)
        for i in range(first, end, together):
            r0, r1 = i32_at(listed + i * 4), i32_at(listed + min(i + 1, last) * 4)
            r2, r3 = i32_at(listed + min(i + 2, last) * 4), i32_at(listed + min(i + 3, last) * 4)
            j = i + ahead
            n0 = w + i32_at(listed + min(j, last) * 4) * row_bytes
            n1 = w + i32_at(listed + min(j + 1, last) * 4) * row_bytes
            n2 = w + i32_at(listed + min(j + 2, last) * 4) * row_bytes
            n3 = w + i32_at(listed + min(j + 3, last) * 4) * row_bytes
            p0, p1, p2, p3 = w + r0 * row_bytes, w + r1 * row_bytes, w + r2 * row_bytes, w + r3 * row_bytes
            for t in range(n_tok):
                q, d, s = xq + t * k, xd + t * (k // 8), xs + t * (k // 8)
                v0, v1, v2, v3 = four(p0, p1, p2, p3, q, d, s, k, n0, n1, n2, n3)
                _put(args, t, i, r0, v0)
                if i + tail < end:
                    _put(args, t, i + 1, r1, v1)
                    _put(args, t, i + 2, r2, v2)
                    _put(args, t, i + 3, r3, v3)
                else:
                    if i + 1 < end:
                        _put(args, t, i + 1, r1, v1)
                    if i + 2 < end:
                        _put(args, t, i + 2, r2, v2)

    return products


def _one_by_one(kind: str) -> Any:
    """The same, row by row."""
    args_of, p = Rows, product(kind)
    row_dot, quantised = p.row_dot, p.group > 0

    @inline
    def products(args, n_tok, first, end):
        w, k, row_bytes = i64_at(args + args_of.w), i64_at(args + args_of.k), i64_at(args + args_of.row_bytes)
        listed, ahead = i64_at(args + args_of.list), i64_at(args + args_of.ahead)
        xq, ld = i64_at(args + args_of.xq), i64_at(args + args_of.ld)
        ln, ls, xf = i64_at(args + args_of.ln), i64_at(args + args_of.ls), i64_at(args + args_of.xf)
        for i in range(first, end):
            r = i32_at(listed + i * 4)
            # What the hardware fetches by itself is the next row in memory, which may not be wanted.
            # Rows still further on, if long, bring their pages' addresses into the processor's tables.
            if row_bytes > 1024:
                far = w + i32_at(listed + min(i + 4 * ahead, end - 1) * 4) * row_bytes
                prefetch(far, 64)
                prefetch(far + row_bytes - 64, 64)
            later = (i32_at(listed + min(i + ahead, end - 1) * 4) - r) * row_bytes
            for t in range(n_tok):
                o = t * k
                if quantised:
                    value = row_dot(w + r * row_bytes, xq + o, ld + o, ln + o, ls + o, k, later)
                else:
                    value = row_dot(w + r * row_bytes, xf + 4 * o, 0, 0, 0, k, later)
                _put(args, t, i, r, value)

    return products

"""Products of the listed weight rows (gate or up of the active neurons) with the packed activations of few tokens."""

from __future__ import annotations

from typing import Any

from .layout import Choice, Rows, Step
from .loads import f32_at, f64_at, i32_at, i64_at, prefetch, put_f32, store
from .pack import neuron
from .products import product
from .simd import hsum
from .tape import finish, take
from .vector import LANES


def build(family: str, variant: str) -> Any:
    """`rows:TYPE`: out[token, i] = row list[i] . x[token], rows fetched in the list's order.

    `rows:TYPE:NAME`: that times the activated gate of the neuron, so the list's h; below the threshold it is 0.
    """
    args_of, step_of, choice_of, lanes = Rows, Step, Choice, LANES
    kind, _, activation = variant.partition(":")
    p = product(kind)
    row_dot, quantised, activated = p.row_dot, p.group > 0, activation != ""
    neurons = neuron(activation or "relu")

    def rows(args, step, ith, turn):
        n_tok = i64_at(step + step_of.n_tok)
        n = i64_at(i64_at(args + args_of.choice) + choice_of.count)
        w, out, k = i64_at(args + args_of.w), i64_at(args + args_of.out), i64_at(args + args_of.k)
        row_bytes, stride = i64_at(args + args_of.row_bytes), i64_at(args + args_of.out_stride)
        listed, ahead = i64_at(args + args_of.list), i64_at(args + args_of.ahead)
        bias = i64_at(args + args_of.bias)
        gates, threshold = i64_at(args + args_of.gates), f64_at(args + args_of.threshold)
        xq, ld = i64_at(args + args_of.xq), i64_at(args + args_of.ld)
        ln, ls, xf = i64_at(args + args_of.ln), i64_at(args + args_of.ls), i64_at(args + args_of.xf)
        # Large chunks, as fetching begins anew in each: what is fetched beyond one would serve another thread.
        chunk = n // i64_at(args + args_of.parts) + 1
        n_chunks = (n + chunk - 1) // chunk
        while True:
            first = take(args, turn, n_chunks) * chunk
            if first < 0:
                break
            end = min(first + chunk, n)
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
                    if bias != 0:
                        value += f32_at(bias + r * 4)
                    put_f32(out + (t * stride + i) * 4, value)
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

"""Products of the listed weight rows (gate or up of the active neurons) with the packed activations of few tokens."""

from __future__ import annotations

from typing import Any

from .layout import Choice, Rows, Step
from .loads import i32_at, i64_at, prefetch, put_f32
from .products import product
from .tape import finish, take


def build(family: str, variant: str) -> Any:
    """The kernel of a weight type: out[token, i] = row list[i] . x[token], rows fetched in the list's order."""
    args_of, step_of, choice_of = Rows, Step, Choice
    p = product(variant)
    row_dot, quantised = p.row_dot, p.group > 0

    def rows(args, step, ith, turn):
        n_tok = i64_at(step + step_of.n_tok)
        n = i64_at(i64_at(args + args_of.choice) + choice_of.count)
        w, out, k = i64_at(args + args_of.w), i64_at(args + args_of.out), i64_at(args + args_of.k)
        row_bytes, stride = i64_at(args + args_of.row_bytes), i64_at(args + args_of.out_stride)
        listed, ahead = i64_at(args + args_of.list), i64_at(args + args_of.ahead)
        xq, xd = i64_at(args + args_of.xq), i64_at(args + args_of.xd)
        xn, xs, xf = i64_at(args + args_of.xn), i64_at(args + args_of.xs), i64_at(args + args_of.xf)
        # Large chunks: what a thread fetches ahead of itself beyond its own chunk is lost.
        chunk = n // i64_at(args + args_of.parts) + 1
        n_chunks = (n + chunk - 1) // chunk
        while True:
            first = take(args, turn, n_chunks) * chunk
            if first < 0:
                break
            for i in range(first, min(first + chunk, n)):
                r = i32_at(listed + i * 4)
                # What the hardware fetches by itself is the next row in memory, which may not be wanted.
                # Rows still further on, if long, bring their pages' addresses into the processor's tables.
                if row_bytes > 1024:
                    far = w + i32_at(listed + min(i + 4 * ahead, n - 1) * 4) * row_bytes
                    prefetch(far, 64)
                    prefetch(far + row_bytes - 64, 64)
                later = (i32_at(listed + min(i + ahead, n - 1) * 4) - r) * row_bytes
                for t in range(n_tok):
                    o = t * k
                    if quantised:
                        value = row_dot(w + r * row_bytes, xq + o, xd + o, xn + o, xs + o, k, later)
                    else:
                        value = row_dot(w + r * row_bytes, xf + 4 * o, 0, 0, 0, k, later)
                    put_f32(out + (t * stride + i) * 4, value)
            finish(args)
        return n_chunks

    return rows

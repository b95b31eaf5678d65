"""RMS norm of the residual stream, packed for the matmuls that follow."""

from __future__ import annotations

import math
from typing import Any

from .layout import Norm
from .loads import f32_at, f64_at, i32_at, i64_at, load_f32, put_f32, store
from .pack import pack_span
from .simd import fma, hsum, splat_f32
from .tape import finish, take
from .vector import LANES


def build(family: str, variant: str) -> Any:
    """y = x / sqrt(mean(x**2) + eps) * weight, for every token, or for the rows that the step's list names."""
    args_of = Norm
    lanes = LANES
    sqrt = math.sqrt

    def norm(args, step, ith, turn):
        n_tok = i64_at(step + i64_at(args + args_of.count))
        src, weight, k = i64_at(args + args_of.src), i64_at(args + args_of.weight), i64_at(args + args_of.k)
        eps = f64_at(args + args_of.eps)
        rows = i64_at(args + args_of.rows)
        y = i64_at(args + args_of.scratch) + ith * i64_at(args + args_of.scratch_bytes)
        xq, xd, xn = i64_at(args + args_of.xq), i64_at(args + args_of.xd), i64_at(args + args_of.xn)
        xs, xf = i64_at(args + args_of.xs), i64_at(args + args_of.xf)
        quantised, floats = i64_at(args + args_of.quantised), i64_at(args + args_of.floats)
        while True:
            t = take(args, turn, n_tok)
            if t < 0:
                break
            r = t
            if rows != 0:
                r = i32_at(i64_at(step + rows) + t * 4)
            x = src + r * k * 4
            a = splat_f32(0.0, lanes)
            i = 0
            while i + lanes <= k:
                v = load_f32(x + i * 4, lanes)
                a = fma(v, v, a)
                i += lanes
            total = hsum(a)
            while i < k:
                total += f32_at(x + i * 4) * f32_at(x + i * 4)
                i += 1
            scale = 1.0 / sqrt(total / k + eps)
            i = 0
            while i + lanes <= k:
                store(y + i * 4, load_f32(x + i * 4, lanes) * splat_f32(scale, lanes) * load_f32(weight + i * 4, lanes))
                i += lanes
            while i < k:
                put_f32(y + i * 4, f32_at(x + i * 4) * scale * f32_at(weight + i * 4))
                i += 1
            pack_span(y, 0, k, k, t, n_tok, xq, xd, xn, xs, xf, quantised, floats)
            finish(args)
        return n_tok

    return norm

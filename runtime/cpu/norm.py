"""Norms of the residual stream, packed for the matmuls that follow, and of queries, keys and sums, as floats."""

from __future__ import annotations

import math
from typing import Any

from .layout import Norm, Step
from .loads import f32_at, f64_at, i32_at, i64_at, load_f32, put_f32, store
from .pack import arrays, neighbours, pack_span
from .simd import fma, hsum, splat_f32
from .tape import finish, take
from .vector import LANES
from .weights import inline


def build(family: str, variant: str) -> Any:
    """y = (x - m) / sqrt(mean((x - m)**2) + eps) * gain * weight + bias; `norm:rms` has m = 0, `norm:layer` the mean.

    For every token, or for the rows that the step's list names; over each group of values of a row. With `out`, floats
    are written or added there; packed they are in any case, where somebody reads that.
    """
    args_of, step_of, lanes, sqrt, layer = Norm, Step, LANES, math.sqrt, variant == "layer"
    packed = arrays(Norm)

    @inline
    def mean_of(x, n):
        a = splat_f32(0.0, lanes)
        i = 0
        while i + lanes <= n:
            a = a + load_f32(x + i * 4, lanes)
            i += lanes
        total = hsum(a)
        while i < n:
            total += f32_at(x + i * 4)
            i += 1
        return total / n

    @inline
    def squares(x, mean, n):
        """The mean square of what differs from the mean."""
        a, m = splat_f32(0.0, lanes), splat_f32(mean, lanes)
        i = 0
        while i + lanes <= n:
            v = load_f32(x + i * 4, lanes)
            if layer:
                v = v - m
            a = fma(v, v, a)
            i += lanes
        total = hsum(a)
        while i < n:
            v = f32_at(x + i * 4) - mean
            total += v * v
            i += 1
        return total / n

    def norm(args, step, ith, turn):
        n_tok = i64_at(step + i64_at(args + args_of.count))
        src, weight, k = i64_at(args + args_of.src), i64_at(args + args_of.weight), i64_at(args + args_of.k)
        bias, n_weight, group = (
            i64_at(args + args_of.bias),
            i64_at(args + args_of.n_weight),
            i64_at(args + args_of.group),
        )
        eps, gain = f64_at(args + args_of.eps), f64_at(args + args_of.gain)
        rows, out, add = i64_at(args + args_of.rows), i64_at(args + args_of.out), i64_at(args + args_of.add)
        y = i64_at(args + args_of.scratch) + ith * i64_at(args + args_of.scratch_bytes)
        to_arrays = packed(args)
        as_rows = n_tok < i64_at(step + step_of.tile_min)
        together = neighbours(n_tok)
        n_chunks = (n_tok + together - 1) // together
        while True:
            start = take(args, turn, n_chunks) * together
            if start < 0:
                break
            for t in range(start, min(start + together, n_tok)):
                r = t
                if rows != 0:
                    r = i32_at(i64_at(step + rows) + t * 4)
                for first in range(0, k, group):
                    x, to = src + (r * k + first) * 4, y + first * 4
                    w = weight + (first % n_weight) * 4
                    b = bias + (first % n_weight) * 4
                    mean = mean_of(x, group) if layer else 0.0
                    scale = gain / sqrt(squares(x, mean, group) + eps)
                    i = 0
                    while i + lanes <= group:
                        v = load_f32(x + i * 4, lanes)
                        if layer:
                            v = v - splat_f32(mean, lanes)
                        v = v * splat_f32(scale, lanes) * load_f32(w + i * 4, lanes)
                        if bias != 0:
                            v = v + load_f32(b + i * 4, lanes)
                        store(to + i * 4, v)
                        i += lanes
                    while i < group:
                        value = (f32_at(x + i * 4) - mean) * scale * f32_at(w + i * 4)
                        if bias != 0:
                            value += f32_at(b + i * 4)
                        put_f32(to + i * 4, value)
                        i += 1
                if out != 0:
                    for i in range(k):
                        at = out + (t * k + i) * 4
                        put_f32(at, f32_at(y + i * 4) + (f32_at(at) if add != 0 else 0.0))
                pack_span(y, 0, k, k, t, n_tok, as_rows, to_arrays)
            finish(args)
        return n_chunks

    return norm

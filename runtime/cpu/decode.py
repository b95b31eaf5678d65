"""Weights of any type as float32, and the largest of them: what quantising reads."""

from __future__ import annotations

from typing import Any

from .embed import dequantiser
from .encode_layout import DECODE_WORST, Decode
from .loads import i32_at, i64_at, load_bf16, load_f16, load_f32, load_i32, put_f32, put_i32, store
from .simd import band, hsum, splat_i32, where_less
from .tape import finish, take
from .vector import LANES
from .weights import FLOAT, inline


def build(family: str, variant: str) -> Any:
    """`decode:TYPE`: rows as float32, each thread's largest |weight| as the bits of a float32 (NaN is the largest)."""
    args_of, lanes, each = Decode, LANES, DECODE_WORST
    dequantise = _floats(variant) if variant in FLOAT else dequantiser(variant)

    def decode(args, step, ith, turn):
        w, out, k = i64_at(args + args_of.w), i64_at(args + args_of.out), i64_at(args + args_of.k)
        rows, row_bytes = i64_at(args + args_of.rows), i64_at(args + args_of.row_bytes)
        worst = i64_at(args + args_of.worst) + ith * each
        chunk = 8192 // k + 1
        n_chunks = (rows + chunk - 1) // chunk
        while True:
            c = take(args, turn, n_chunks)
            if c < 0:
                break
            for r in range(c * chunk, min((c + 1) * chunk, rows)):
                to = out + r * k * 4
                dequantise(w + r * row_bytes, to, k)
                top = splat_i32(0, lanes)
                for i in range(0, k - lanes + 1, lanes):
                    bits = band(load_i32(to + i * 4, lanes), 0x7FFFFFFF)
                    top = where_less(top, bits, bits, top)
                most = i32_at(worst)
                for i in range(k // lanes * lanes, k):
                    most = max(most, i32_at(to + i * 4) & 0x7FFFFFFF)
                store(worst + 64, top)
                for i in range(lanes):
                    most = max(most, i32_at(worst + 64 + i * 4))
                put_i32(worst, most)
            finish(args)
        return n_chunks

    return decode


def _floats(variant: str) -> Any:
    size, lanes = FLOAT[variant], LANES
    load = {"F32": load_f32, "F16": load_f16, "BF16": load_bf16}[variant]

    @inline
    def floats(p, to, k):
        for i in range(0, k - lanes + 1, lanes):
            store(to + i * 4, load(p + i * size, lanes))
        for i in range(k // lanes * lanes, k):
            put_f32(to + i * 4, hsum(load(p + i * size, 1)))

    return floats

"""ffn_down by neurons: a quantised matrix transposed, its blocks (now along the outputs) quantised anew as Q8_0."""

from __future__ import annotations

from typing import Any

from .embed import dequantiser
from .layout import Transpose
from .loads import f32_at, i64_at, load_f32, put_f16, store, store_dwords
from .simd import band, bor, round_to_i32, shl, splat_f32, vabs, vdiv, vmax
from .tape import finish, take
from .vector import LANES


def build(family: str, variant: str) -> Any:
    """The kernel of a weight type: 32 rows of w [n, k] become one block of each of k rows of Q8_0."""
    args_of = Transpose
    dequantise = dequantiser(variant)
    lanes = LANES
    block_bytes = 34

    def transpose(args, step, ith, turn):
        w, out, k, n = (
            i64_at(args + args_of.w),
            i64_at(args + args_of.out),
            i64_at(args + args_of.k),
            i64_at(args + args_of.n),
        )
        row_bytes, out_bytes = i64_at(args + args_of.row_bytes), n // 32 * block_bytes
        floats = i64_at(args + args_of.scratch) + ith * i64_at(args + args_of.scratch_bytes)
        scales = floats + 32 * k * 4
        n_chunks = n // 32
        while True:
            c = take(args, turn, n_chunks)
            if c < 0:
                break
            for i in range(32):
                dequantise(w + (c * 32 + i) * row_bytes, floats + i * k * 4, k)
            for j in range(0, k, lanes):
                source, to = floats + j * 4, out + j * out_bytes + c * block_bytes
                top = splat_f32(0.0, lanes)
                for i in range(32):
                    top = vmax(top, vabs(load_f32(source + i * k * 4, lanes)))
                store(scales, top * splat_f32(1.0 / 127.0, lanes))
                for i in range(lanes):
                    put_f16(to + i * out_bytes, f32_at(scales + i * 4))
                inverse = vdiv(splat_f32(127.0, lanes), vmax(top, splat_f32(1e-30, lanes)))
                for i in range(0, 32, 4):
                    p = source + i * k * 4
                    q0 = band(round_to_i32(load_f32(p, lanes) * inverse), 255)
                    q1 = band(round_to_i32(load_f32(p + k * 4, lanes) * inverse), 255)
                    q2 = band(round_to_i32(load_f32(p + k * 8, lanes) * inverse), 255)
                    q3 = round_to_i32(load_f32(p + k * 12, lanes) * inverse)
                    store_dwords(to + 2 + i, bor(bor(q0, shl(q1, 8)), bor(shl(q2, 16), shl(q3, 24))), out_bytes)
            finish(args)
        return n_chunks

    return transpose

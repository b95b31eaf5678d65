"""Products of many tokens with a matrix that is stored by columns: ffn_down_t, one row a neuron.

Blocks of weights run along the outputs there, so scales differ from neuron to neuron and integer sums over neurons
have no common one. Panels are therefore made anew from dequantised weights, in 8 bits with a scale for 32 neurons.
"""

from __future__ import annotations

from typing import Any

from .embed import dequantiser
from .loads import load_bf16, load_f16, load_f32, put_f32, store
from .matmul import kernel
from .products import product
from .simd import bor, hsum, round_to_i32, shl, splat_f32, splat_i32, vabs, vdiv, vmax
from .vector import LANES, WIDE
from .weights import FLOAT, PLAIN, SUPER, inline


def build(family: str, variant: str) -> Any:
    """The kernel of a weight type; it serves steps of at least TILE_MIN tokens."""
    if variant in FLOAT:
        return kernel(product("F32"), _floats(variant), few=False)
    return kernel(product("Q8_0"), _blocks(variant), few=False)


def _floats(name: str) -> Any:
    """Panels of float32, which columns of a stored row already are."""
    size = FLOAT[name]
    load = {"F32": load_f32, "F16": load_f16, "BF16": load_bf16}[name]
    lanes, wide = LANES, WIDE

    @inline
    def fill(w, row_bytes, first, here, n, quants, scales, minima, spare, k):
        for g in range(here):
            c = first + g * lanes
            for j in range(k):
                p, to = w + j * row_bytes + c * size, quants + (g * k + j) * wide
                if c + lanes <= n:
                    store(to, load(p, lanes))
                else:
                    store(to, splat_f32(0.0, lanes))
                    for i in range(n - c):
                        put_f32(to + i * 4, hsum(load(p + i * size, 1)))

    return fill


def _blocks(name: str) -> Any:
    """Panels of bytes, as those of Q8_0: q + 128, a scale for 32 neurons, and the minimum -128 * scale."""
    block, n_bytes = (32, PLAIN[name].n_bytes) if name in PLAIN else (256, SUPER[name].n_bytes)
    dequantise = dequantiser(name)
    lanes, wide, panels = LANES, WIDE, block // LANES

    @inline
    def fill(w, row_bytes, first, here, n, quants, scales, minima, spare, k):
        for start in range(0, here, panels):
            column = w + (first + start * lanes) // block * n_bytes
            for j in range(0, k, 32):
                for i in range(32):
                    dequantise(column + (j + i) * row_bytes, spare + i * block * 4, block)
                for g in range(panels):
                    source = spare + g * lanes * 4
                    top = splat_f32(1e-30, lanes)
                    for i in range(32):
                        top = vmax(top, vabs(load_f32(source + i * block * 4, lanes)))
                    inverse = vdiv(splat_f32(127.0, lanes), top)
                    at = (start + g) * (k // 32) + j // 32
                    store(scales + at * wide, top * splat_f32(1.0 / 127.0, lanes))
                    store(minima + at * wide, top * splat_f32(-128.0 / 127.0, lanes))
                    for i in range(0, 32, 4):
                        p = source + i * block * 4
                        q0 = round_to_i32(load_f32(p, lanes) * inverse) + splat_i32(128, lanes)
                        q1 = round_to_i32(load_f32(p + block * 4, lanes) * inverse) + splat_i32(128, lanes)
                        q2 = round_to_i32(load_f32(p + block * 8, lanes) * inverse) + splat_i32(128, lanes)
                        q3 = round_to_i32(load_f32(p + block * 12, lanes) * inverse) + splat_i32(128, lanes)
                        v = bor(bor(q0, shl(q1, 8)), bor(shl(q2, 16), shl(q3, 24)))
                        store(quants + ((start + g) * k + j + i) // 4 * wide, v)

    return fill

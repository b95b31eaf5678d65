"""Embedding rows of every weight type, against gguf.quants."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from kernel_harness import FLOATS, LEVELS, PLAIN, TYPES, Array, Buffer, Op, dequantize, magnitude, run, weights

from hotcold.runtime.cpu.layout import Embed

MINIMA = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")


def embed(level: str, kind: str, raw: Array, ids: list[int], k: int, n_threads: int = 1) -> Array:
    out = Buffer.full((len(ids), k))
    op = Op(f"embed:{kind}", Embed, {"w": Buffer(raw), "out": out, "k": k, "row_bytes": raw.shape[1]})
    run(level, op, n_threads=n_threads, n_tok=len(ids), ids=Buffer(np.array(ids, np.int32)))
    return np.array(out.array)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_rows(level: str, kind: str) -> None:
    """Exact, but for types with minima: there the sum of two terms is rounded once instead of twice."""
    rng = np.random.default_rng(1)
    for k in (1, 7, 33, 100) if kind in FLOATS else (32, 96, 288) if kind in PLAIN else (256, 768):
        raw = weights(kind, 37, k, rng)
        ids = [36, 0, 5, 5, 17]
        for n_threads in (1, 3):
            got = embed(level, kind, raw, ids, k, n_threads)
            if kind in MINIMA:
                assert (np.abs(got - dequantize(kind, raw)[ids]) <= 2e-7 * magnitude(kind, raw)[ids]).all()
            else:
                np.testing.assert_array_equal(got, dequantize(kind, raw)[ids])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_every_finite_half(level: str, kind: str) -> None:
    """All bit patterns but infinities and NaNs: signs, subnormals, zeros."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    exponent = 0x7C00 if kind == "F16" else 0x7F80
    bits = np.resize(bits[bits & exponent != exponent], (64, 1024))
    got = embed(level, kind, bits.view(np.uint8), list(range(64)), 1024)
    wanted = naive.dequantize(bits.view(np.uint8), GGMLQuantizationType[kind])
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("level", LEVELS)
def test_every_finite_scale(level: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = np.resize(bits[bits & 0x7C00 != 0x7C00], (64, 32, 32))[:, :, 0]
    blocks = weights("Q8_0", 64, 1024, np.random.default_rng(2)).reshape(64, 32, 34)
    blocks[:, :, :2] = np.ascontiguousarray(bits)[:, :, None].view(np.uint8)
    raw = blocks.reshape(64, -1)
    got = embed(level, "Q8_0", raw, list(range(64)), 1024)
    np.testing.assert_array_equal(got, dequantize("Q8_0", raw))

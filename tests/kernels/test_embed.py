"""Embedding rows of every weight type, against gguf.quants."""

from __future__ import annotations

from typing import Any

import naive
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from kernel_harness import FLOATS, LEVELS, PLAIN, TYPES, Array, Buffer, Op, dequantize, magnitude, run, weights

from hotcold.runtime.cpu.layout import Embed, Step

MINIMA = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")


def embed(
    level: str, kind: str, raw: Array, ids: list[int], k: int, n_threads: int = 1, gain: float = 1.0, to: Any = None
) -> Array:
    """float32 (len(ids), k). to: what the rows are added to; they are those of positions then."""
    out = Buffer.full((len(ids), k)) if to is None else Buffer(to)
    fields = {"w": Buffer(raw), "out": out, "k": k, "row_bytes": raw.shape[1], "gain": gain}
    fields |= {"at": Step.ids if to is None else Step.positions, "add": int(to is not None)}
    rows, others = Buffer(np.array(ids, np.int32)), Buffer(np.zeros(len(ids), np.int32))
    step = {"ids": rows, "positions": others} if to is None else {"ids": others, "positions": rows}
    run(level, Op(f"embed:{kind}", Embed, fields), n_threads=n_threads, n_tok=len(ids), **step)
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


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_gains_and_positions(level: str, kind: str) -> None:
    rng = np.random.default_rng(4)
    k = 33 if kind in FLOATS else 32 if kind in PLAIN else 256
    raw, ids = weights(kind, 9, k, rng), [8, 0, 3, 3]
    rows, x = embed(level, kind, raw, ids, k), rng.standard_normal((4, k), np.float32)
    np.testing.assert_allclose(embed(level, kind, raw, ids, k, 2, gain=12.0), rows * np.float32(12), rtol=2e-7)
    added = embed(level, kind, raw, ids, k, 2, gain=0.5, to=x)
    np.testing.assert_allclose(added, x + rows * np.float32(0.5), rtol=3e-7, atol=1e-7 * np.abs(rows).max())


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

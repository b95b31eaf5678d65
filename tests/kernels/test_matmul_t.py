"""Products of many tokens with a matrix that is stored by columns, against float64.

Blocks are quantised anew to 8 bits, with a scale for 32 neurons of a column: the largest |weight| / 127, the step.
Each weight may be off by half a step, and by a thousandth of one for the rounding of weight / step (up to 127, in
float32) and of the weight's own decoding. Activations are exact here. What is added up is step * (q + 128) and
-128 * step, so terms are as large as 256 steps and the weight itself; a sum of k of them is off by TOLERANCE of their
sum as in test_matmul.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kernel_harness import (
    FLOATS,
    LEVELS,
    PLAIN,
    QUANTS,
    TOLERANCE,
    TYPES,
    Array,
    Buffer,
    Op,
    dequantize,
    inputs,
    magnitude,
    pack_op,
    packed,
    run,
    weights,
    widths,
    with_quants,
)

from hotcold.formats.types import GGMLType
from hotcold.runtime.cpu.buffers import Buffers, t_panels
from hotcold.runtime.cpu.layout import ARRAYS, MatMul, Step
from hotcold.runtime.graph import Graph, Node
from hotcold.runtime.tensors import Tensors

TOKENS = (8, 9, 17, 33)


def multiply_t(level: str, kind: str, raw: Array, x: Array, n: int, n_threads: int = 1, **options: Any) -> Array:
    """x times the rows, float32 (n_tok, n); raw: k rows of n. Options: add (what is there), scratch, scratch_bytes."""
    n_tok, k = x.shape
    fields = packed(k, n_tok, kind in QUANTS, kind in FLOATS)
    stride = n + 3
    out = Buffer.full((n_tok, stride))
    own: dict[str, Any] = {"add": int("add" in options), "panels": t_panels(kind), "chunk": 0, "bias": 0}
    if "add" in options:
        out.array[:, :n] = options.pop("add")
    own |= {"w": Buffer(raw), "out": out, "k": k, "n": n, "row_bytes": raw.shape[1], "out_stride": stride, **options}
    own |= {"count": Step.n_tok, **{name: buffer for name, buffer in fields.items() if name in ARRAYS}}
    run(level, pack_op(Buffer(x), fields), Op(f"matmul_t:{kind}", MatMul, own), n_threads=n_threads, n_tok=n_tok)
    assert np.isnan(out.array[:, n:]).all()
    return np.array(out.array[:, :n])


def steps(kind: str, raw: Array) -> Array:
    """The step of each weight's 8 bits, float64 (k, n)."""
    w = np.abs(dequantize(kind, raw))
    return np.repeat(w.reshape(-1, 32, w.shape[1]).max(axis=1) / 127, 32, axis=0)


def assert_product_t(kind: str, raw: Array, x: Array, got: Array, plus: Any = 0.0) -> None:
    size = np.abs(x.astype(np.float64))
    off = got - (x.astype(np.float64) @ dequantize(kind, raw) + plus)
    assert np.isfinite(got).all()
    if kind in FLOATS:
        assert (np.abs(off) <= TOLERANCE * (size @ magnitude(kind, raw) + np.abs(plus))).all()
        return
    step = steps(kind, raw)
    terms = size @ (256 * step + magnitude(kind, raw)) + np.abs(plus)
    assert (np.abs(off) <= 0.501 * (size @ step) + TOLERANCE * terms + 1e-28).all()


def heights(kind: str) -> tuple[int, ...]:
    """Numbers of neurons, k."""
    return (1, 5, 33, 100) if kind in FLOATS else (32, 96, 160)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_product(level: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    for n in widths(kind):
        for i, k in enumerate(heights(kind)):
            raw = weights(kind, k, n, rng)
            for n_tok in TOKENS[i % 2 :: 2]:
                x = inputs(kind, n_tok, k, rng)
                assert_product_t(kind, raw, x, multiply_t(level, kind, raw, x, n))


@pytest.mark.parametrize("kind", QUANTS)
@pytest.mark.parametrize("level", LEVELS)
def test_rounding_has_no_bias(level: str, kind: str) -> None:
    """Rounding to a step gives errors of step / sqrt(12) each, whose sum over neurons grows as a random walk.

    Q8_0 and others whose quants are whole steps by chance are off by less.
    """
    rng = np.random.default_rng(2)
    k, n = 320, widths(kind)[-1]
    raw, x = weights(kind, k, n, rng), inputs(kind, 33, k, rng)
    off = multiply_t(level, kind, raw, x, n) - x.astype(np.float64) @ dequantize(kind, raw)
    wanted = np.sqrt((x.astype(np.float64) ** 2 @ steps(kind, raw) ** 2) / 12)
    assert np.sqrt(((off / wanted) ** 2).mean()) < 1.1


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_add(level: str, kind: str) -> None:
    rng = np.random.default_rng(3)
    k, n = heights(kind)[-1], widths(kind)[-1]
    raw = weights(kind, k, n, rng)
    for n_tok in (8, 13):
        x, there = inputs(kind, n_tok, k, rng), rng.standard_normal((n_tok, n), np.float32)
        got = multiply_t(level, kind, raw, x, n, add=there)
        assert_product_t(kind, raw, x, got, there)
        np.testing.assert_array_equal(got, multiply_t(level, kind, raw, x, n) + there)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_threads_change_nothing(level: str, kind: str) -> None:
    rng = np.random.default_rng(4)
    k, n = heights(kind)[-1], widths(kind)[-1] * (3 if kind in QUANTS else 1)
    raw, x = weights(kind, k, n, rng), inputs(kind, 20, k, rng)
    alone = multiply_t(level, kind, raw, x, n)
    for n_threads in (2, 5):
        np.testing.assert_array_equal(multiply_t(level, kind, raw, x, n, n_threads), alone)


@pytest.mark.parametrize("kind", QUANTS)
@pytest.mark.parametrize("level", LEVELS)
def test_extreme_quants(level: str, kind: str) -> None:
    """All weights of a block at the end of its range, positive and negative, and activations at theirs."""
    rng = np.random.default_rng(5)
    k, n = 96, widths(kind)[-1]
    raw = weights(kind, k, n, rng)
    for byte in (0x00, 0xFF, 0x80, 0x7F):
        extreme = with_quants(kind, raw, byte)
        for sign in (1, -1):
            x = np.full((9, k), sign * 127.0, np.float32)
            assert_product_t(kind, extreme, x, multiply_t(level, kind, extreme, x, n))


@pytest.mark.parametrize("level", LEVELS)
def test_neurons_of_nothing(level: str) -> None:
    """Columns whose 32 weights are all zero, or too small for float32's range of 1 / step."""
    x = inputs("Q8_0", 9, 64, np.random.default_rng(6))
    blocks = np.zeros((64, 2, 34), np.uint8)
    assert (np.abs(multiply_t(level, "Q8_0", blocks.reshape(64, -1), x, 64)) < 1e-30).all()
    blocks[:, :, :2] = np.frombuffer(np.float16(6e-8).tobytes(), np.uint8)
    blocks[32:, :, 2:] = np.random.default_rng(7).integers(0, 256, (32, 2, 32))
    raw = blocks.reshape(64, -1)
    assert_product_t("Q8_0", raw, x, multiply_t(level, "Q8_0", raw, x, 64))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_the_engines_scratch_is_enough(level: str, kind: str) -> None:
    """Panels of all neurons, for as many columns as the widest vectors take at a time."""
    rng = np.random.default_rng(8)
    k, n = (3040, 100) if kind in FLOATS else (3040, 96) if kind in PLAIN else (1088, 512)
    raw, x = weights(kind, k, n, rng), inputs(kind, 8, k, rng)
    tensors = Tensors()
    tensors.add("t", (n, k), GGMLType[kind], raw.reshape(-1))
    graph = Graph([Node("matmul_t", ("h", "x"), ("x",), "t")], {"h": k, "x": n})
    heads: Any = SimpleNamespace(head_dim_k=64, head_dim_v=64, n_expert=0, n_expert_used=0)
    need = Buffers(graph, tensors, heads, 1, {"tokens": 8, "outputs": 1}).scratch_bytes
    scratch = Buffer.full(need, np.uint8, 0xFF)
    got = multiply_t(level, kind, raw, x, n, scratch=scratch, scratch_bytes=need)  # which checks the bytes behind it
    assert_product_t(kind, raw, x, got)

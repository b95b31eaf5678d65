"""RMS and layer norms: of all tokens or of those that a list names, of rows or groups, packed or as floats."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from kernel_harness import LEVELS, Array, Buffer, Op, packed, panel_tokens, run

from hotcold.runtime.cpu.layout import Norm, Step


def norm(
    level: str, x: Array, weight: Array, eps: float = 1e-5, rows: Array | None = None, n_threads: int = 1
) -> Array:
    """float32 (rows, k) as packed for float weights."""
    k = x.shape[1]
    n = len(x) if rows is None else len(rows)
    fields = packed(k, n, False, True)
    fields |= {"src": Buffer(x), "weight": Buffer(weight), "k": k, "group": k, "n_weight": k, "eps": eps, "gain": 1.0}
    fields |= {"count": Step.n_tok if rows is None else Step.n_out, "rows": 0 if rows is None else Step.out_rows}
    step = {} if rows is None else {"out_rows": Buffer(rows.astype(np.int32))}
    run(level, Op("norm:rms", Norm, fields), n_threads=n_threads, n_tok=len(x), n_out=n, **step)
    flat = fields["xf"].array.view(np.float32)
    if n < 8:
        return np.array(flat[: n * k].reshape(n, k))
    tokens = panel_tokens(level)
    panels = flat[: -(-n // tokens) * tokens * k].reshape(-1, k, tokens)
    return np.array(panels.transpose(0, 2, 1).reshape(-1, k)[:n])


def oracle(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    return naive.rmsnorm(x.astype(np.float64), weight.astype(np.float64), eps)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_tok", [1, 7, 8, 33])
def test_all_tokens(level: str, n_tok: int) -> None:
    rng = np.random.default_rng(n_tok)
    for k in (1, 7, 33, 100, 576):
        x, weight = rng.standard_normal((n_tok, k), np.float32), rng.standard_normal(k, np.float32)
        wanted = oracle(x, weight)
        for n_threads in (1, 3):
            np.testing.assert_allclose(norm(level, x, weight, n_threads=n_threads), wanted, rtol=2e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [[4], [0, 11, 3], list(range(11, -1, -1))])
def test_named_rows(level: str, rows: list[int]) -> None:
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((12, 96), np.float32), rng.standard_normal(96, np.float32)
    got = norm(level, x, weight, rows=np.array(rows))
    np.testing.assert_array_equal(got, norm(level, x, weight)[rows])
    np.testing.assert_allclose(got, oracle(x, weight)[rows], rtol=2e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_eps_and_magnitudes(level: str) -> None:
    rng = np.random.default_rng(2)
    weight = np.ones(64, np.float32)
    for scale in (0.0, 1e-12, 1e-3, 1e6, 1e15):
        x = (rng.standard_normal((2, 64)) * scale).astype(np.float32)
        for eps in (1e-12, 1e-5, 1.0):
            np.testing.assert_allclose(norm(level, x, weight, eps), oracle(x, weight, eps), rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("level", LEVELS)
def test_quants_are_those_of_the_result(level: str) -> None:
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((3, 96), np.float32), rng.standard_normal(96, np.float32)
    fields = packed(96, 3, True, False)
    fields |= {"src": Buffer(x), "weight": Buffer(weight), "k": 96, "group": 96, "n_weight": 96, "eps": 1e-5}
    fields |= {"gain": 1.0, "count": Step.n_tok}
    run(level, Op("norm:rms", Norm, fields), n_threads=2, n_tok=3)
    quants, scales = naive.quantise_q8(norm(level, x, weight))
    assert np.abs(fields["xq"].array.view(np.int8)[:288].reshape(3, 96).astype(int) - quants).max() <= 1
    np.testing.assert_allclose(fields["xd"].array.view(np.float32)[:9].reshape(3, 3), scales, rtol=2e-7)


def as_floats(
    level: str, kind: str, x: Array, weight: Array, bias: Array | None, group: int, gain: float, to: Array | None
) -> Array:
    """float32 like x: normed in place, or added to `to`. weight, bias: for all groups of a row, or one for each."""
    source = Buffer(x)
    out = source if to is None else Buffer(to)
    fields = {"src": source, "weight": Buffer(weight), "bias": 0 if bias is None else Buffer(bias), "out": out}
    fields |= {"k": x.shape[1], "group": group, "n_weight": len(weight), "eps": 1e-5, "gain": gain}
    fields |= {"count": Step.n_tok, "add": int(to is not None)}
    run(level, Op(f"norm:{kind}", Norm, fields), n_threads=2, n_tok=len(x))
    return np.array(out.array)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_groups_biases_gains_and_sums(level: str, kind: str) -> None:
    rng = np.random.default_rng(4)
    for n_groups, group in ((1, 100), (3, 32), (4, 7), (2, 1)):
        x = rng.standard_normal((5, n_groups * group), np.float32) + np.float32(0.7)
        wide = x.astype(np.float64).reshape(5, n_groups, group)
        if kind == "layer":
            wide = wide - wide.mean(axis=-1, keepdims=True)
        unit = (wide / np.sqrt(np.square(wide).mean(axis=-1, keepdims=True) + 1e-5)).reshape(5, -1)
        for n_weight in {group, n_groups * group}:
            weight, bias = rng.standard_normal((2, n_weight), np.float32)
            many = x.shape[1] // n_weight
            for b, gain, to in ((None, 1.0, None), (bias, 1.0, None), (bias, 0.25, None), (bias, 3.0, x * 2)):
                wanted = unit * np.tile(weight, many) * gain + (0 if b is None else np.tile(b, many))
                wanted = wanted + (0 if to is None else to)
                got = as_floats(level, kind, x, weight, b, group, gain, to)
                np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-6)

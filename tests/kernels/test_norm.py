"""RMS norm: of all tokens or of those that a list names, with its packed output."""

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
    fields |= {"src": Buffer(x), "weight": Buffer(weight), "k": k, "eps": eps}
    fields |= {"count": Step.n_tok if rows is None else Step.n_out, "rows": 0 if rows is None else Step.out_rows}
    step = {} if rows is None else {"out_rows": Buffer(rows.astype(np.int32))}
    run(level, Op("norm", Norm, fields), n_threads=n_threads, n_tok=len(x), n_out=n, **step)
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
    fields |= {"src": Buffer(x), "weight": Buffer(weight), "k": 96, "eps": 1e-5, "count": Step.n_tok}
    run(level, Op("norm", Norm, fields), n_threads=2, n_tok=3)
    quants, scales = naive.quantise_q8(norm(level, x, weight))
    assert np.abs(fields["xq"].array.view(np.int8)[:288].reshape(3, 96).astype(int) - quants).max() <= 1
    np.testing.assert_allclose(fields["xd"].array.view(np.float32)[:72:8].reshape(3, 3), scales, rtol=2e-7)

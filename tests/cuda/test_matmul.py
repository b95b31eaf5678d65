"""Products of packed weights against float64, for every type, one token and tiles, whole and ragged shapes.

Rounding: a sum of k products takes k / 8 + 10 float32 additions or fewer in a row, and a weight with a minimum is
off by an ulp of its largest term, so that LIMIT ulps of the largest weight times the sum of |x| are never reached.
"""

from __future__ import annotations

import naive
import numpy as np
import pytest
from cuda_launch import LANES, filled, launch
from naive import QType

from hotcold.runtime.cuda.matmul import ADD, BIAS, RELU, SET
from hotcold.runtime.cuda.matmul import launch as matmul_launch
from hotcold.runtime.cuda.repack import KINDS, pack

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy on infinities, in the simulator
Array = np.ndarray
LIMIT = 64 * 2.0**-24
COMMON = ("F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K")  # types that more than one shape is tried for


def width(kind: str) -> int:
    return 256 if kind.endswith("_K") else 96


def matmul(
    kind: str, raw: Array, x: Array, lanes: int, mode: int = SET, bias: Array | None = None, out: Array | None = None
) -> Array:
    """Products [n_tok, n] of raw rows; out is given for ADD. Checks that nothing beyond n_tok rows is written."""
    n, (n_tok, k) = len(raw), x.shape
    result, wide = filled((n_tok + 2, n)), filled((n_tok + 1, k))
    wide[:n_tok] = x
    if out is not None:
        result[:n_tok] = out
    name, grid = matmul_launch(kind, n, n_tok)
    bias = np.full(1, np.nan, np.float32) if bias is None else bias
    arrays = launch(name, lanes, grid, *pack(kind, raw, k), wide, result, bias, n, k, n_tok, mode)
    got = arrays[-2]
    assert np.isnan(got[n_tok:]).all()
    return got[:n_tok]


def assert_products(kind: str, raw: Array, x: Array, got: Array) -> None:
    weights = naive.dequantize(raw, QType[kind]).astype(np.float64)
    bound = LIMIT * np.abs(weights).max() * np.abs(x).sum(axis=1, dtype=np.float64) + 1e-30
    assert np.all(np.abs(got - x.astype(np.float64) @ weights.T) <= bound[:, None])


@pytest.mark.parametrize("n_tok", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_type(kind: str, n_tok: int) -> None:
    rng = np.random.default_rng(1)
    raw = naive.random_blocks(QType[kind], 5, width(kind), rng)
    x = rng.standard_normal((n_tok, width(kind)), np.float32)
    assert_products(kind, raw, x, matmul(kind, raw, x, LANES[0]))


@pytest.mark.parametrize("lanes", LANES[1:])
@pytest.mark.parametrize("kind", COMMON)
def test_several_lanes(kind: str, lanes: int) -> None:
    rng = np.random.default_rng(2)
    k = 2 * width(kind) + (0 if kind.endswith("_K") else 32)
    raw = naive.random_blocks(QType[kind], 3, k, rng)
    for n_tok in (1, 2):
        x = rng.standard_normal((n_tok, k), np.float32)
        assert_products(kind, raw, x, matmul(kind, raw, x, lanes))


@pytest.mark.parametrize(("n", "n_tok"), [(1, 1), (1, 2), (18, 1), (18, 9), (4, 8)])
def test_rows_and_tokens_beyond_a_block(n: int, n_tok: int) -> None:
    rng = np.random.default_rng(3)
    raw = naive.random_blocks(QType.Q4_0, n, 32, rng)
    x = rng.standard_normal((n_tok, 32), np.float32)
    assert_products("Q4_0", raw, x, matmul("Q4_0", raw, x, LANES[0]))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("k", [13, 20])
def test_floats_of_ragged_width(kind: str, k: int) -> None:
    rng = np.random.default_rng(4)
    raw = naive.random_blocks(QType[kind], 3, k, rng)
    for n_tok in (1, 2):
        x = rng.standard_normal((n_tok, k), np.float32)
        assert_products(kind, raw, x, matmul(kind, raw, x, LANES[0]))


@pytest.mark.parametrize("n_tok", [1, 2])
@pytest.mark.parametrize("n", [1, 6])
def test_modes(n: int, n_tok: int) -> None:
    rng = np.random.default_rng(5)
    raw = naive.random_blocks(QType.Q8_0, n, 64, rng)
    x = rng.standard_normal((n_tok, 64), np.float32)
    bias, before = rng.standard_normal(n).astype(np.float32), rng.standard_normal((n_tok, n)).astype(np.float32)
    want = naive.matvec(raw, QType.Q8_0, x)

    def check(got: Array, wanted: Array) -> None:
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)

    check(matmul("Q8_0", raw, x, LANES[0], SET | BIAS, bias), want + bias)
    check(matmul("Q8_0", raw, x, LANES[0], ADD, None, before), want + before)
    check(matmul("Q8_0", raw, x, LANES[0], ADD | BIAS, bias, before), want + before + bias)
    check(matmul("Q8_0", raw, x, LANES[0], RELU), np.maximum(want, 0))
    check(matmul("Q8_0", raw, x, LANES[0], RELU | BIAS, bias), np.maximum(want + bias, 0))


def test_relu_keeps_nan() -> None:
    raw = naive.random_blocks(QType.Q8_0, 2, 32, np.random.default_rng(6))
    assert np.isnan(matmul("Q8_0", raw, np.full((1, 32), np.nan, np.float32), LANES[0], RELU)).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("F32", "F16", "BF16")])
def test_unusual_scales(kind: str) -> None:
    """Zero of either sign and a subnormal are numbers like others; an infinite scale spoils its own row only."""
    rng = np.random.default_rng(7)
    raw = naive.random_blocks(QType[kind], 6, width(kind), rng)
    scale_at = naive._BLOCKS[QType[kind]][0]
    for row, scale in enumerate((0.0, -0.0, 2.0**-24, -(2.0**-15), np.inf)):
        raw[row, scale_at : scale_at + 2] = np.array([scale], np.float16).view(np.uint8)
    x = rng.standard_normal((1, width(kind)), np.float32)
    got = matmul(kind, raw, x, LANES[0])
    finite = [0, 1, 2, 3, 5]
    assert_products(kind, raw[finite], x, got[:, finite])
    assert not np.isfinite(got[0, 4])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_unusual_floats(kind: str) -> None:
    """One weight a row, times 1: zeros, a float16's subnormal, infinity and NaN come through as they are."""
    values = np.array([0.0, -0.0, 2.0**-24, -1.5 * 2.0**-20, np.inf, -np.inf, np.nan, 65504.0], np.float32)
    weights = np.zeros((8, 8), np.float32)
    weights[:, 3] = values if kind != "BF16" else np.where(values == 65504, 65280, values)
    if kind == "BF16":
        raw = (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:
        raw = weights.astype(np.float16 if kind == "F16" else np.float32).view(np.uint8)
    got = matmul(kind, raw, np.ones((1, 8), np.float32), LANES[0])
    np.testing.assert_array_equal(got[0], weights[:, 3])


def test_launch_chooses_by_tokens() -> None:
    assert matmul_launch("Q4_0", 4096, 1) == ("matmul:Q4_0", (1024, 1))
    assert matmul_launch("Q4_0", 4097, 2) == ("matmul_tile:Q4_0", (257, 1))
    assert matmul_launch("Q6_K", 1, 512) == ("matmul_tile:Q6_K", (1, 64))

"""Norms on the GPU: means summed in float32 in some order, so a few ulp of the result."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from cuda_launch import LANES, filled, launch

from hotcold.runtime.cuda import jit
from hotcold.runtime.cuda.norm import ADD, BIAS

Array = np.ndarray
RTOL, ATOL = 2e-6, 1e-6
NONE = np.zeros(1, np.float32)


def normed(
    function: str,
    lanes: int,
    x: Array,
    rows: Array,
    weight: Array,
    out: Array,
    bias: Array | None = None,
    eps: float = 1e-5,
    gain: float = 1.0,
    group: int = 0,
    add: bool = False,
    n: int = 0,
) -> Array:
    group = group or x.shape[1]
    grid = n or len(x), x.shape[1] // group
    mode = (ADD if add else 0) | (BIAS if bias is not None else 0)
    numbers = np.float32(eps), np.float32(gain), group, mode
    given = rows.astype(np.int32), weight, NONE if bias is None else bias
    return launch(f"norm:{function}", lanes, grid, x, *given, out, *numbers)[-1]


def expected(function: str, x: Array, weight: Array, bias: Array | float = 0.0, eps: float = 1e-5) -> Array:
    """In float64, over the last axis."""
    x = x.astype(np.float64)
    if function == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    return naive.rmsnorm(x, weight, eps) + bias


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("k", [1, 2, 7, 64, 333])
@pytest.mark.parametrize("function", ["rms", "layer"])
def test_norm(function: str, lanes: int, k: int) -> None:
    """Of the listed rows, in any order and more than once; rows of out behind them stay as they are."""
    rng = np.random.default_rng(k)
    x, weight = rng.standard_normal((5, k), np.float32) * 3 + 1, rng.standard_normal(k, np.float32)
    rows = np.array([4, 0, 0, 2, 1 << 30], np.int32)
    out = normed(function, lanes, x, rows, weight, filled((6, k)), n=4)
    np.testing.assert_allclose(out[:4], expected(function, x[rows[:4]], weight), rtol=RTOL, atol=ATOL)
    assert np.isnan(out[4:]).all()


@pytest.mark.parametrize("function", ["rms", "layer"])
@pytest.mark.parametrize("own", [False, True])
def test_heads_in_place(function: str, own: bool) -> None:
    """Each head alone, with the weights of all heads or its own; with a bias and a gain."""
    from numba import cuda

    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 4, 10), np.float32)
    weight, bias = (rng.standard_normal((4, 10) if own else (1, 10), np.float32) for _ in range(2))
    there = cuda.to_device(x.reshape(3, 40))
    numbers = np.float32(1e-5), np.float32(1.5), 10, BIAS
    vectors = (cuda.to_device(v.reshape(-1)) for v in (np.arange(3, dtype=np.int32), weight, bias))
    jit.load(f"norm:{function}", LANES[-1])((3, 4), 0, there, *vectors, there, *numbers)
    wanted = 1.5 * expected(function, x, weight) + bias
    np.testing.assert_allclose(there.copy_to_host().reshape(x.shape), wanted, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("bias", [False, True])
def test_added_to_what_is_there(bias: bool) -> None:
    rng = np.random.default_rng(2)
    x, base = (rng.standard_normal((3, 12), np.float32) for _ in range(2))
    weight, more = (rng.standard_normal(12, np.float32) for _ in range(2))
    out = normed("rms", LANES[0], x, np.arange(3), weight, base, more if bias else None, add=True, n=2)
    wanted = base[:2] + expected("rms", x[:2], weight, more if bias else 0.0)
    np.testing.assert_allclose(out[:2], wanted, rtol=RTOL, atol=ATOL)
    np.testing.assert_array_equal(out[2], base[2])


def test_tiny_and_huge_rows() -> None:
    """A row of zeros stays zeros; eps decides about tiny ones."""
    x = np.array([[0.0] * 6, [1e-6] * 6, [1e12, -1e12] * 3], np.float32)
    weight = np.full(6, 2, np.float32)
    out = normed("rms", LANES[-1], x, np.arange(3), weight, filled((3, 6)), eps=1e-6)
    np.testing.assert_allclose(out, naive.rmsnorm(x.astype(np.float64), 2.0, 1e-6), rtol=RTOL, atol=0)


def test_a_large_mean_is_taken_off_first() -> None:
    """The squares of what differs from it, not of the values: those of 1000 and more would swallow it."""
    x = (np.random.default_rng(3).standard_normal((2, 64)) + 4096).astype(np.float32)
    out = normed("layer", LANES[0], x, np.arange(2), np.ones(64, np.float32), filled((2, 64)))
    np.testing.assert_allclose(out, expected("layer", x, np.ones(64)), atol=2e-3)


def test_a_copy() -> None:
    x = np.random.default_rng(4).standard_normal((3, 13), np.float32)
    out = launch("pack", LANES[-1], 2, x, filled((3, 13)))[1]
    np.testing.assert_array_equal(out[:2], x[:2])
    assert np.isnan(out[2]).all()

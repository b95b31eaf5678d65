"""RMS norm on the GPU: a mean of squares summed in float32 in some order, so a few ulp of the result."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from cuda_launch import LANES, filled, launch

RTOL = 2e-6


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("k", [1, 2, 7, 64, 333])
def test_norm(lanes: int, k: int) -> None:
    """Of the listed rows, in any order and more than once; rows of out behind them stay as they are."""
    rng = np.random.default_rng(k)
    x, weight = rng.standard_normal((5, k), np.float32) * 3, rng.standard_normal(k, np.float32)
    rows = np.array([4, 0, 0, 2, 1 << 30], np.int32)
    *_, out = launch("norm", lanes, 4, x, rows, weight, filled((6, k)), np.float32(1e-5))
    wanted = naive.rmsnorm(x[rows[:4]].astype(np.float64), weight, 1e-5)
    np.testing.assert_allclose(out[:4], wanted, rtol=RTOL, atol=1e-12)
    assert np.isnan(out[4:]).all()


def test_tiny_and_huge_rows() -> None:
    """A row of zeros stays zeros; eps decides about tiny ones."""
    x = np.array([[0.0] * 6, [1e-6] * 6, [1e12, -1e12] * 3], np.float32)
    weight = np.full(6, 2, np.float32)
    *_, out = launch("norm", LANES[-1], 3, x, np.arange(3, dtype=np.int32), weight, filled((3, 6)), np.float32(1e-6))
    np.testing.assert_allclose(out, naive.rmsnorm(x.astype(np.float64), 2.0, 1e-6), rtol=RTOL, atol=0)

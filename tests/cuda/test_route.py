"""The choice of experts on the GPU against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_launch import LANES, filled, launch

Array = np.ndarray


def expected(logits: Array, n_used: int, normed: bool) -> Array:
    """Every expert's weight, float64 [n_tok, n_expert]: softmax of all, then the first n_used of a stable sort."""
    shares = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    out = np.zeros_like(shares)
    for row, (values, given) in zip(out, zip(logits, shares, strict=True), strict=True):
        best = np.argsort(-values, kind="stable")[:n_used]
        row[best] = given[best] / (given[best].sum() if normed else 1.0)
    return out


def route(logits: Array, experts: Array, n_used: int, normed: bool, lanes: int) -> Array:
    out = filled((len(logits) + 1, len(experts)))
    got = launch("route", lanes, len(logits), logits, experts.astype(np.int32), out, n_used, int(normed))[-1]
    assert np.isnan(got[-1]).all()
    return got[:-1]


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize(("n_expert", "n_used"), [(1, 1), (8, 2), (13, 5), (4, 4)])
@pytest.mark.parametrize("normed", [True, False])
def test_weights_of_the_chosen(normed: bool, n_expert: int, n_used: int, lanes: int) -> None:
    rng = np.random.default_rng(n_expert)
    logits = (3 * rng.standard_normal((3, n_expert))).astype(np.float32)
    wanted = expected(logits, n_used, normed)
    got = route(logits, np.arange(n_expert), n_used, normed, lanes)
    np.testing.assert_allclose(got, wanted, rtol=2e-6)
    assert ((got != 0).sum(axis=1) == n_used).all()
    some = rng.permutation(n_expert)[: max(1, n_expert // 2)]
    np.testing.assert_array_equal(route(logits, some, n_used, normed, lanes), got[:, some])


def test_equal_logits_go_to_the_lower_expert() -> None:
    logits = np.array([[1, 2, 1, 2, 1, 1], [0] * 6], np.float32)
    for normed in (True, False):
        got = route(logits, np.arange(6), 3, normed, LANES[0])
        np.testing.assert_allclose(got, expected(logits, 3, normed), rtol=2e-6)
        assert (got[0].nonzero()[0] == [0, 1, 3]).all() and (got[1].nonzero()[0] == [0, 1, 2]).all()


def test_logits_far_apart() -> None:
    """An expert whose weight underflows is as good as not chosen; nothing overflows."""
    logits = np.array([[300, -300, 299, -1e30], [-1e4, -1e4 - 1, -2e4, 0]], np.float32)
    got = route(logits, np.arange(4), 2, True, LANES[-1])
    np.testing.assert_allclose(got, expected(logits, 2, True), rtol=2e-6, atol=1e-30)

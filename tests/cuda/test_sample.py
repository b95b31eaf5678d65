"""The greatest logits of a row, and the first k in order: exact, ties to the lower id."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_launch import LANES, filled, launch

ROWS = 3


def logits(n_vocab: int, ties: bool) -> np.ndarray:
    rng = np.random.default_rng(n_vocab)
    if ties:
        return rng.integers(-2, 3, (ROWS, n_vocab)).astype(np.float32)
    return rng.standard_normal((ROWS, n_vocab), np.float32) * 10


def ordered(row: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k greatest, descending; a stable sort keeps ties by id."""
    return np.argsort(-row, kind="stable")[:k].astype(np.int32)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n_vocab", [1, 2, 5, 100, 257])
def test_argmax(lanes: int, ties: bool, n_vocab: int) -> None:
    x = logits(n_vocab, ties)
    _, out = launch("argmax", lanes, ROWS, x, filled((ROWS + 1,), np.int32))
    np.testing.assert_array_equal(out[:ROWS], x.argmax(axis=1))
    assert out[ROWS] == np.iinfo(np.int32).min


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n_vocab", "k"), [(1, 1), (5, 5), (100, 1), (100, 40), (257, 7)])
def test_topk(lanes: int, ties: bool, n_vocab: int, k: int) -> None:
    x = logits(n_vocab, ties)
    _, ids, values = launch("topk", lanes, ROWS, x, k, filled((ROWS, k), np.int32), filled((ROWS, k)))
    wanted = np.array([ordered(row, k) for row in x])
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_array_equal(values, np.take_along_axis(x, wanted, axis=1))


@pytest.mark.parametrize("lanes", LANES)
def test_all_of_the_best_in_one_threads_share(lanes: int) -> None:
    """More than a thread keeps: it looks again, and again."""
    threads = lanes if lanes < 32 else 512
    x = np.zeros((1, 20 * threads), np.float32)
    x[0, threads - 1 :: threads] = np.arange(20) % 11 + 1
    _, ids, values = launch("topk", lanes, 1, x, 19, filled((1, 19), np.int32), filled((1, 19)))
    np.testing.assert_array_equal(ids[0], ordered(x[0], 19))
    np.testing.assert_array_equal(values[0], np.sort(x[0])[::-1][:19])


def test_extremes() -> None:
    """-inf is never chosen: a row without numbers gives id 0, or -1 for each that topk lacks."""
    low, high = np.finfo(np.float32).min, np.finfo(np.float32).max
    x = np.array([[-np.inf, -np.inf, -5, -np.inf], [-np.inf] * 4, [1, high, high, low]], np.float32)
    _, out = launch("argmax", LANES[-1], 3, x, filled((3,), np.int32))
    np.testing.assert_array_equal(out, [2, 0, 1])
    _, ids, _ = launch("topk", LANES[-1], 3, x, 3, filled((3, 3), np.int32), filled((3, 3)))
    np.testing.assert_array_equal(ids, [[2, -1, -1], [-1] * 3, [1, 2, 0]])

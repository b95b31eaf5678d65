"""The down projection in parts, and their sum, against float64: every type, shares, what is read, the order."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from cuda_launch import LANES, filled, launch
from naive import QType

from hotcold.runtime.cuda.down import BASE, BIAS, merge_launch, part_count
from hotcold.runtime.cuda.down import launch as down_launch
from hotcold.runtime.cuda.repack import KINDS, pack

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy on infinities, in the simulator
Array = np.ndarray


def down(kind: str, raw: Array, h: Array, k: int, lanes: int, parts: int) -> Array:
    """Parts [parts, n_tok, k] of h times the rows; checks that nothing beyond n_tok rows is written."""
    n, n_tok = len(raw), len(h)
    wide, sums = filled((n_tok + 1, n)), filled((parts, n_tok + 2, k))
    wide[:n_tok] = h
    name, (columns, _, tiles) = down_launch(kind, k, n_tok, lanes)
    got = launch(name, lanes, (columns, parts, tiles), *pack(kind, raw, k), wide, sums, n, k, n_tok)[-1]
    assert np.isnan(got[:, n_tok:]).all()
    return got[:, :n_tok]


def hidden(n_tok: int, n: int, rng: np.random.Generator) -> Array:
    """h [n_tok, n], two thirds of it zeros of either sign."""
    h = rng.standard_normal((n_tok, n), np.float32)
    zero = np.where(rng.random(h.shape) < 0.5, np.float32(0.0), np.float32(-0.0))
    return np.where(rng.random(h.shape) < 0.66, zero, h)


def assert_parts(kind: str, raw: Array, h: Array, got: Array) -> None:
    """Each part is the sum over its share of neurons: equal shares, but for the last ones."""
    weights, n = naive.dequantize(raw, QType[kind]).astype(np.float64), len(raw)
    share = -(-n // len(got))
    for p, part in enumerate(got):
        own = slice(min(p * share, n), min((p + 1) * share, n))
        np.testing.assert_allclose(part, h[:, own].astype(np.float64) @ weights[own], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("n_tok", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_type(kind: str, n_tok: int) -> None:
    rng = np.random.default_rng(1)
    k = 256 if kind.endswith("_K") else 32
    raw, h = naive.random_blocks(QType[kind], 21, k, rng), hidden(n_tok, 21, rng)
    assert_parts(kind, raw, h, down(kind, raw, h, k, LANES[-1], 2))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize(("n", "n_tok", "parts"), [(71, 1, 2), (71, 9, 1), (1, 1, 3), (5, 2, 4), (40, 8, 3)])
def test_shares(n: int, n_tok: int, parts: int, lanes: int) -> None:
    """More neurons than a round looks at, fewer than there are parts, more tokens than a tile."""
    rng = np.random.default_rng(2)
    raw, h = naive.random_blocks(QType.Q4_0, n, 32, rng), hidden(n_tok, n, rng)
    got = down("Q4_0", raw, h, 32, lanes, parts)
    assert_parts("Q4_0", raw, h, got)
    np.testing.assert_array_equal(got, down("Q4_0", raw, h, 32, lanes, parts))


def test_all_neurons_active_or_none() -> None:
    rng = np.random.default_rng(3)
    raw, h = naive.random_blocks(QType.Q8_0, 30, 32, rng), rng.standard_normal((2, 30), np.float32)
    for n_tok in (1, 2):
        assert_parts("Q8_0", raw, h[:n_tok], down("Q8_0", raw, h[:n_tok], 32, LANES[0], 2))
        assert not down("Q8_0", raw, 0 * h[:n_tok], 32, LANES[0], 2).any()


@pytest.mark.parametrize("n_tok", [1, 3])
def test_rows_of_idle_neurons_are_not_read(n_tok: int) -> None:
    rng = np.random.default_rng(4)
    raw, h = naive.random_blocks(QType.Q4_0, 24, 32, rng), hidden(n_tok, 24, rng)
    idle = ~h.any(axis=0)
    assert idle.any()
    spoiled = raw.copy()
    spoiled[idle, :2] = np.array([np.inf], np.float16).view(np.uint8)
    assert_parts("Q4_0", raw, h, down("Q4_0", spoiled, h, 32, LANES[0], 2))


def test_nan_is_not_skipped() -> None:
    raw, h = naive.random_blocks(QType.Q8_0, 4, 32, np.random.default_rng(5)), np.zeros((1, 4), np.float32)
    h[0, 2] = np.nan
    got = down("Q8_0", raw, h, 32, LANES[0], 2)
    assert not got[0].any() and np.isnan(got[1]).all()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_of_ragged_width(kind: str) -> None:
    rng = np.random.default_rng(6)
    raw, h = naive.random_blocks(QType[kind], 9, 13, rng), hidden(2, 9, rng)
    assert_parts(kind, raw, h, down(kind, raw, h, 13, LANES[0], 2))


@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("k", [37, 300])
@pytest.mark.parametrize("mode", [0, BASE, BIAS, BASE | BIAS])
def test_merge_adds_in_order(mode: int, k: int, parts: int) -> None:
    rng = np.random.default_rng(7)
    n_tok, sums = 3, rng.standard_normal((parts, 4, k), np.float32)
    x, bias = rng.standard_normal((4, k), np.float32), rng.standard_normal(k, np.float32)
    want = x[:n_tok] if mode & BASE else np.zeros((n_tok, k), np.float32)
    want = want + bias if mode & BIAS else want.copy()
    for part in sums:
        want += part[:n_tok]
    name, grid = merge_launch(k, n_tok)
    given = x if mode & BASE else filled((4, k)), sums, bias if mode & BIAS else filled((k,))
    got = launch(name, LANES[0], grid, *given, filled((4, k)), n_tok, mode)[3]
    np.testing.assert_array_equal(got[:n_tok], want)
    assert np.isnan(got[n_tok:]).all()


def test_parts_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotcold.runtime.cuda.down.PARTS", 32)  # as on a device
    assert [part_count(n) for n in (1, 8, 9, 16, 17, 64, 128, 129, 256, 512)] == [32, 32, 16, 16, 8, 4, 2, 1, 1, 1]
    assert max(part_count(n) * n for n in range(1, 513)) == 512
    assert down_launch("Q4_0", 4096, 1, 32) == ("down:Q4_0", (16, 32, 1))
    assert down_launch("Q4_0", 4104, 512, 32) == ("down_tile:Q4_0", (17, 1, 64))

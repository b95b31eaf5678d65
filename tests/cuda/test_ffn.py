"""The fused FFN against float64: activations, the two rules for what is computed, what is read, and the counter."""

from __future__ import annotations

import math
from typing import NamedTuple

import naive
import numpy as np
import pytest
from cuda_launch import LANES, filled, launch
from naive import QType

from hotcold.runtime.cuda.ffn import ACTIVATIONS, GATE_BIAS, SCORES, UP_BIAS
from hotcold.runtime.cuda.ffn import launch as ffn_launch
from hotcold.runtime.cuda.repack import KINDS, pack
from hotcold.runtime.sparsity import gate_range

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy on infinities, in the simulator
Array = np.ndarray
Rule = tuple[float, float, float]
ALL = (math.inf, math.inf, -math.inf)
BAND = (-0.5, -0.3, 0.4)  # active: from 0.4 on, and from -0.5 to -0.3


class Layer(NamedTuple):
    """An FFN's raw rows and their types; up_kind "": it has no gate, and gate is its up projection. Biases or none."""

    gate: Array
    up: Array
    gate_kind: str
    up_kind: str
    gate_bias: Array | None = None
    up_bias: Array | None = None

    @property
    def k(self) -> int:
        return naive.dequantize(self.gate[:1], QType[self.gate_kind]).shape[1]


def make_layer(gate_kind: str, up_kind: str, n: int, k: int, rng: np.random.Generator) -> Layer:
    gate, up = (naive.random_blocks(QType[kind], n, k, rng) for kind in (gate_kind, up_kind or gate_kind))
    return Layer(gate, up, gate_kind, up_kind)


def ffn(
    layer: Layer,
    x: Array,
    activation: str,
    lanes: int,
    rule: Rule = ALL,
    scores: Array | None = None,
    cut: Array | None = None,
    per: int = 0,
) -> tuple[Array, int]:
    """(h [n_tok, n], active pairs); checks that nothing beyond n_tok rows is written.

    per: neurons that share a weight of scores [n_tok, n / per]; 0: scores are compared with cut.
    """
    n, (n_tok, k) = len(layer.gate), x.shape
    h, wide, counts = filled((n_tok + 2, n)), filled((n_tok + 1, k)), np.array([100], np.int64)
    wide[:n_tok] = x
    given = filled((n_tok, n)) if scores is None else scores
    vectors = [filled((n,)) if vector is None else vector for vector in (cut, layer.gate_bias, layer.up_bias)]
    mode = (SCORES if cut is not None else 0) | (GATE_BIAS if layer.gate_bias is not None else 0)
    mode |= UP_BIAS if layer.up_bias is not None else 0
    name, grid = ffn_launch(layer.gate_kind, layer.up_kind, activation, n, n_tok, per > 0)
    weights = pack(layer.gate_kind, layer.gate, k)
    if layer.up_kind:
        weights = *weights, *pack(layer.up_kind, layer.up, k)
    numbers = n, k, n_tok, per or 1, mode, *map(np.float32, rule)
    arrays = launch(name, lanes, grid, *weights, wide, given, *vectors, h, counts, *numbers)
    got, counted = arrays[-2], int(arrays[-1][0]) - 100
    assert np.isnan(got[n_tok:]).all()
    return got[:n_tok], counted


def gates(layer: Layer, x: Array) -> Array:
    products = naive.matvec(layer.gate, QType[layer.gate_kind], x)
    return products if layer.gate_bias is None else products + layer.gate_bias


def expected(layer: Layer, x: Array, activation: str, active: Array) -> Array:
    if not layer.up_kind:
        return np.where(active, naive.ACTIVATIONS[activation](gates(layer, x)), 0)
    up = naive.matvec(layer.up, QType[layer.up_kind], x)
    up = up if layer.up_bias is None else up + layer.up_bias
    return np.where(active, naive.glu(gates(layer, x), up, activation), 0)


def within(g: Array, rule: Rule) -> Array:
    low, high, top = rule
    return ~((g < top) & ((g < low) | (g > high)))


def assert_close(got: Array, want: Array) -> None:
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    assert not got[want == 0].any()


@pytest.mark.parametrize("up", ["Q8_0", ""])
@pytest.mark.parametrize("n_tok", [1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, n_tok: int, up: str) -> None:
    rng = np.random.default_rng(1)
    layer = make_layer("Q8_0", up, 7, 64, rng)
    x = 2 * rng.standard_normal((n_tok, 64), np.float32)
    h, counted = ffn(layer, x, activation, LANES[0])
    assert_close(h, expected(layer, x, activation, np.full((n_tok, 7), True)))
    assert counted == 7 * n_tok


@pytest.mark.parametrize("n_tok", [1, 2])
@pytest.mark.parametrize(("kind", "gated"), [*((kind, True) for kind in KINDS), ("F16", False), ("Q5_K", False)])
def test_every_type(kind: str, gated: bool, n_tok: int) -> None:
    rng = np.random.default_rng(2)
    layer = make_layer(kind, kind if gated else "", 5, 256 if kind.endswith("_K") else 96, rng)
    x = rng.standard_normal((n_tok, layer.k), np.float32)
    active = within(gates(layer, x), BAND)
    h, counted = ffn(layer, x, "silu", LANES[0], BAND)
    assert_close(h, expected(layer, x, "silu", active))
    assert counted == active.sum()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("n_tok", [1, 3, 9])
def test_rules_together(n_tok: int, lanes: int) -> None:
    """Scores below the cut-off, gates outside the band: both are 0, in types that differ between gate and up."""
    rng = np.random.default_rng(3)
    layer = make_layer("Q4_K", "Q6_K", 9, 256, rng)
    x = rng.standard_normal((n_tok, 256), np.float32)
    scores = rng.standard_normal((n_tok, 9)).astype(np.float32)
    cut = rng.standard_normal(9).astype(np.float32)
    scores[0, :2], cut[2] = (np.nan, cut[1]), np.nan  # neither NaN nor equality is below
    active = ~(scores < cut) & within(gates(layer, x), BAND)
    assert 0 < active.sum() < active.size
    h, counted = ffn(layer, x, "silu", lanes, BAND, scores, cut)
    assert_close(h, expected(layer, x, "silu", active))
    assert counted == active.sum()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("n_tok", [1, 9])
@pytest.mark.parametrize("up", ["F16", ""])
def test_biases(up: str, n_tok: int, lanes: int) -> None:
    """The rule looks at the gate with its bias; the kernel takes the biases that there are."""
    rng = np.random.default_rng(8)
    plain = make_layer("F16", up, 7, 40, rng)
    first, second = (rng.standard_normal(7).astype(np.float32) for _ in range(2))
    x = rng.standard_normal((n_tok, 40), np.float32)
    for biases in ((first, None), (None, second), (first, second)) if up else ((first, None),):
        layer = plain._replace(gate_bias=biases[0], up_bias=biases[1])
        active = within(gates(layer, x), BAND)
        assert 0 < active.sum() < active.size
        h, counted = ffn(layer, x, "silu", lanes, BAND)
        assert_close(h, expected(layer, x, "silu", active))
        assert counted == active.sum()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("n_tok", [1, 3, 9])
@pytest.mark.parametrize("per", [1, 3, 4])
def test_shares_of_neurons(per: int, n_tok: int, lanes: int) -> None:
    """Neurons come in groups that share a weight; those of weight 0 are not active, and their rows are not read."""
    rng = np.random.default_rng(9)
    n = 24
    layer = make_layer("Q8_0", "Q8_0", n, 32, rng)
    x = rng.standard_normal((n_tok, 32), np.float32)
    scores = rng.uniform(0.1, 1, (n_tok, n // per)).astype(np.float32)
    scores[:, rng.permutation(n // per)[: n // per // 2]] = 0
    scores[0, 0] = 0
    weights = np.repeat(scores, per, axis=1)
    active = (weights != 0) & within(gates(layer, x), BAND)
    off = np.repeat(~weights.any(axis=0).reshape(-1, 4).any(axis=1), 4)
    assert off.any() or per < 4
    spoiled = layer._replace(gate=layer.gate.copy(), up=layer.up.copy())
    spoiled.gate[off, :2] = spoiled.up[off, :2] = np.array([np.inf], np.float16).view(np.uint8)
    h, counted = ffn(spoiled, x, "silu", lanes, BAND, scores, per=per)
    assert_close(h, weights * expected(layer, x, "silu", active))
    assert counted == active.sum()


@pytest.mark.parametrize("n_tok", [1, 3])
def test_rows_that_no_token_needs_are_not_read(n_tok: int) -> None:
    """Rows that would spoil the result: of gate where scores are low, of up where gates are inactive too."""
    rng = np.random.default_rng(4)
    layer = make_layer("Q4_0", "Q4_0", 12, 64, rng)
    x = np.repeat(rng.standard_normal((1, 64), np.float32), n_tok, axis=0)
    g = gates(layer, x)
    scores, cut = np.zeros((n_tok, 12), np.float32), np.zeros(12, np.float32)
    low = np.arange(12) % 3 == 0
    low[4:8] = True  # a whole block's rows, or a warp's
    cut[low] = 1
    infinite = np.array([np.inf], np.float16).view(np.uint8)
    off = low | (g[0] < 0)
    if n_tok > 1:  # a tile reads its warps' rows together: four of them
        low, off = (np.repeat(flags.reshape(-1, 4).all(axis=1), 4) for flags in (low, off))
    spoiled = layer._replace(gate=layer.gate.copy(), up=layer.up.copy())
    spoiled.gate[low, :2] = infinite
    spoiled.up[off, :2] = infinite
    h, counted = ffn(spoiled, x, "relu", LANES[0], gate_range("relu", 1e-30), scores, cut)
    active = (cut == 0) & (g > 0)
    assert_close(h, expected(layer, x, "relu", active))
    assert counted == active.sum()


@pytest.mark.parametrize("n_tok", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_gates_are_active(activation: str, n_tok: int) -> None:
    rng = np.random.default_rng(5)
    layer = make_layer("Q8_0", "Q8_0", 3, 32, rng)
    layer.gate[1, :2] = np.array([np.nan], np.float16).view(np.uint8)
    x = rng.standard_normal((n_tok, 32), np.float32)
    h, counted = ffn(layer, x, activation, LANES[0], (math.inf, math.inf, 1e30))
    assert np.isnan(h[:, 1]).all() and not h[:, [0, 2]].any()
    assert counted == n_tok


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("up", ["F32", ""])
def test_large_gates(activation: str, up: str) -> None:
    """Far from zero, where exponentials overflow."""
    layer = make_layer("F32", up, 4, 8, np.random.default_rng(6))
    weights = np.zeros((4, 8), np.float32)
    weights[:, 0] = 1e4, -1e4, 200, -200
    layer = layer._replace(gate=weights.view(np.uint8))
    x = np.ones((1, 8), np.float32)
    h, _ = ffn(layer, x, activation, LANES[0])
    np.testing.assert_allclose(h, expected(layer, x, activation, np.full((1, 4), True)), rtol=2e-5, atol=1e-30)


def test_widths_that_are_no_whole_runs() -> None:
    rng = np.random.default_rng(7)
    layer = make_layer("F16", "F16", 5, 13, rng)
    for n_tok in (1, 2):
        x = rng.standard_normal((n_tok, 13), np.float32)
        h, _ = ffn(layer, x, "silu", LANES[0])
        assert_close(h, expected(layer, x, "silu", np.full((n_tok, 5), True)))

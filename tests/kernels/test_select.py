"""Selections: lists of active neurons, their gates or scores, which branch a step takes, and the sums for usage."""

from __future__ import annotations

import math
from typing import Any

import naive
import numpy as np
import pytest
from kernel_harness import LEVELS, Array, Buffer, Op, Tape, choice

from hotcold.runtime.cpu.layout import TILE_MIN, Choice, Select
from hotcold.runtime.sparsity import gate_range

WIDTHS = (1, 7, 8, 16, 31, 33, 37, 64, 100)
EXACT = (math.inf, math.inf, float(np.finfo(np.float32).tiny))  # of relu
BOTH_SIDES = (-0.75, -0.25, 0.5)
ALL = (math.inf, math.inf, -math.inf)
NONE = (math.inf, math.inf, math.inf)


class Selection:
    """A selection's op and what it writes; `list`, `picked` and `choice` are the arrays."""

    def __init__(self, src: Array, rule: Any, limit: int) -> None:
        """src float32 (tokens, n), rule: low, high and top, or the cuts float32 (n,)."""
        tokens, n = src.shape
        few = tokens if tokens < TILE_MIN else 0  # many tokens have no list
        self.src = Buffer(src)
        self._list, self._picked = Buffer.full(n * (few > 0), np.int32, -1), Buffer.full((few, n))
        self._choice = choice(sparse=-1)
        fields = {"src": self.src, "n": n, "list": self._list, "picked": self._picked, "choice": self._choice}
        scores = isinstance(rule, np.ndarray)
        fields |= {"cut": Buffer(rule)} if scores else dict(zip(("low", "high", "top"), map(float, rule), strict=True))
        self.op = Op("select:scores" if scores else "select:gates", Select, {**fields, "limit": limit})
        self.list, self.picked = self._list.array, self._picked.array

    def run(self, level: str, n_threads: int = 1) -> Selection:
        with Tape(level, [self.op], n_threads) as tape:
            tape.walk(n_tok=len(self.src.array))
        return self

    def __getattr__(self, name: str) -> int:
        """A field of the Choice record."""
        return int(self._choice.array[getattr(Choice, name) // 8])


def active(src: Array, rule: Any) -> Array:
    """Which neurons each token needs; one with a NaN is never left out."""
    if isinstance(rule, np.ndarray):
        return (src >= rule) | np.isnan(src) | np.isnan(rule)
    low, high, top = rule
    return (src >= top) | ((low <= src) & (src <= high)) | np.isnan(src)


def assert_selects(selection: Selection, src: Array, rule: Any, limit: int) -> None:
    on = active(src, rule)
    tokens, n = src.shape
    wanted = np.flatnonzero(on.any(axis=0)) if tokens < TILE_MIN else np.arange(n)
    sparse = tokens < TILE_MIN and len(wanted) <= limit
    assert (selection.sparse, selection.count) == (sparse, len(wanted))
    assert (selection.active, selection.tokens) == (on.sum(), tokens)
    assert (selection.sparse_steps, selection.dense_steps) == (sparse, not sparse)
    assert selection.listed == (len(wanted) if sparse else 0)
    if tokens < TILE_MIN:
        np.testing.assert_array_equal(selection.list[: len(wanted)], wanted)
        picked = src[:, wanted] - (rule[wanted] if isinstance(rule, np.ndarray) else np.float32(0))
        np.testing.assert_array_equal(selection.picked[:, : len(wanted)], picked)
        assert (selection.list[len(wanted) :] == -1).all()
        assert np.isnan(selection.picked[:, len(wanted) :]).all()


@pytest.mark.parametrize("rule", [EXACT, BOTH_SIDES, ALL, NONE])
@pytest.mark.parametrize("level", LEVELS)
def test_gates(level: str, rule: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(1)
    for n in WIDTHS:
        for tokens in (1, 2, 7, 8, 11):
            gates = rng.standard_normal((tokens, n), np.float32)
            assert_selects(Selection(gates, rule, n).run(level), gates, rule, n)


@pytest.mark.parametrize("level", LEVELS)
def test_scores(level: str) -> None:
    rng = np.random.default_rng(2)
    for n in WIDTHS:
        for tokens in (1, 2, 7, 8, 11):
            scores, cut = rng.standard_normal((tokens, n), np.float32), rng.standard_normal(n, np.float32)
            cut[:: max(2, n // 3)] = scores[0, :: max(2, n // 3)]  # a score that is its cut counts
            assert_selects(Selection(scores, cut, n).run(level), scores, cut, n)


@pytest.mark.parametrize("level", LEVELS)
def test_a_list_of_any_density(level: str) -> None:
    """Words of set bits are taken apart one by one: none, one, some or all of them."""
    rng = np.random.default_rng(3)
    for density in (0.0, 0.02, 0.3, 0.98, 1.0):
        gates = np.where(rng.random((3, 333)) < density, 1, -1).astype(np.float32)
        gates *= rng.uniform(0.1, 1, gates.shape).astype(np.float32)
        assert_selects(Selection(gates, EXACT, 333).run(level), gates, EXACT, 333)


@pytest.mark.parametrize("level", LEVELS)
def test_the_bounds_belong_to_what_is_active(level: str) -> None:
    """And their neighbours on the other side do not, down to the smallest numbers."""
    edges = np.array([*BOTH_SIDES, EXACT[2]], np.float32)
    values = [edges, np.nextafter(edges, np.float32(-np.inf)), np.nextafter(edges, np.float32(np.inf))]
    values.append(np.array([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, np.inf, -np.inf], np.float32))
    gates = np.resize(np.concatenate(values), (1, 53))
    for rule in (EXACT, BOTH_SIDES, ALL, NONE):
        assert_selects(Selection(gates, rule, 53).run(level), gates, rule, 53)


@pytest.mark.parametrize("level", LEVELS)
def test_nans_are_listed(level: str) -> None:
    """So that they come out as NaNs, as in a dense step."""
    rng = np.random.default_rng(4)
    for tokens in (1, 3, 9):
        gates = -np.abs(rng.standard_normal((tokens, 37), np.float32))
        cut = rng.standard_normal(37, np.float32)
        gates[0, 5] = gates[-1, 36] = np.nan
        assert_selects(Selection(gates, EXACT, 37).run(level), gates, EXACT, 37)
        cut[7] = np.nan
        assert_selects(Selection(gates, cut, 37).run(level), gates, cut, 37)


@pytest.mark.parametrize("level", LEVELS)
def test_infinite_cuts(level: str) -> None:
    """A predictor may take a neuron always or never."""
    scores = np.random.default_rng(5).standard_normal((2, 40)).astype(np.float32)
    cut = np.where(np.arange(40) % 3 == 0, -np.inf, np.inf).astype(np.float32)
    selection = Selection(scores, cut, 40).run(level)
    np.testing.assert_array_equal(selection.list[:14], np.arange(0, 40, 3))
    assert (selection.count, selection.active) == (14, 28) and (selection.picked[:, :14] == np.inf).all()


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_picked_says_again_who_needs_the_neuron(level: str) -> None:
    """A score less its cut is at least 0 exactly where the score was at least its cut, however close they are."""
    rng = np.random.default_rng(6)
    cut = np.ldexp(rng.standard_normal(99), rng.integers(-149, 20, 99)).astype(np.float32)
    neighbours = np.nextafter(cut, np.float32(-np.inf)), cut, np.nextafter(cut, np.float32(np.inf))
    scores = np.array(neighbours)[rng.permuted(np.tile(np.arange(3), (99, 1)), axis=1).T, np.arange(99)]
    selection = Selection(scores, cut, 99).run(level)
    assert selection.count == 99
    np.testing.assert_array_equal(selection.picked >= 0, scores >= cut)


@pytest.mark.parametrize("level", LEVELS)
def test_a_list_up_to_the_limit_is_sparse(level: str) -> None:
    gates = np.full((3, 40), -1, np.float32)
    gates[0, :9] = gates[2, 5:12] = 1  # 12 neurons among them
    for limit, sparse in ((13, 1), (12, 1), (11, 0), (0, 0)):
        assert_selects(selection := Selection(gates, EXACT, limit).run(level), gates, EXACT, limit)
        assert selection.sparse == sparse and selection.count == 12
    nobody = np.full((1, 40), -1, np.float32)
    assert Selection(nobody, EXACT, 0).run(level).sparse == 1


@pytest.mark.parametrize("level", LEVELS)
def test_many_tokens_are_dense(level: str) -> None:
    for tokens, sparse in ((TILE_MIN - 1, 1), (TILE_MIN, 0), (40, 0)):
        gates = np.full((tokens, 20), -1, np.float32)
        gates[:, 3] = 1
        for n_threads in (1, 3):
            selection = Selection(gates, EXACT, 20).run(level, n_threads)
            assert_selects(selection, gates, EXACT, 20)
            assert (selection.sparse, selection.active) == (sparse, tokens)


@pytest.mark.parametrize("level", LEVELS)
def test_sums_grow_step_by_step(level: str) -> None:
    """Of steps with few and many tokens, of short and long lists, by several threads."""
    rng = np.random.default_rng(7)
    n, limit = 50, 30
    selection = Selection(np.zeros((7, n), np.float32), EXACT, limit)
    many = Selection(np.zeros((12, n), np.float32), EXACT, limit)
    many.op.fields["choice"] = selection.op.fields["choice"]
    wanted = dict.fromkeys(("active", "tokens", "sparse_steps", "listed", "dense_steps"), 0)
    with Tape(level, [selection.op], 3) as few_tape, Tape(level, [many.op], 3) as many_tape:
        for step in range(60):
            tokens = (1, 2, 12, 1, 7, 9)[step % 6]
            on = rng.random((tokens, n)) < (0.1, 0.5, 0.9)[step // 6 % 3]
            which, tape = (selection, few_tape) if tokens < TILE_MIN else (many, many_tape)
            which.src.array[:tokens] = np.where(on, 1, -1)
            tape.walk(n_tok=tokens)
            count = on.any(axis=0).sum() if tokens < TILE_MIN else n
            sparse = tokens < TILE_MIN and count <= limit
            wanted["active"] += on.sum()
            wanted["tokens"] += tokens
            wanted["sparse_steps" if sparse else "dense_steps"] += 1
            wanted["listed"] += count if sparse else 0
            assert {name: getattr(selection, name) for name in wanted} == wanted
            assert (selection.sparse, selection.count) == (sparse, count)
    assert min(wanted["sparse_steps"], wanted["dense_steps"]) > 10


@pytest.mark.parametrize("name", naive.ACTIVATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_gates_selected_by_an_activations_size(level: str, name: str) -> None:
    """The bounds that the engine passes leave out what float64 says is below the threshold, but for rounding."""
    gates = np.linspace(-12, 12, 4001, dtype=np.float32)[None]
    size = np.abs(naive.ACTIVATIONS[name](gates[0].astype(np.float64)))
    for threshold in (1e-4, 0.05, 0.16, 0.27, 0.3, 2.0):
        selection = Selection(gates, gate_range(name, threshold), 4001).run(level)
        listed = np.zeros(4001, bool)
        listed[selection.list[: selection.count]] = True
        clear = np.abs(size / threshold - 1) > 1e-5
        assert clear.mean() > 0.99 and 0 < listed.sum() < 4001
        np.testing.assert_array_equal(listed[clear], (size >= threshold)[clear])

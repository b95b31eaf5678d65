"""Kernels of a mixture of experts against NumPy: the router's choice, products of pairs, their activation and sums."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import naive
import numpy as np
import pytest
from kernel_harness import (
    LEVELS,
    QUANTS,
    TYPES,
    Array,
    Buffer,
    Op,
    Tape,
    assert_product,
    inputs,
    pack_op,
    panel_tokens,
    run,
    weights,
    widths,
)

from hotcold.runtime.cpu.layout import ARRAYS, TILE_MIN, Combine, Item, MatMul, Pack, Route, Routing, Step, packed_bytes

COUNTS = (1, 3, 7, 8, 21, 60)  # tokens; rows of activations up to 7


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@dataclass
class Routed:
    """What a router shall have said: items [experts with pairs, 3], pairs [positions], slots and weights [n_tok, n]."""

    items: Array
    pairs: Array
    slots: Array
    weights: Array

    @classmethod
    def of(cls, ids: Array, shares: Array, n_expert: int, panel: int, here: Array | None = None) -> Routed:
        items, pairs, slots = [], [], np.full(ids.shape, -1, np.int32)
        for expert in range(n_expert):
            mine = [(int(t), int(s)) for t, s in zip(*np.nonzero(ids == expert), strict=True)]
            if not mine or (here is not None and not here[expert]):
                continue
            items.append((expert, len(pairs), len(mine)))
            for t, s in mine:
                slots[t, s] = len(pairs)
                pairs.append(t)
            pairs += [-1] * (-len(pairs) % panel)
        return cls(np.array(items, np.int64).reshape(-1, 3), np.array(pairs, np.int32), slots, shares)

    def fields(self) -> dict[str, Buffer]:
        record = np.zeros(len(Routing), np.int64)
        record[Routing.experts // 8], record[Routing.positions // 8] = len(self.items), len(self.pairs)
        return {"routing": Buffer(record), "items": Buffer(self.items), "pairs": Buffer(self.pairs)}


def panel_of(level: str, n_tok: int) -> int:
    return panel_tokens(level) if n_tok >= TILE_MIN else 1


def choices(n_tok: int, n_expert: int, n_used: int, rng: np.random.Generator, kind: str = "random") -> Routed:
    """Ids of experts, uneven as asked for; the positions are those of one pair after the other."""
    ids = np.array([rng.permutation(n_expert)[:n_used] for _ in range(n_tok)])
    if kind == "same":  # all tokens want the same experts
        ids[:] = ids[0]
    if kind == "one":  # the last expert has all tokens, and some have none
        ids = np.where(ids == n_expert - 1, ids[:, :1], ids)
        ids[:, 0] = n_expert - 1
        for row in ids:
            others = [e for e in range(n_expert - 1) if e % 2]
            row[1:] = rng.permutation(others)[: n_used - 1]
    return Routed(np.empty(0), np.empty(0), ids, softmax(rng.standard_normal((n_tok, n_used))).astype(np.float32))


# --- the router's choice -------------------------------------------------------------------------------------------


def route(level: str, logits: Array, n_used: int, norm: bool, here: Array | None = None, steps: int = 1) -> tuple:
    """(Routed, heat, Routing record) of some equal steps."""
    n_tok, n = logits.shape
    n_pairs = n_tok * n_used
    size = n_pairs + n * (panel_of(level, n_tok) - 1)
    buffers = {
        "routing": Buffer.full(len(Routing), np.int64, 0),
        "heat": Buffer.full(n, np.int64, 0),
        "items": Buffer.full((n, len(Item)), np.int64, -7),
        "pairs": Buffer.full(size, np.int32, -7),
        "slots": Buffer.full((n_tok, n_used), np.int32, -7),
        "weights": Buffer.full((n_tok, n_used)),
        "spare": Buffer.full(n, np.int64, -7),
    }
    mask = Buffer(here.astype(np.uint8)) if here is not None else 0
    fields = {"src": Buffer(logits), "n": n, "n_used": n_used, "weights_norm": int(norm), "here": mask, **buffers}
    with Tape(level, [Op("route", Route, fields)], 2) as tape:
        for _ in range(steps):
            tape.walk(n_tok=n_tok)
    got = {name: buffer.array for name, buffer in buffers.items()}
    record = dict(zip(Routing._fields, got["routing"], strict=True))
    found = got["items"][: record["experts"]], got["pairs"][: record["positions"]], got["slots"], got["weights"]
    return Routed(*found), got["heat"], record


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("level", LEVELS)
def test_route(level: str, norm: bool) -> None:
    rng = np.random.default_rng(1)
    for n, n_used in ((1, 1), (4, 2), (5, 5), (20, 3), (64, 8), (128, 8)):
        for n_tok in COUNTS:
            logits = rng.normal(0, 3, (n_tok, n)).astype(np.float32)
            if n_tok % 2:
                logits = np.round(logits)  # with ties, of which the lower id comes first
            here = rng.integers(0, 2, n) if n_tok in (3, 21) else None
            got, heat, record = route(level, logits, n_used, norm, here, steps=2)
            ids = np.argsort(-logits, axis=1, kind="stable")[:, :n_used]
            shares = np.take_along_axis(softmax(logits.astype(np.float64)), ids, axis=1)
            shares = shares / shares.sum(axis=1, keepdims=True) if norm else shares
            wanted = Routed.of(ids, shares, n, panel_of(level, n_tok), here)
            for name in ("items", "pairs", "slots"):
                np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), name)
            np.testing.assert_allclose(got.weights, shares, rtol=2e-6)
            np.testing.assert_array_equal(heat, 2 * np.bincount(ids.ravel(), minlength=n))
            sums = {"tokens": 2 * n_tok, "pairs": 2 * (wanted.slots >= 0).sum(), "read": 2 * len(wanted.items)}
            assert {name: record[name] for name in sums} == sums


@pytest.mark.parametrize("level", LEVELS)
def test_route_of_what_is_not_finite(level: str) -> None:
    """Whatever the logits are, the ids are different and in range; weights that mean nothing are NaN."""
    inf, nan = math.inf, math.nan
    bad = [[nan] * 4, [1, nan, 2, 3], [inf, 1, inf, 2], [-inf] * 4]
    logits = np.array([*bad, [-inf, 1, -inf, 2], [1, 2, 3, 4], [3e38, -3e38, 0, 1]], np.float32)
    for norm in (True, False):
        got, heat, _ = route(level, logits, 3, norm)
        assert sorted(got.slots.ravel()) == list(range(21))
        assert heat.sum() == 21 and (heat <= 7).all()
        assert got.items[:, 2].sum() == 21
        assert np.isnan(got.weights[:4]).all()
        np.testing.assert_allclose(got.weights[4, :2], softmax(np.array([[2.0, 1.0]]))[0], rtol=1e-6)
        assert np.isfinite(got.weights[4:]).all() and (got.weights[[4, 6], 2] < 1e-30).all()


# --- products ------------------------------------------------------------------------------------------------------


def of_pairs(level: str, x: Buffer, fields: dict[str, Any], routed: dict[str, Buffer]) -> Op:
    """The op that packs tokens again, for each pair its token's."""
    k = x.array.shape[1]
    own = {"src": x, "k": k, "stride": k, "count": Step.n_tok, "segment": 64}
    return Op("pack", Pack, own | fields | {"routing": routed["routing"], "pairs": routed["pairs"]})


def pair_arrays(k: int, n: int, kind: str) -> dict[str, Any]:
    """Packed arrays for n positions, as rows or panels."""
    quantised = kind in QUANTS
    arrays = {
        name: Buffer(np.zeros(nbytes, np.uint8)) for name, nbytes in packed_bytes(k, n, quantised, rows=n).items()
    }
    return {"quantised": int(quantised), "floats": int(not quantised), **arrays}


def experts_op(kind: str, raw: Array, n: int, out: Buffer, arrays: dict[str, Any], **fields: Any) -> Op:
    own = {"w": Buffer(raw), "out": out, "n": n, "row_bytes": raw.shape[1], "out_stride": n, "chunk": 4, "panels": 1}
    own |= {name: buffer for name, buffer in arrays.items() if name in ARRAYS}
    return Op(f"experts:{kind}", MatMul, own | fields)


def products(
    level: str, kind: str, raw: Array, n: int, x: Array, routed: Routed, n_threads: int = 1, **options: int
) -> Array:
    """float32 (positions, n): each pair's token times its expert's matrix of n rows. Options: chunk, panels."""
    n_tok, k = x.shape
    lists, source = routed.fields(), Buffer(x)
    arrays = pair_arrays(k, max(n_tok, len(routed.pairs)), kind)
    out = Buffer.full((len(routed.pairs), n))
    ops = [pack_op(source, arrays), of_pairs(level, source, arrays, lists)]
    run(level, *ops, experts_op(kind, raw, n, out, arrays, k=k, **lists, **options), n_threads=n_threads, n_tok=n_tok)
    return np.array(out.array)


def assert_products(kind: str, raw: Array, n: int, x: Array, routed: Routed, got: Array) -> None:
    empty = np.ones(len(got), bool)
    for expert, first, count in routed.items:
        rows = slice(first, first + count)
        assert_product(kind, raw[expert * n : (expert + 1) * n], x[routed.pairs[rows]], got[rows])
        empty[rows] = False
    assert np.isnan(got[empty]).all()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_products(level: str, kind: str) -> None:
    rng = np.random.default_rng(2)
    n_expert, n = 6, 21
    for k in widths(kind)[-2:]:
        raw = weights(kind, n_expert * n, k, rng)
        for n_tok in COUNTS:
            for how, n_used in (("random", 2), ("same", 3), ("one", 2)):
                ids = choices(n_tok, n_expert, n_used, rng, how)
                routed = Routed.of(ids.slots, ids.weights, n_expert, panel_of(level, n_tok))
                x = inputs(kind, n_tok, k, rng)
                got = products(level, kind, raw, n, x, routed)
                assert_products(kind, raw, n, x, routed, got)
                for n_threads, chunk, panels in ((2, 5, 2), (2, 100, 1)):
                    again = products(level, kind, raw, n, x, routed, n_threads, chunk=chunk, panels=panels)
                    np.testing.assert_array_equal(again, got)


@pytest.mark.parametrize("level", LEVELS)
def test_no_pairs(level: str) -> None:
    """All experts of all tokens are computed elsewhere."""
    rng = np.random.default_rng(3)
    raw = weights("Q4_0", 12, 64, rng)
    for n_tok in (2, 9):
        routed = Routed.of(np.zeros((n_tok, 1), int), np.ones((n_tok, 1)), 2, 1, np.zeros(2))
        assert products(level, "Q4_0", raw, 6, inputs("Q4_0", n_tok, 64, rng), routed).shape == (0, 6)


# --- a whole layer -------------------------------------------------------------------------------------------------


def layer(
    level: str, kind: str, matrices: list[Array], x: Array, logits: Array, n_threads: int, threshold: float, add: int
) -> Array:
    """float32 (n_tok, n_embd): what the experts add, out of all the kernels in one tape."""
    (n_tok, n_embd), n_expert, n_used = x.shape, logits.shape[1], 2
    n_one, size = len(matrices[0]) // n_expert, n_tok * n_used + n_expert * 7
    lists = {
        "routing": Buffer.full(len(Routing), np.int64, 0),
        "items": Buffer.full((n_expert, len(Item)), np.int64, -7),
        "pairs": Buffer.full(size, np.int32, -7),
    }
    chosen = {"slots": Buffer.full((n_tok, n_used), np.int32, -7), "weights": Buffer.full((n_tok, n_used))}
    spare = {"heat": Buffer.full(n_expert, np.int64, 0), "spare": Buffer.full(n_expert, np.int64, 0)}
    source, hs, fs = Buffer(x), pair_arrays(n_one, size, kind), pair_arrays(n_embd, size, kind)
    gate, up, sums = Buffer.full((size, n_one)), Buffer.full((size, n_one)), Buffer.full((size, n_embd))
    out = Buffer(np.ones((n_tok, n_embd), np.float32))
    of_all = {"src": Buffer(logits), "n": n_expert, "n_used": n_used, "weights_norm": 1, "here": 0}
    act = {"src": gate, "second": up, "k": n_one, "stride": n_one, "count": Step.n_tok, "segment": 32}
    by_pair = {"routing": lists["routing"], "pairs": lists["pairs"]}
    by_row = {"routing": lists["routing"], "items": lists["items"], "pairs": 0}
    total = {"src": sums, "out": out, "n": n_embd, "n_used": n_used, "segment": 32, "add": add}
    ops = [
        pack_op(source, fs),
        Op("route", Route, of_all | lists | chosen | spare),
        of_pairs(level, source, fs, lists),
        experts_op(kind, matrices[0], n_one, gate, fs, k=n_embd, **lists)._replace(barrier=False),
        experts_op(kind, matrices[1], n_one, up, fs, k=n_embd, **lists),
        Op("activate:silu", Pack, act | hs | by_pair | {"threshold": threshold}),
        experts_op(kind, matrices[2], n_embd, sums, hs, k=n_one, **by_row),
        Op("combine", Combine, total | chosen),
    ]
    with Tape(level, ops, n_threads) as tape:
        for _ in range(1 if add else 2):  # the second time over what the first has left
            tape.walk(n_tok=n_tok)
    return np.array(out.array)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("level", LEVELS)
def test_layer(level: str, kind: str) -> None:
    rng = np.random.default_rng(4)
    n_expert, n_one, n_embd = 5, 64, 96
    matrices = [weights(kind, n_expert * n, k, rng) for n, k in ((n_one, n_embd), (n_one, n_embd), (n_embd, n_one))]
    exact = [
        naive.dequantize(raw, naive.QType[kind]).astype(np.float64).reshape(n_expert, -1, raw_k)
        for raw, raw_k in zip(matrices, (n_embd, n_embd, n_one), strict=True)
    ]
    for n_tok in COUNTS:
        x = inputs(kind, n_tok, n_embd, rng)
        logits = rng.normal(0, 2, (n_tok, n_expert)).astype(np.float32)
        for threshold in (0.0, 0.05):
            wanted = np.zeros((n_tok, n_embd))
            for t, row in enumerate(x.astype(np.float64)):
                ids = np.argsort(-logits[t], kind="stable")[:2]
                shares = softmax(logits[t, ids].astype(np.float64)[None])[0]
                for expert, share in zip(ids, shares, strict=True):
                    act = naive.silu(exact[0][expert] @ row)
                    h = np.where(np.abs(act) >= threshold, act * (exact[1][expert] @ row), 0)
                    wanted[t] += share * (exact[2][expert] @ h)
            spread = 1e-5 if kind == "F32" else 0.02  # h is rounded to 8 bits
            alone = layer(level, kind, matrices, x, logits, 1, threshold, add=1)
            assert np.abs(alone - 1 - wanted).max() <= spread * np.abs(wanted).max() + 1e-6
            both = layer(level, kind, matrices, x, logits, 2, threshold, add=1)
            np.testing.assert_array_equal(alone, both)
            over = layer(level, kind, matrices, x, logits, 2, threshold, add=0)
            np.testing.assert_allclose(over, alone - 1, atol=1e-6 + 1e-6 * np.abs(wanted).max())


# --- sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 64, 131])
@pytest.mark.parametrize("level", LEVELS)
def test_combine(level: str, n: int) -> None:
    """Weighted sums in the order of choices; what is computed elsewhere does not count, and may be all."""
    rng = np.random.default_rng(5)
    for n_tok in (1, 9):
        slots = rng.permutation(n_tok * 4).astype(np.int32).reshape(n_tok, 4)
        slots[rng.random(slots.shape) < 0.4] = -1
        slots[0] = -1
        src = rng.standard_normal((n_tok * 4, n)).astype(np.float32)
        shares, there = rng.random((n_tok, 4), np.float32), rng.standard_normal((n_tok, n)).astype(np.float32)
        terms = np.where(slots[:, :, None] >= 0, src[slots], 0).astype(np.float64) * shares[:, :, None]
        for add in (0, 1):
            out = Buffer(there)
            fields = {"src": Buffer(src), "out": out, "n": n, "n_used": 4, "segment": 32, "add": add}
            fields |= {"slots": Buffer(slots), "weights": Buffer(shares)}
            run(level, Op("combine", Combine, fields), n_threads=2, n_tok=n_tok)
            np.testing.assert_allclose(out.array, terms.sum(axis=1) + add * there, atol=2e-6)

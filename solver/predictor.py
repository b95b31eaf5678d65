"""Predictors of active neurons, the part that needs no PyTorch: targets, cut-offs, ranks, what a predictor costs.

A predictor scores neuron j as b_j . relu(a . x) on the FFN's normed input x (kind "dejavu": b_j . a . x), and says that
it is active where the score reaches the neuron's cut-off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..formats.section_file import Contents, SectionTensor
from ..formats.types import GGMLType
from .profile import LayerStats
from .transpose import decoded, encoded

STEP = 32  # ranks are multiples of this
SIZE_SHARE = 0.10  # of the model's parameters, the most that all predictors together may have
DEJAVU_RANK = 1000
_BISECTIONS = 18


@dataclass(frozen=True)
class Weights:
    """a float32 [rank, n_embd] and b float32 [n_ff, rank], exactly as they are stored."""

    kind: str
    a: np.ndarray
    b: np.ndarray

    def scores(self, x: np.ndarray) -> np.ndarray:
        """float32 [n_tok, n_ff] of normed inputs [n_tok, n_embd]."""
        middle = x @ self.a.T
        if self.kind == "relu":
            np.maximum(middle, 0, out=middle)
        result: np.ndarray = middle @ self.b.T
        return result


def rounded(kind: str, a: np.ndarray, b: np.ndarray, stored: GGMLType) -> Weights:
    """The weights after a round trip through the type in which they will be stored."""
    there_and_back = [decoded(encoded(np.ascontiguousarray(m, np.float32), stored), m.shape, stored) for m in (a, b)]
    return Weights(kind, *there_and_back)


@dataclass(frozen=True)
class Quality:
    """Of predictions on held-out tokens: shares of the active neurons found, of their squared output found, of the
    predicted neurons that are active, and of all neurons that are predicted and that are active."""

    recall: float
    energy: float
    precision: float
    predicted: float
    active: float


def quality(scores: np.ndarray, cut: np.ndarray, active: np.ndarray, energy: np.ndarray) -> Quality:
    """scores float32, active bool, energy float32, all [n_tok, n_ff]; cut float32 [n_ff]."""
    said = scores >= cut
    hit = said & active
    return Quality(
        recall=hit.sum() / max(1, active.sum()),
        energy=float(energy[hit].sum(dtype=np.float64) / max(1e-30, energy[active].sum(dtype=np.float64))),
        precision=hit.sum() / max(1, said.sum()),
        predicted=float(said.mean()),
        active=float(active.mean()),
    )


def choose_cuts(
    scores: np.ndarray, active: np.ndarray, energy: np.ndarray, recall: float, energy_recall: float
) -> np.ndarray:
    """Cut-offs float32 [n_ff] that predict as few neurons as they can and find these shares of the active ones.

    Every neuron takes the cut-off that maximises what it finds less a price for each prediction; the price is the same
    for all, found by bisection. Found counts 1 for an active neuron and its energy over the mean, so that a layer's few
    strong neurons weigh as much as its many weak ones.
    """
    n_tok = len(scores)
    order = np.argsort(-scores.T, axis=1, kind="stable")  # [n_ff, n_tok], likeliest first
    ordered = np.take_along_axis(scores.T, order, axis=1)
    live = active.sum(dtype=np.int64)
    strength = np.where(active, energy, 0).astype(np.float32)
    total = float(strength.sum(dtype=np.float64))
    count = _running(np.take_along_axis(active.T, order, axis=1).astype(np.float32))
    power = _running(np.take_along_axis(strength.T, order, axis=1) / np.float32(max(total / max(1, live), 1e-30)))
    ranks = np.arange(n_tok + 1, dtype=np.float32)
    gain = count + power

    def taken(price: float) -> np.ndarray:
        return np.argmax(gain - np.float32(price) * ranks, axis=1)[:, None]

    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        k = taken(price)
        found = np.take_along_axis(count, k, 1).sum(dtype=np.float64) / max(1, live)
        strong = np.take_along_axis(power, k, 1).sum(dtype=np.float64) / max(1, live)
        low, high = (price, high) if found >= recall and strong >= energy_recall else (low, price)
    k = taken(low)
    inner = np.take_along_axis(ordered, np.clip(np.hstack([k - 1, k]), 0, n_tok - 1), axis=1)
    cut = inner.mean(axis=1)
    cut[k[:, 0] == 0], cut[k[:, 0] == n_tok] = np.inf, -np.inf
    return cut.astype(np.float32)


def _running(values: np.ndarray) -> np.ndarray:
    """Running sums along the rows, from 0: float32 [n, m + 1]."""
    return np.concatenate([np.zeros((len(values), 1), np.float32), np.cumsum(values, axis=1, dtype=np.float32)], axis=1)


@dataclass(frozen=True)
class Prices:
    """Bytes that a token reads: for one rank of a layer's predictor, and for one predicted neuron."""

    rank: float
    neuron: float

    def of(self, rank: int, predicted: float, n_ff: int) -> float:
        """Bytes at a rank and a share of predicted neurons."""
        return rank * self.rank + predicted * n_ff * self.neuron


def first_rank(stats: LayerStats, n_embd: int) -> int:
    """Where the search starts: few for a layer that is sparse, and whose activations come from few neurons."""
    return max(STEP, round(n_embd * math.sqrt(stats.density) * stats.skew / STEP) * STEP)


def ladder(limit: int) -> list[int]:
    """The ranks that are tried: multiples of 32 up to a limit, in steps of at most an eighth above 256."""
    ranks = [STEP]
    while (following := ranks[-1] + max(STEP, ranks[-1] // 8 // STEP * STEP)) <= limit:
        ranks.append(following)
    return ranks


def search_rank(first: int, limit: int, cost: Callable[[int], float]) -> int:
    """The rank, at most `limit`, whose cost is least: from `first`, grow or shrink as long as that is cheaper.

    With limit below 32, 32 all the same: there is no smaller predictor.
    """
    ranks = ladder(limit)
    known: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in known:
            known[place] = cost(ranks[place])
        return known[place]

    here = min(range(len(ranks)), key=lambda place: abs(ranks[place] - first))
    for direction in (1, -1):
        start = here
        while 0 <= here + direction < len(ranks) and at(here + direction) < at(here):
            here += direction
        if here != start:
            break
    return ranks[here]


@dataclass(frozen=True)
class Trained:
    """A layer's predictor as it is stored: a and b as bytes, cut float32 [n_ff]; quality on tokens it never saw."""

    rank: int
    a: np.ndarray
    b: np.ndarray
    cut: np.ndarray
    quality: Quality

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + self.cut.nbytes


def contents(layers: Sequence[Trained], kind: str, stored: GGMLType, n_embd: int) -> Contents:
    """Predictors of all layers as a part of a section."""
    tensors = []
    for n, layer in enumerate(layers):
        shapes = {"a": (n_embd, layer.rank), "b": (layer.rank, len(layer.cut))}
        for name, data in (("a", layer.a), ("b", layer.b)):
            tensors.append(
                SectionTensor(f"blk.{n}.ffn_pred_{name}.weight", shapes[name], stored, partial(data.view, np.uint8))
            )
        cut = np.ascontiguousarray(layer.cut, "<f4")
        tensors.append(SectionTensor(f"blk.{n}.ffn_pred_cut", cut.shape, GGMLType.F32, partial(cut.view, np.uint8)))
    return Contents({"hotcold.predictor.kind": kind, "hotcold.predictor.input": "ffn_norm"}, tensors)

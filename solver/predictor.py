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

STEP = 32  # ranks are multiples of this
SIZE_SHARE = 0.10  # of the model's parameters, the most that all predictors together may have
DEJAVU_RANK = 1000
PRICES = tuple(float(price) for price in np.geomspace(1, 1e-6, 41))  # of a prediction, see choices
PRESENCE = 0.05


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


@dataclass(frozen=True)
class Quality:
    """Of predictions on held-out tokens: shares of the active neurons found, of their squared output found, of the
    predicted neurons that are active, and of all neurons that are predicted and that are active."""

    recall: float
    energy: float
    precision: float
    predicted: float
    active: float


def quality(scores: np.ndarray, cut: np.ndarray, truth: Truth) -> Quality:
    """Of scores float32 [n_tok, n_ff] with cut-offs float32 [n_ff]."""
    said, active, energy = scores >= cut, truth.active, truth.energy
    hit = said & active
    return Quality(
        recall=hit.sum() / max(1, active.sum()),
        energy=float(energy[hit].sum(dtype=np.float64) / max(1e-30, energy[active].sum(dtype=np.float64))),
        precision=hit.sum() / max(1, said.sum()),
        predicted=float(said.mean()),
        active=float(active.mean()),
    )


@dataclass(frozen=True)
class Truth:
    """What the neurons of a layer really did on some tokens: active bool and energy float32, [n_tok, n_ff].

    Energy is what it costs to miss a neuron: its squared output over that of the whole residual after the layer.
    """

    active: np.ndarray
    energy: np.ndarray


@dataclass(frozen=True)
class Choice:
    """Cut-offs float32 [n_ff] that one price leads to, and what they predict and find on the tokens they come from."""

    cut: np.ndarray
    found: int
    strong: float
    predicted: int


@dataclass(frozen=True)
class Choices:
    """A layer's choices, one for each of PRICES, and what there was to be found: active neurons, and their energy."""

    by_price: list[Choice]
    live: int
    energy: float


def choices(scores: np.ndarray, truth: Truth) -> Choices:
    """For each price: the cut-offs that maximise what is found less the price for each prediction.

    Found counts an active neuron's energy (times n_ff, so that an average one has about 1) and a little for its mere
    presence, so that weak neurons are found as well where that is cheap.
    """
    n_tok, n_ff = scores.shape
    order = np.argsort(-scores.T, axis=1, kind="stable")  # [n_ff, n_tok], likeliest first
    ordered = np.take_along_axis(scores.T, order, axis=1)
    strength = np.where(truth.active, truth.energy, 0).astype(np.float32)
    count = _running(np.take_along_axis(truth.active.T, order, axis=1).astype(np.float32))
    power = _running(np.take_along_axis(strength.T, order, axis=1))
    gain = power * np.float32(n_ff) + count * np.float32(PRESENCE)
    ranks = np.arange(n_tok + 1, dtype=np.float32)
    made = []
    for price in PRICES:
        k = np.argmax(gain - np.float32(price) * ranks, axis=1)[:, None]
        cut = np.take_along_axis(ordered, np.clip(np.hstack([k - 1, k]), 0, n_tok - 1), axis=1).mean(axis=1)
        cut[k[:, 0] == 0], cut[k[:, 0] == n_tok] = np.inf, -np.inf
        found, strong = (float(np.take_along_axis(part, k, 1).sum(dtype=np.float64)) for part in (count, power))
        made.append(Choice(cut.astype(np.float32), int(found), strong, int(k.sum())))
    return Choices(made, int(truth.active.sum()), float(strength.sum(dtype=np.float64)))


def settle(layers: Sequence[Choices], recall: float, energy: float) -> int:
    """Number of the highest price at which the layers together find these shares of what is active, and of its energy.

    One price for all layers spends predictions where they matter most. The lowest price where none is enough.
    """
    live, total = sum(layer.live for layer in layers), sum(layer.energy for layer in layers)
    for number in range(len(PRICES)):
        found = sum(layer.by_price[number].found for layer in layers)
        strong = sum(layer.by_price[number].strong for layer in layers)
        if found >= recall * live and strong >= energy * total:
            return number
    return len(PRICES) - 1


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

"""Thresholds on |act(gate)| by layer, for a wanted density: which neurons a model can do without.

One pass over real text keeps, for each layer, a histogram of |act(gate)| and of the error that dropping costs; any
number of densities is then read off it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..formats.config import ModelConfig
from ..formats.gguf import GGUFFile
from ..formats.section_file import Contents, SectionTensor
from ..formats.types import GGMLType
from . import transpose
from .corpus import N_CTX, Corpus
from .neurons import ACTIVATIONS, Rule, energy, hidden, post_norm, projections

if TYPE_CHECKING:
    from ..runtime.engine import Engine

DENSITIES = (0.7, 0.5, 0.4, 0.3)
# A bin is a float32's exponent and the first 11 bits of its fraction, from 2^-20 to 2^10: steps of at most 0.05 %, in
# order of size. What is smaller, zeros above all, is in the first bin, what is larger in the last.
_SHIFT = 12
_LOWEST = int(np.float32(2**-20).view(np.uint32)) >> _SHIFT
_BINS = 30 << 11
_BISECTIONS = 60


@dataclass
class Histograms:
    """Over all tokens: count[layer, bin] of neurons, and error[layer, bin], the squared error of dropping them.

    The error of one neuron is its energy (neurons.energy) over the mean square of the token's residual.
    """

    count: np.ndarray
    error: np.ndarray
    tokens: int = 0


def collect(
    engine: Engine,
    corpus: Corpus,
    down_norms: np.ndarray,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Histograms:
    """Run the corpus; down_norms: float32 [n_layer, n_ff], the length of each neuron's column of ffn_down."""
    config = engine.config
    post = [post_norm(engine.file, config, layer) for layer in range(config.n_layer)]
    found = Histograms(np.zeros((config.n_layer, _BINS), np.int64), np.zeros((config.n_layer, _BINS)))

    def see(layer: int, x: np.ndarray, f: np.ndarray, gate: np.ndarray, up: np.ndarray) -> None:
        size = np.abs(ACTIVATIONS[config.activation](gate))
        bins = _bins(size).ravel()
        found.count[layer] += np.bincount(bins, minlength=_BINS)
        h = hidden(config.activation, gate, up, config.activation_floors[layer])
        error = energy(h, down_norms[layer], post[layer])
        error /= np.square(x).mean(axis=1, keepdims=True) + np.float32(1e-12)
        found.error[layer] += np.bincount(bins, error.ravel(), _BINS)

    for window in corpus.windows(min(N_CTX, engine.n_ctx)):
        sequence = engine.new_sequence()
        try:
            engine.observe(sequence, window, see)
        finally:
            sequence.close()
        found.tokens += len(window)
        progress(found.tokens)
    return found


def equal(found: Histograms, density: float) -> np.ndarray:
    """Thresholds float32 [n_layer] that leave every layer `density` of its neurons."""
    below = np.cumsum(found.count, axis=1)
    dropped = (1 - density) * below[:, -1:]
    return _edges((below < dropped).sum(axis=1) + _nearer(below, dropped))


def _nearer(below: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """1 where dropping the bin at the quantile too comes nearer to what is wanted, else 0."""
    at = (below < wanted).sum(axis=1, keepdims=True)
    low = np.where(at > 0, np.take_along_axis(below, np.maximum(at - 1, 0), axis=1), 0)
    high = np.take_along_axis(below, at, axis=1)
    return (high - wanted < wanted - low)[:, 0].astype(np.int64)


def cheapest(found: Histograms, density: float) -> np.ndarray:
    """Thresholds float32 [n_layer] of that mean density over all layers with the least error in all.

    Every layer minimises error + price * neurons kept, with one price for all, found by bisection. Errors of later
    layers count more, by the root of the layer's number: fewer layers are left to mend them. On SmolLM2 (8,192 tokens,
    perplexity 30.0) densities of 0.7, 0.5 and 0.3 gave 32.5, 37.6 and 77 so, 32.5, 38.2 and 86 without that factor,
    and 32.2, 38.8 and 82 with the same density in every layer.
    """
    total = found.count.sum(axis=1, keepdims=True)
    zero = np.zeros((len(total), 1))
    kept = np.hstack([total, total - np.cumsum(found.count, axis=1)])  # kept[:, k]: with the first k bins dropped
    late = np.sqrt(np.arange(1, len(total) + 1))[:, None]
    error = np.hstack([zero, np.cumsum(found.error, axis=1) * late])
    low, high = 0.0, float(error[:, -1].max()) + 1.0
    for _ in range(_BISECTIONS):
        price = np.sqrt(low * high) if low > 0 else high / 2**20
        first = np.argmin(error + price * kept, axis=1)
        share = np.take_along_axis(kept, first[:, None], axis=1).sum() / total.sum()
        low, high = (price, high) if share > density else (low, price)
    few, many = (np.argmin(error + price * kept, axis=1) for price in (high, low))
    # Prices in between there are none: what is left of the density goes to one layer after the other.
    left = density * total.sum() - np.take_along_axis(kept, few[:, None], axis=1).sum()
    for layer in np.flatnonzero(many < few):
        now, most = kept[layer, few[layer]], kept[layer, many[layer]]
        if most - now > left:
            few[layer] = np.searchsorted(-kept[layer], -(now + left))
            break
        few[layer], left = many[layer], left - (most - now)
    return _edges(few)


def _bins(size: np.ndarray) -> np.ndarray:
    """The bins (int64) of values from zero up."""
    bits = np.ascontiguousarray(size, np.float32).view(np.uint32) >> np.uint32(_SHIFT)
    return np.clip(bits.astype(np.int64) - _LOWEST, 0, _BINS - 1)


def _edges(first: np.ndarray) -> np.ndarray:
    """The thresholds that drop all bins before `first` [n_layer]: the float32 just below that bin; 0 before bin 2."""
    bits = (first + _LOWEST).astype(np.uint32) << np.uint32(_SHIFT)
    return np.where(first > 1, np.nextafter(bits.view(np.float32), np.float32(0)), np.float32(0))


def densities(found: Histograms, thresholds: np.ndarray) -> np.ndarray:
    """The share of neurons that these thresholds leave, by layer: float64 [n_layer]; exact for ours."""
    first = np.minimum(_bins(np.asarray(thresholds)) + 1, _BINS - 1)
    kept = np.cumsum(found.count[:, ::-1], axis=1)[:, ::-1]
    share: np.ndarray = np.take_along_axis(kept, first[:, None], axis=1)[:, 0]
    return share / np.maximum(1, found.count.sum(axis=1))


def rule(found: Histograms, activation: str, density: float) -> Rule:
    """The threshold rule of one density."""
    return Rule(activation, density, cheapest(found, density))


def table(found: Histograms, wanted: Sequence[float], how: Callable[[Histograms, float], np.ndarray]) -> np.ndarray:
    """Thresholds float32 [n_densities, n_layer] by one of the two ways above."""
    return np.array([how(found, density) for density in wanted], np.float32)


def contents(wanted: Sequence[float], values: np.ndarray) -> Contents:
    """Thresholds float32 [n_densities, n_layer] for densities, descending, as a part of a section."""
    data = np.ascontiguousarray(values, "<f4")
    tensor = SectionTensor("ffn_thresholds", data.shape[::-1], GGMLType.F32, partial(data.view, np.uint8))
    return Contents({"hotcold.threshold.densities": [float(density) for density in wanted]}, [tensor])


@dataclass(frozen=True)
class Reads:
    """Bytes of FFN weights that one token reads: `always`, and the others for active neurons only."""

    always: int
    others: int
    dense: int

    def at(self, density: float) -> float:
        """Bytes at a share of active neurons."""
        return self.always + density * self.others


def reads(file: GGUFFile, config: ModelConfig, kind: GGMLType | None = None) -> Reads:
    """Of all layers together; kind: of ffn_down_t, see transpose.contents."""
    layers = range(config.n_layer)
    first, *second = (sum(file.info(f"blk.{n}.{part}.weight").nbytes for n in layers) for part in projections(config))
    down = sum(file.info(f"blk.{n}.ffn_down.weight").nbytes for n in layers)
    down_t = sum(tensor.nbytes for tensor in transpose.contents(file, config, kind).tensors)
    return Reads(first, sum(second) + down_t, first + sum(second) + down)

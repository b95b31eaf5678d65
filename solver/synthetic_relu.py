"""Synthetic ReLU models whose neurons are active at a prescribed rate, with predictors that know it.

Channel 0 of the residual stream holds a constant that no layer changes, so a weight on it is a bias: the gate of neuron
j is B[j] . (A f) + bias[j] with A f of unit variance, and bias[j] puts it above zero as often as wanted. Rates fall
with a power of the neuron's rank, as in real models. A and B are the predictor.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import ParameterError
from ..formats.section_file import Contents, SectionTensor
from ..formats.types import GGMLType
from .synthetic import Shape, tensors

Floats = NDArray[np.float32]

ENCODED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # types that gguf can write
_CONSTANT = 4.0  # the residual's RMS over that of its other channels
_GROWTH = 0.15  # what a layer's FFN adds to the residual, over the embedding; attention adds less
_NORMAL = NormalDist()
_HIGHEST = 0.98  # rate of the most active neurons
_MARGIN = 0.1  # by which a predictor's cut is below zero, in standard deviations: quantised gates differ a little


class ReluWeights:
    """The tensors of a synthetic ReLU llama model and of its section.

    active: mean share of active neurons. skew: rates are proportional to rank ** -skew. rank: of the predictors, half
    of it for positive and half for negative parts. The same arguments give the same bytes.
    """

    def __init__(self, shape: Shape, active: float, skew: float, rank: int, seed: int) -> None:
        if shape.kind.name not in ENCODED:
            wanted = f"wanted one of {', '.join(ENCODED)}"
            raise ParameterError(f"type of a ReLU model: got {shape.kind.name}, {wanted}")
        if not 0.001 <= active <= 0.9:
            raise ParameterError(f"active: got {active:g}, wanted a share from 0.001 to 0.9")
        if not 0.0 <= skew <= 4.0:
            raise ParameterError(f"skew: got {skew:g}, wanted a power from 0 to 4")
        if rank % 64 or not 64 <= rank <= 2 * shape.n_embd:
            raise ParameterError(f"rank: got {rank}, wanted a multiple of 64 up to twice n_embd = {shape.n_embd}")
        self.shape, self.rank, self.seed = shape, rank, seed
        self.rates = _rates(shape.n_ff, active, skew)
        # Mean square of a rectified normal gate of each rate: (b^2 + 1) Phi(b) + b phi(b) at bias b.
        biases = np.array([_NORMAL.inv_cdf(rate) for rate in self.rates])
        squares = (biases**2 + 1) * self.rates + biases * np.array([_NORMAL.pdf(bias) for bias in biases])
        self._biases, self._square = biases.astype(np.float32), float(squares.mean())

    def tensors(self) -> Iterator[np.ndarray]:
        """Every tensor's data in the order of synthetic.tensors(): uint8 rows, or float32 norms."""
        for name, n_rows, n_cols in tensors(self.shape):
            yield self._encode(self._matrix(name, n_rows, n_cols)) if n_rows else self._norm(name, n_cols)

    def section(self) -> Contents:
        """Transposed down-projections in the model's type, and predictors."""
        s, kind = self.shape, self.shape.kind
        found = []
        for layer in range(s.n_layer):
            made = (
                ("ffn_down_t.weight", (s.n_embd, s.n_ff), partial(self._down_t, layer)),
                ("ffn_pred_a.weight", (s.n_embd, self.rank), partial(self._pred_a, layer)),
                ("ffn_pred_b.weight", (self.rank, s.n_ff), partial(self._pred_b, layer)),
            )
            for name, size, make in made:
                data = partial(lambda make: self._encode(make()).reshape(-1), make)
                found.append(SectionTensor(f"blk.{layer}.{name}", size, kind, data))
            cut = partial(lambda layer: (-_MARGIN - self._bias(layer)).view(np.uint8), layer)
            found.append(SectionTensor(f"blk.{layer}.ffn_pred_cut", (s.n_ff,), GGMLType.F32, cut))
        return Contents({"hotcold.predictor.kind": "relu", "hotcold.predictor.input": "ffn_norm"}, found)

    def _random(self, what: str, layer: int, *size: int) -> Floats:
        key = [self.seed, layer + 1, *what.encode()]
        return np.random.default_rng(key).standard_normal(size, np.float32)

    def _norm(self, name: str, n: int) -> Floats:
        """Weights that bring the other channels to unit variance, and the constant to 1 for the FFN, 0 elsewhere."""
        weight = np.full(n, _CONSTANT, np.float32)
        weight[0] = _CONSTANT / ((_CONSTANT**2 - 1) * n) ** 0.5 if name.endswith("ffn_norm.weight") else 0.0
        return weight

    def _matrix(self, name: str, n_rows: int, n_cols: int) -> Floats:
        block, _, rest = name.partition(".ffn_")
        layer = int(block.split(".")[1]) if name.startswith("blk.") else -1
        if rest == "gate.weight":
            a, b = self._factors(layer)
            weights = b @ a
            weights[:, 0] = self._bias(layer)
            return weights
        if rest == "down.weight":
            return np.ascontiguousarray(self._down_t(layer).T)
        weights = self._random(name, layer, n_rows, n_cols) * np.float32(n_cols**-0.5)
        if name == "token_embd.weight":
            weights[:, 0] = (_CONSTANT**2 - 1) ** 0.5  # its square, over n, is that much more than the others' mean
        elif name.endswith("attn_output.weight"):
            weights *= np.float32(_GROWTH * n_cols**-0.5)
            weights[0] = 0
        return weights

    def _factors(self, layer: int) -> tuple[Floats, Floats]:
        """A [rank / 2, n_embd] and B [n_ff, rank / 2]; A does not see the constant."""
        half, s = self.rank // 2, self.shape
        a = self._random("a", layer, half, s.n_embd) * np.float32(s.n_embd**-0.5)
        a[:, 0] = 0
        return a, self._random("b", layer, s.n_ff, half) * np.float32(half**-0.5)

    def _bias(self, layer: int) -> Floats:
        """What puts each neuron's gate above zero at its rate; other channels grow a little from layer to layer."""
        order = np.random.default_rng([self.seed, layer]).permutation(len(self._biases))
        return self._biases[order] * np.float32(self._deviation(layer))

    def _deviation(self, layer: int) -> float:
        """Of the normed channels at a layer, over those of the first."""
        return (1 + layer * _GROWTH**2) ** 0.5

    def _down_t(self, layer: int) -> Floats:
        s = self.shape
        scale = _GROWTH / (s.n_embd * s.n_ff * self._square) ** 0.5 / self._deviation(layer) ** 2
        weights = self._random("down", layer, s.n_ff, s.n_embd) * np.float32(scale)
        weights[:, 0] = 0
        return weights

    def _pred_a(self, layer: int) -> Floats:
        a, _ = self._factors(layer)
        return np.concatenate([a, -a])

    def _pred_b(self, layer: int) -> Floats:
        _, b = self._factors(layer)
        return np.concatenate([b, -b], axis=1)

    def _encode(self, weights: Floats) -> np.ndarray:
        """uint8 (rows, bytes of a row)."""
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType(self.shape.kind)
        return np.ascontiguousarray(quants.quantize(weights, kind)).view(np.uint8).reshape(len(weights), -1)


def _rates(n: int, active: float, skew: float) -> NDArray[np.float64]:
    """n rates, proportional to rank ** -skew up to the highest, whose mean is `active`."""
    falling = np.arange(1, n + 1) ** -skew
    low, high = 0.0, n / falling[-1]
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(middle * falling, _HIGHEST).mean() < active else (low, middle)
    return np.minimum(low * falling, _HIGHEST)

"""What neurons do, in NumPy: when one counts as active (the rules of the run-time modes), and what it adds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..formats.config import ModelConfig
from ..formats.errors import ParameterError
from ..formats.gguf import GGUFFile

EXPERTS = "experts"  # the rule's name of a mixture of experts: its neurons are active where their expert is chosen
RELUS = ("relu", "relu2", "drelu")  # of these, gates up to zero give exactly zero


def _silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) may be inf, and x / inf is the right 0
        return x / (1 + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


def _gelu_erf(x: np.ndarray) -> np.ndarray:
    """x * Phi(x), by Abramowitz and Stegun's 7.1.26: absolute error below 2e-7 |x|."""
    z = np.abs(x) * np.float32(math.sqrt(0.5))
    t = 1 / (np.float32(0.3275911) * z + 1)
    tail = np.zeros_like(t)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = (tail + np.float32(factor)) * t
    tail *= np.exp(-z * z) * np.float32(0.5)  # 1 - Phi(|x|)
    return x * np.where(x < 0, tail, 1 - tail)


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, np.float32(0))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_erf": _gelu_erf,
    "relu": _relu,
    "relu2": lambda x: np.square(_relu(x)),
    "drelu": _relu,
}


def projections(config: ModelConfig) -> tuple[str, ...]:
    """Names of the matrices that a neuron's input meets: the one that decides whether it is active, then the other."""
    return ("ffn_gate", "ffn_up") if config.gated else ("ffn_up",)


def hidden(activation: str, gate: np.ndarray, up: np.ndarray, floor: float = 0.0) -> np.ndarray:
    """What meets ffn_down: float32 act(gate) * up; 0 where act(gate) does not reach the layer's floor."""
    value = ACTIVATIONS[activation](gate)
    if floor:
        value = np.where(np.abs(value) >= np.float32(floor), value, np.float32(0))
    return value * (_relu(up) if activation == "drelu" else up)


def post_norm(file: GGUFFile, config: ModelConfig, layer: int) -> float:
    """What a norm makes of the FFN's output before it is added, as a sum of squares; 0 where there is none."""
    if not config.has("post_ffw_norm.weight"):
        return 0.0
    return float(np.square(file.dequantized(f"blk.{layer}.post_ffw_norm.weight")).sum())


def energy(h: np.ndarray, down_norms: np.ndarray, post: float) -> np.ndarray:
    """What each neuron adds to the residual, squared, float32 [n_tok, n_ff], as if ffn_down's columns were orthogonal.

    h: what meets ffn_down. down_norms: float32 [n_ff], the lengths of its columns. post: as post_norm says.
    """
    added: np.ndarray = np.square(h * down_norms)
    if post:
        added *= np.float32(post) / np.maximum(added.sum(axis=1, keepdims=True), np.float32(1e-30))
    return added


@dataclass(frozen=True)
class Rule:
    """`exact`: the gate is above zero and, activated, reaches the layer's floor, if it has one; with a density:
    |act(gate)| is above the layer's threshold for it.

    Of an FFN without a gate, the up projection is meant. by_expert: instead, its expert is chosen. floors: by layer.
    """

    activation: str
    density: float | None = None
    thresholds: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))  # float32 [n_layer]
    by_expert: bool = False
    floors: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """As the section says it."""
        if self.by_expert:
            return EXPERTS
        return "exact" if self.density is None else f"threshold={self.density:g}"

    def active(self, layer: int, gate: np.ndarray) -> np.ndarray:
        """Which of the raw gates [n_tok, n_ff] belong to active neurons: bool, of the same shape."""
        if self.density is None:
            floor = self.floors[layer] if self.floors else 0.0
            if floor:
                return np.greater_equal(ACTIVATIONS[self.activation](gate), np.float32(floor))
            return np.greater(gate, np.float32(0))
        return np.greater(np.abs(ACTIVATIONS[self.activation](gate)), self.thresholds[layer])


def exact(activation: str, floors: tuple[float, ...] = ()) -> Rule:
    """The rule of models with zeros, with their layers' floors; ParameterError for an activation that has none."""
    if activation not in RELUS:
        wanted = "--threshold D, as only ReLU models have neurons that are exactly zero"
        raise ParameterError(f"rule exact: got a model with {activation.upper()}, wanted {wanted}")
    return Rule(activation, floors=floors)

"""When a neuron counts as active, in NumPy: the rules of the run-time modes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..formats.errors import ParameterError

RELUS = ("relu", "relu2", "drelu")  # of these, gates up to zero give exactly zero


def _silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) may be inf, and x / inf is the right 0
        return x / (1 + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, np.float32(0))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": _silu,
    "gelu": _gelu,
    "relu": _relu,
    "relu2": lambda x: np.square(_relu(x)),
    "drelu": _relu,
}


def hidden(activation: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """What meets ffn_down: float32 act(gate) * up."""
    return ACTIVATIONS[activation](gate) * (_relu(up) if activation == "drelu" else up)


@dataclass(frozen=True)
class Rule:
    """`exact`: the gate is above zero; with a density: |act(gate)| is above the layer's threshold for it."""

    activation: str
    density: float | None = None
    thresholds: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))  # float32 [n_layer]

    @property
    def name(self) -> str:
        """As the section says it."""
        return "exact" if self.density is None else f"threshold={self.density:g}"

    def active(self, layer: int, gate: np.ndarray) -> np.ndarray:
        """Which of the raw gates [n_tok, n_ff] belong to active neurons: bool, of the same shape."""
        if self.density is None:
            return np.greater(gate, 0)
        return np.greater(np.abs(ACTIVATIONS[self.activation](gate)), self.thresholds[layer])


def exact(activation: str) -> Rule:
    """The rule of models with zeros; ParameterError for an activation that has none."""
    if activation not in RELUS:
        wanted = "--threshold D, as only ReLU models have neurons that are exactly zero"
        raise ParameterError(f"rule exact: got a model with {activation.upper()}, wanted {wanted}")
    return Rule(activation)

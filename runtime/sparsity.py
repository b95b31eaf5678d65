"""Which neurons of an FFN a step computes: the modes that a user may ask for, and the plan for a model.

exact: those whose activation is not zero. threshold: those whose |act(gate)| reaches the layer's threshold, chosen
for a density. predict: those that a small predictor expects to be active. The last two change the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from ..formats.config import ModelConfig
from ..formats.errors import ParameterError
from ..formats.section import Section

MODES = "auto, dense, exact, threshold=D (0 < D <= 1) or predict"
ZEROS = ("relu", "relu2", "drelu")  # activations that are exactly zero for a gate below zero
_SMALLEST = float(np.finfo(np.float32).tiny)
# The longest list of neurons, as a share of all, for which one token is computed sparsely; measured (BENCHMARKS.md).
CROSSOVER = 0.7


@dataclass(frozen=True)
class Sparsity:
    """A mode as asked for; density only counts for "threshold"."""

    kind: str
    density: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Sparsity:
        """From `auto`, `dense`, `exact`, `threshold=D` or `predict`; ParameterError for anything else."""
        kind, _, value = text.strip().lower().partition("=")
        if kind in ("auto", "dense", "exact", "predict") and not value:
            return cls(kind)
        try:
            density = float(value)
        except ValueError:
            density = 0.0
        if kind != "threshold" or not 0.0 < density <= 1.0:
            raise ParameterError(f"sparsity: got {text!r:.40}, wanted {MODES}")
        return cls(kind, density)

    def __str__(self) -> str:
        return f"{self.kind}={self.density:g}" if self.kind == "threshold" else self.kind


@dataclass(frozen=True)
class Plan:
    """How a model's FFNs are computed sparsely; layers without a plan are dense.

    thresholds: by layer, of |act(gate)|. predictor: "relu" or "dejavu", or "" where gates decide; predictor_input:
    "ffn_norm" or "residual". limit: the most neurons a sparse step may list. dense_from_t: dense steps use ffn_down_t
    too, because the section brought it and its rounding is not quite that of ffn_down.
    """

    sparsity: Sparsity
    thresholds: tuple[float, ...]
    limit: int
    predictor: str = ""
    predictor_input: str = "ffn_norm"
    dense_from_t: bool = False


def gate_range(activation: str, threshold: float) -> tuple[float, float, float]:
    """(low, high, top): |act(x)| >= threshold where x >= top or low <= x <= high; (inf, inf, top): only from top on."""
    if threshold <= 0:
        return math.inf, math.inf, -math.inf
    if activation in ZEROS:
        return math.inf, math.inf, math.sqrt(threshold) if activation == "relu2" else threshold
    act, dip = _GATES[activation], _dip(activation)
    top = _bisect(lambda x: act(x) >= threshold, 0.0, 2 * threshold + 1)
    if -act(dip) < threshold:
        return math.inf, math.inf, top
    low = _bisect(lambda x: -act(x) >= threshold, -100.0, dip)
    return low, -_bisect(lambda x: -act(-x) >= threshold, 0.0, -dip), top


def _silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def _gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _gelu_erf(x: float) -> float:
    return 0.5 * x * math.erfc(-x / math.sqrt(2))  # erfc, because 1 + erf is rounded to nothing far below zero


_GATES = {"silu": _silu, "gelu": _gelu, "gelu_erf": _gelu_erf}


@cache
def _dip(activation: str) -> float:
    """Where the activation is least: below zero all dip to one minimum, between -5 and 0, and come back."""
    return float(min(np.linspace(-5.0, 0.0, 5001), key=_GATES[activation]))


def _bisect(holds: Callable[[float], bool], no: float, yes: float) -> float:
    """Where a condition begins to hold on the way from `no` to `yes`."""
    for _ in range(60):
        middle = (no + yes) / 2
        no, yes = (no, middle) if holds(middle) else (middle, yes)
    return yes


def plan(wanted: Sparsity, config: ModelConfig, section: Section | None) -> Plan | None:
    """The plan for a model, or None for a dense one.

    auto is exact where activations have zeros, and else dense. For a model that may run exact and whose section brings
    ffn_down_t, dense is a plan too, one that lists all neurons: so both compute with the same weights. Of a mixture of
    experts, exact is dense: those that are not chosen are exactly zero. ParameterError if the model or its section does
    not have what the mode needs.
    """
    if config.n_expert:
        return _mixture(wanted, config, section)
    zeros = config.activation in ZEROS
    if wanted.kind == "auto":
        wanted = Sparsity("exact" if zeros else "dense")
    from_section = section is not None and section.has_down_t()
    if wanted.kind == "dense":
        same = from_section and zeros
        return everything(config) if same else None
    limit = config.n_ff if from_section else int(CROSSOVER * config.n_ff)
    exact = tuple(max(floor, _SMALLEST if zeros else 0.0) for floor in config.activation_floors)
    if wanted.kind == "exact":
        if not zeros:
            raise ParameterError(
                f"sparsity: got exact, but {config.activation} is never zero in {config.name!r:.60}; "
                f"wanted auto, dense or threshold=D, or a model made by `hotcold relufy`"
            )
        return Plan(wanted, exact, limit, dense_from_t=from_section)
    if wanted.kind == "threshold":
        return Plan(wanted, _thresholds(wanted.density, section, config), limit, dense_from_t=from_section)
    predictors = section.predictors() if section else None
    if predictors is None:
        raise ParameterError(
            "sparsity: got predict, but the model has no predictors; `hotcold train-predictor` makes them"
        )
    return Plan(wanted, exact, limit, predictors.kind, predictors.input, from_section)


def _mixture(wanted: Sparsity, config: ModelConfig, section: Section | None) -> Plan | None:
    """Of a mixture of experts: only a threshold asks for more than its router does."""
    if wanted.kind == "predict":
        raise ParameterError(
            f"sparsity: got predict, but {config.name!r:.60} is a mixture of experts, whose router picks the neurons; "
            f"wanted auto, dense, exact or threshold=D"
        )
    if wanted.kind == "threshold":
        return Plan(wanted, _thresholds(wanted.density, section, config), config.n_ff)
    return None


def everything(config: ModelConfig) -> Plan:
    """The plan that lists every neuron: dense, computed by neurons."""
    return Plan(Sparsity("dense"), config.activation_floors, config.n_ff, dense_from_t=True)


def _thresholds(density: float, section: Section | None, config: ModelConfig) -> tuple[float, ...]:
    """Each layer's threshold at a density, interpolated between those that the section has."""
    table = section.thresholds() if section else None
    if table is None:
        raise ParameterError(
            f"sparsity: got threshold={density:g}, but the model has no thresholds; `hotcold sparsify` makes them"
        )
    known = np.concatenate([[1.0], table.densities]).astype(np.float64)  # at density 1 nothing is left out
    values = np.vstack([np.zeros((1, table.values.shape[1])), table.values])
    if np.float32(density) < np.float32(known.min()):  # 0.3 is not quite what float32 makes of it
        raise ParameterError(
            f"sparsity: got threshold={density:g}, wanted at least {known.min():g}, the lowest density that "
            f"`hotcold sparsify` was run for; run it with --density {density:g}"
        )
    order = np.argsort(known)
    chosen = (float(np.interp(density, known[order], layer[order])) for layer in values.T)
    return tuple(map(max, chosen, config.activation_floors))

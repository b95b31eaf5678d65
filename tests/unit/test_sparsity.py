"""Which neurons count as active, and what a model and its section make of the mode that is asked for."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import naive
import numpy as np
import pytest

from hotcold.formats.errors import ParameterError
from hotcold.formats.section import Predictors, Thresholds
from hotcold.runtime.sparsity import CROSSOVER, Plan, Sparsity, gate_range, plan

N_LAYER, N_FF = 3, 1000
TINY = float(np.finfo(np.float32).tiny)
# Around the depths of the dips of silu, 0.2785, and of both forms of gelu, 0.1700, as well
THRESHOLDS = [*np.geomspace(1e-6, 30, 60), 0.1699, 0.17, 0.1701, 0.2784, 0.2785, 0.2786]


def gates() -> np.ndarray:
    """float64: a fine grid, the places of the dips, and numbers near and far from zero."""
    near = np.geomspace(1e-9, 1, 2000)
    far = np.geomspace(1, 1000, 500)
    dips = np.concatenate([at + np.linspace(-1e-3, 1e-3, 2001) for at in (-1.2784645, -0.7524614, -0.7517916)])
    return np.unique(np.concatenate([np.linspace(-30, 30, 60001), near, -near, far, -far, dips, [0.0]]))


@pytest.mark.parametrize("name", naive.ACTIVATIONS)
def test_gate_range_is_where_the_activation_is_large(name: str) -> None:
    x = gates()
    size = np.abs(naive.ACTIVATIONS[name](x))
    for threshold in THRESHOLDS:
        low, high, top = gate_range(name, float(threshold))
        inside = (x >= top) | ((low <= x) & (x <= high))
        clear = np.abs(size - threshold) > 1e-12 + 1e-9 * threshold
        assert clear.sum() > len(x) - 10
        np.testing.assert_array_equal(inside[clear], (size >= threshold)[clear], str(threshold))


@pytest.mark.parametrize("name", naive.ACTIVATIONS)
@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_every_gate_reaches_a_threshold_of_zero(name: str, threshold: float) -> None:
    assert gate_range(name, threshold)[2] == -math.inf


@pytest.mark.parametrize("name", ["relu", "drelu", "relu2"])
def test_rectified_gates_have_one_bound(name: str) -> None:
    assert gate_range(name, 0.25) == (math.inf, math.inf, 0.5 if name == "relu2" else 0.25)
    low, _, top = gate_range(name, TINY)
    assert low == math.inf and 0 < top < 1e-18 and np.float32(top) > 0  # a zero gate is not active


@pytest.mark.parametrize(("name", "depth"), [("silu", 0.2784645), ("gelu", 0.1700407), ("gelu_erf", 0.1699712)])
def test_the_dip_below_zero_counts_as_deep_as_it_is(name: str, depth: float) -> None:
    low, high, top = gate_range(name, 0.9 * depth)
    assert -3 < low < high < 0 < top
    low, high, top = gate_range(name, 0.9999 * depth)
    assert low < high and high - low < 0.1
    assert gate_range(name, 1.0001 * depth)[:2] == (math.inf, math.inf)


# --- plans ---


def config(activation: str, n_expert: int = 0) -> Any:
    sizes = {"n_layer": N_LAYER, "n_ff": N_FF, "n_expert": n_expert}
    return SimpleNamespace(activation=activation, activation_floors=(0.0,) * N_LAYER, name="m", **sizes)


class Section:
    """What a plan asks of a section."""

    def __init__(self, down_t: bool = False, thresholds: Thresholds | None = None, **predictors: str) -> None:
        self.has_down_t, self.thresholds = lambda: down_t, lambda: thresholds
        found = Predictors(**predictors, ranks=(32,) * N_LAYER) if predictors else None
        self.predictors = lambda: found


def planned(mode: str, activation: str, section: Any = None) -> Plan | None:
    return plan(Sparsity.parse(mode), config(activation), section)


@pytest.mark.parametrize("section", [None, Section()])
def test_plans_without_down_t(section: Any) -> None:
    """Dense steps use ffn_down, and so do those where too many neurons are active."""
    for activation in ("relu", "relu2", "drelu"):
        exact = Plan(Sparsity("exact"), (TINY,) * N_LAYER, int(CROSSOVER * N_FF))
        assert planned("auto", activation, section) == planned("exact", activation, section) == exact
        assert planned("dense", activation, section) is None
    for activation in ("silu", "gelu"):
        assert planned("auto", activation, section) is planned("dense", activation, section) is None
        with pytest.raises(ParameterError, match=f"got exact, but {activation} is never zero in 'm'"):
            planned("exact", activation, section)
    assert 0.5 < CROSSOVER < 1


def test_plans_with_down_t() -> None:
    """It then serves every step, listed or not, so that modes and batch sizes compute with the same weights."""
    section = Section(down_t=True)
    dense = Plan(Sparsity("dense"), (0.0,) * N_LAYER, N_FF, dense_from_t=True)
    assert planned("dense", "relu", section) == dense
    exact = Plan(Sparsity("exact"), (TINY,) * N_LAYER, N_FF, dense_from_t=True)
    assert planned("auto", "relu", section) == planned("exact", "relu", section) == exact
    assert planned("auto", "silu", section) is planned("dense", "silu", section) is None


@pytest.mark.parametrize("down_t", [False, True])
def test_plans_with_predictors(down_t: bool) -> None:
    """Scores decide; what a predicted neuron then computes may be zero, but only where the activation has zeros."""
    for activation, threshold in (("relu", TINY), ("silu", 0.0)):
        for kind, source in (("relu", "ffn_norm"), ("dejavu", "residual")):
            found = planned("predict", activation, Section(down_t, kind=kind, input=source))
            limit = N_FF if down_t else int(CROSSOVER * N_FF)
            assert found == Plan(Sparsity("predict"), (threshold,) * N_LAYER, limit, kind, source, down_t)
    assert planned("auto", "silu", Section(down_t, kind="relu", input="ffn_norm")) is None
    with pytest.raises(ParameterError, match="no predictors"):
        planned("predict", "relu", Section(down_t))
    with pytest.raises(ParameterError, match="no predictors"):
        planned("predict", "relu")


# --- thresholds ---

TABLE = Thresholds(
    np.array([0.8, 0.5, 0.3], np.float32), np.array([[0.1, 0.2, 0.0], [0.25, 0.5, 0.3], [1.25, 0.9, 2.3]], np.float32)
)


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("threshold=0.8", [0.1, 0.2, 0.0]),
        ("threshold=0.5", [0.25, 0.5, 0.3]),
        ("threshold=0.3", [1.25, 0.9, 2.3]),  # which float32 cannot hold exactly
        ("threshold=0.4", [0.75, 0.7, 1.3]),
        ("threshold=0.65", [0.175, 0.35, 0.15]),
        ("threshold=0.9", [0.05, 0.1, 0.0]),  # nothing is left out at 1
        ("threshold=1", [0.0, 0.0, 0.0]),
    ],
)
def test_thresholds_between_those_of_the_section(activation: str, mode: str, wanted: list[float]) -> None:
    found = planned(mode, activation, Section(thresholds=TABLE))
    assert found is not None and found.sparsity == Sparsity("threshold", float(mode.partition("=")[2]))
    np.testing.assert_allclose(found.thresholds, wanted, rtol=1e-6, atol=1e-7)
    assert (found.limit, found.predictor, found.dense_from_t) == (int(CROSSOVER * N_FF), "", False)
    with_down_t = planned(mode, activation, Section(True, TABLE))
    assert with_down_t == Plan(found.sparsity, found.thresholds, N_FF, dense_from_t=True)


def test_thresholds_only_down_to_the_lowest_density() -> None:
    with pytest.raises(ParameterError, match=r"got threshold=0.29, wanted at least 0.3, .* run it with --density 0.29"):
        planned("threshold=0.29", "silu", Section(thresholds=TABLE))
    for section in (None, Section(), Section(down_t=True)):
        with pytest.raises(ParameterError, match="no thresholds; `hotcold sparsify` makes them"):
            planned("threshold=0.5", "silu", section)


@pytest.mark.parametrize("value", ["nan", "inf", "-0.5", "0", "1.01", "0,5", "=1", ""])
def test_densities_that_are_none(value: str) -> None:
    with pytest.raises(ParameterError, match="sparsity: got 'threshold=.*', wanted auto, dense, exact, threshold=D"):
        Sparsity.parse(f"threshold={value}")


@pytest.mark.parametrize("mode", ["exact=0.5", "=", "all"])
def test_modes_that_are_none(mode: str) -> None:
    with pytest.raises(ParameterError, match="sparsity: got '.*', wanted auto, dense, exact, threshold=D"):
        Sparsity.parse(mode)


def test_modes_are_read_generously() -> None:
    assert Sparsity.parse(" Exact\n") == Sparsity("exact")
    assert Sparsity.parse("THRESHOLD=5e-1") == Sparsity("threshold", 0.5)


def test_plans_of_a_mixture_of_experts() -> None:
    """The experts that are not chosen are exactly zero, so that exact is dense, whatever the activation is."""
    thresholds = Thresholds(np.array([0.5], np.float32), np.full((1, N_LAYER), 0.25, np.float32))
    for activation in ("relu", "silu"):
        for mode in ("auto", "dense", "exact"):
            assert plan(Sparsity.parse(mode), config(activation, 8), Section(True)) is None
        for section in (None, Section(kind="relu", input="ffn_norm")):
            with pytest.raises(ParameterError, match="got predict, but 'm' is a mixture of experts, whose router"):
                plan(Sparsity.parse("predict"), config(activation, 8), section)
        wanted = Plan(Sparsity("threshold", 0.5), (0.25,) * N_LAYER, N_FF)
        assert plan(Sparsity.parse("threshold=0.5"), config(activation, 8), Section(thresholds=thresholds)) == wanted

"""The FFN's activation: act(gate) * up, written over the gate and packed; and through it, the accuracy of exp."""

from __future__ import annotations

from typing import Any

import naive
import numpy as np
import pytest
from kernel_harness import LEVELS, Array, Buffer, Op, packed, run

from hotcold.runtime.cpu.layout import Pack, Step


def activate(
    level: str,
    gate: Array,
    up: Array | None,
    n_threads: int = 1,
    quantised: bool = False,
    segment: int = 32,
    name: str = "silu",
    **rule: Any,
) -> Array:
    """float32 like gate, and the same values packed."""
    n_tok, k = gate.shape
    out, second = Buffer(gate), 0 if up is None else Buffer(up)
    fields = packed(k, n_tok, quantised, not quantised) | rule
    fields |= {"src": out, "second": second, "k": k, "stride": k, "count": Step.n_tok, "segment": segment}
    run(level, Op(f"activate:{name}", Pack, fields), n_threads=n_threads, n_tok=n_tok)
    if isinstance(second, Buffer):
        np.testing.assert_array_equal(second.array, up)
    if not quantised and n_tok < 8:
        np.testing.assert_array_equal(fields["xf"].array.view(np.float32)[: n_tok * k].reshape(n_tok, k), out.array)
    return np.array(out.array)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_tok", [1, 7, 9])
@pytest.mark.parametrize("name", naive.ACTIVATIONS)
def test_activated_gate_times_up(level: str, name: str, n_tok: int) -> None:
    rng = np.random.default_rng(n_tok)
    for k, quantised in ((1, False), (7, False), (100, False), (96, True)):
        gate, up = 4 * rng.standard_normal((2, n_tok, k), np.float32)
        wanted = naive.glu(gate.astype(np.float64), up.astype(np.float64), name)
        # tanh in the oracle cancels against 1 where the gate is very negative: absolute there
        atol = 1e-14 if name == "gelu" else 1e-30
        for n_threads in (1, 2):
            got = activate(level, gate, up, n_threads, quantised, name=name)
            # its tail is e to a number near 100, of which float32 has few digits behind the point
            rtol = 1e-5 if name == "gelu_erf" else 3e-6
            np.testing.assert_allclose(got, wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("level", LEVELS)
def test_without_up_it_is_the_activation_alone(level: str) -> None:
    x = np.random.default_rng(3).standard_normal((2, 45), np.float32)
    np.testing.assert_array_equal(activate(level, x, None, name="relu"), np.maximum(x, 0))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", naive.ACTIVATIONS)
def test_what_the_sparse_rules_leave_out_is_zero(level: str, name: str) -> None:
    rng = np.random.default_rng(4)
    gate, up, scores = rng.standard_normal((3, 3, 77), np.float32)
    cut = rng.standard_normal(77, np.float32)
    whole = activate(level, gate, up, name=name)
    got = activate(level, gate, up, name=name, threshold=0.3)
    kept = np.abs(naive.ACTIVATIONS[name](gate.astype(np.float64))) >= 0.3
    assert 0.1 < kept.mean() < 0.9
    np.testing.assert_array_equal(got, np.where(kept, whole, 0))
    got = activate(level, gate, up, name=name, scores=Buffer(scores), cut=Buffer(cut))
    np.testing.assert_array_equal(got, np.where(scores >= cut, whole, 0))


@pytest.mark.parametrize("level", LEVELS)
def test_the_packed_quants_are_those_of_the_result(level: str) -> None:
    rng = np.random.default_rng(1)
    gate, up = 4 * rng.standard_normal((2, 2, 96), np.float32)
    source, fields = Buffer(gate), packed(96, 2, True, False)
    fields |= {"src": source, "second": Buffer(up), "k": 96, "stride": 96, "count": Step.n_tok, "segment": 64}
    run(level, Op("activate:silu", Pack, fields), n_tok=2)
    quants, scales = naive.quantise_q8(source.array)
    assert np.abs(fields["xq"].array.view(np.int8)[:192].reshape(2, 96).astype(int) - quants).max() <= 1
    np.testing.assert_allclose(fields["xd"].array.view(np.float32)[:6].reshape(2, 3), scales, rtol=2e-7)


@pytest.mark.parametrize("level", LEVELS)
def test_exp_is_accurate(level: str) -> None:
    """silu(x) = x / (1 + exp(-x)): exp's own 2e-7, and half an ulp (6e-8) for each of the sum and the quotient."""
    x = np.linspace(-86.9, 87.9, 64 * 32 * 4, dtype=np.float32).reshape(4, -1)
    got = activate(level, x, np.ones_like(x), segment=512).astype(np.float64)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(got, wide / (1 + np.exp(-wide)), rtol=3.5e-7)


@pytest.mark.parametrize("level", LEVELS)
def test_exp_does_not_leave_its_range(level: str) -> None:
    x = np.array([[-3e38, -1e10, -1000, -104, -88.5, 0.0, 88.5, 104, 1000, 1e10, 3e38]], np.float32)
    got = activate(level, x, np.ones_like(x))[0]
    assert (np.abs(got[1:5]) < 1e-27).all()
    assert abs(got[0]) < 2  # -3e38 / e**88: exp is clamped there, and so finite
    np.testing.assert_array_equal(got[5:], np.maximum(x[0, 5:], 0))


@pytest.mark.parametrize("level", LEVELS)
def test_the_place_in_a_row_changes_nothing(level: str) -> None:
    """Lanes and the scalar tail compute alike, so a row's length does not decide its values."""
    rng = np.random.default_rng(2)
    gate, up = 4 * rng.standard_normal((2, 1, 100), np.float32)
    whole = activate(level, gate, up, segment=512)
    for k in (1, 5, 31):
        part = activate(level, np.ascontiguousarray(gate[:, :k]), np.ascontiguousarray(up[:, :k]))
        np.testing.assert_array_equal(part, whole[:, :k])

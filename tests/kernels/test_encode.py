"""Encoders: what gguf.quants decodes is as near as the type allows."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from kernel_harness import LEVELS

from hotcold.runtime.cpu import jit
from hotcold.runtime.encode import ENCODED, encode

# Root mean square error on normal weights of deviation 1.
ERRORS = {
    "F32": 0.0,
    "F16": 0.00021,
    "BF16": 0.0017,
    "Q4_0": 0.083,
    "Q4_1": 0.071,
    "Q5_0": 0.041,
    "Q5_1": 0.0341,
    "Q8_0": 0.0054,
    "Q2_K": 0.272,
    "Q3_K": 0.147,
    "Q4_K": 0.0714,
    "Q5_K": 0.035,
    "Q6_K": 0.0174,
}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction-set level, its kernels compiled side by side."""
    monkeypatch.setenv("HOTCOLD_ISA", request.param)
    jit.load(["decode:F32", *(f"encode:{kind}" for kind in ENCODED if kind != "F32")], request.param)
    return str(request.param)


def decoded(kind: str, raw: np.ndarray) -> np.ndarray:
    return np.asarray(quants.dequantize(raw, GGMLQuantizationType[kind]), np.float32)


@pytest.mark.parametrize("kind", ENCODED)
def test_round_trip(level: str, kind: str) -> None:
    x = np.random.default_rng(0).standard_normal((67, 768), np.float32)
    raw = encode(kind, x, n_threads=2)
    error = np.sqrt(np.mean((decoded(kind, raw).reshape(x.shape) - x) ** 2))
    assert error <= ERRORS[kind]
    np.testing.assert_array_equal(encode(kind, x, n_threads=1), raw)

"""Encoders: what gguf.quants decodes is as near to the weights as llama.cpp's encoder comes, or nearer."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import quantize_cases
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from kernel_harness import LEVELS, PLAIN, weights
from quantize_cases import error

from hotcold.formats.errors import ParameterError
from hotcold.runtime.cpu import jit
from hotcold.runtime.encode import ENCODED, Encoder, NotFiniteError, encode

FLOATS = ("F32", "F16", "BF16")
QUANTS = [kind for kind in ENCODED if kind not in FLOATS]
WEIGHTS = quantize_cases.weights()
PEER = json.loads(quantize_cases.ERRORS.read_text())


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction-set level, its kernels compiled side by side."""
    monkeypatch.setenv("HOTCOLD_ISA", request.param)
    jit.load([*(f"decode:{k}" for k in ENCODED), *(f"encode:{k}" for k in ENCODED if k != "F32")], request.param)
    return str(request.param)


def decoded(kind: str, raw: np.ndarray) -> np.ndarray:
    return np.asarray(quants.dequantize(raw, GGMLQuantizationType[kind]), np.float32)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kind", QUANTS)
def test_errors_are_no_larger_than_llama_cpps(level: str, kind: str, name: str) -> None:
    """1e-3 is for orders of summation, which differ by level."""
    x, (plain, weighted) = WEIGHTS[name], PEER[name][kind]
    assert error(decoded(kind, encode(kind, x, n_threads=1)), x) <= 1.001 * plain
    counts = quantize_cases.importance()
    found = error(decoded(kind, encode(kind, x, counts, n_threads=1)), x, counts)
    assert found <= 1.001 * weighted


@pytest.mark.parametrize("kind", QUANTS)
def test_importance_is_heeded(level: str, kind: str) -> None:
    x, counts = WEIGHTS["normal"], quantize_cases.importance()
    plain, weighted = (error(decoded(kind, encode(kind, x, c)), x, counts) for c in (None, counts))
    assert weighted <= (1.0 if kind == "Q8_0" else 0.96) * plain
    # Columns that count nothing cost nothing, and blocks of such columns are encoded all the same.
    counts = np.repeat(np.array([1, 0], np.float32), 128)
    far = encode(kind, x, counts)
    assert error(decoded(kind, far)[:, 128:], x[:, 128:]) < 0.5 * np.sqrt(np.mean(x**2))


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_are_rounded_to_nearest(level: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((5, 77)) * 10.0 ** rng.uniform(-9, 4, (5, 77))).astype(np.float32)
    x[0, :8] = [0.0, -0.0, 65519.0, -65519.0, 6e-8, 1e-9, 1.00048828125, 1.00390625]
    got = encode(kind, x, n_threads=2)
    wanted = quants.quantize(x, GGMLQuantizationType[kind])
    np.testing.assert_array_equal(got, np.ascontiguousarray(wanted).view(np.uint8).reshape(got.shape))


@pytest.mark.parametrize("kind", QUANTS)
def test_blocks_are_independent_of_threads_and_of_their_neighbours(level: str, kind: str) -> None:
    """Any number of rows, so groups of blocks that are not full."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rng = np.random.default_rng(2)
    for rows, k in ((1, block), (3, 3 * block), (67, 2 * block)):
        x = rng.standard_normal((rows, k), np.float32)
        raw = encode(kind, x, n_threads=1)
        assert raw.shape == (rows, k // block * size) and raw.dtype == np.uint8
        np.testing.assert_array_equal(encode(kind, x, n_threads=5), raw)
        np.testing.assert_array_equal(encode(kind, x.reshape(-1, block)), raw.reshape(-1, size))


@pytest.mark.parametrize("kind", QUANTS)
def test_weights_on_the_grid_stay(level: str, kind: str) -> None:
    """What the type itself has made comes back, almost."""
    raw = weights(kind, 24, 512, np.random.default_rng(3))
    x = decoded(kind, raw)
    again = decoded(kind, encode(kind, x))
    limit = 0.03 if kind == "Q2_K" else 0.015
    assert np.sqrt(np.mean((again - x) ** 2)) <= limit * np.sqrt(np.mean(x**2))


@pytest.mark.parametrize("kind", QUANTS)
def test_extreme_blocks(level: str, kind: str) -> None:
    """Zeros, one weight alone, equal weights of either sign, the smallest and the largest."""
    x = np.zeros((16, 256), np.float32)
    x[1, 100] = 1.0
    x[2, 100] = -1.0
    x[3], x[4] = 0.7, -0.7
    x[5] = np.linspace(1, 2, 256)
    x[6] = np.linspace(-2, -1, 256)
    x[7] = np.linspace(-1, 1, 256)
    x[8, ::2], x[9, 1::2] = 1e4, -1e4
    x[10] = 1e-7 * np.linspace(-1, 1, 256)
    x[11] = 1e-38
    x[12, :128] = 1e-30
    x[13, :128], x[13, 128:] = 1e-3, 1.0
    x[14, 7], x[14, 8] = 100.0, -100.0
    got = decoded(kind, encode(kind, x)).reshape(x.shape)
    assert np.isfinite(got).all()
    assert not got[0].any()
    # A uniform quantiser's step over its range is the most that anything may be off.
    coarse = {"Q2_K": 0.36, "Q3_K": 0.2, "Q4_0": 0.1, "Q4_1": 0.05, "Q4_K": 0.08, "Q5_0": 0.05}.get(kind, 0.04)
    size = np.abs(x).max(axis=1)
    for row in (*range(1, 10), 13, 14):
        assert np.abs(got[row] - x[row]).max() <= coarse * size[row] * 1.01, row
    assert np.abs(got[10:13]).max() <= 2e-7


@pytest.mark.parametrize("kind", ENCODED)
def test_what_is_no_number_is_refused(kind: str) -> None:
    x = np.ones((40, 512), np.float32)
    for value in (np.nan, np.inf, -np.inf):
        for at in ((0, 0), (39, 511), (17, 300)):
            bad = x.copy()
            bad[at] = value
            with pytest.raises(NotFiniteError, match="NaN or infinite"):
                encode(kind, bad)
    encode(kind, np.full((2, 256), 3e4, np.float32))


def test_what_a_float_type_cannot_hold() -> None:
    for kind, least in (("F16", 65520.0), ("BF16", 3.3961776e38)):
        x = np.zeros((2, 40), np.float32)
        x[1, 39] = np.nextafter(np.float32(least), np.float32(0))
        assert np.isfinite(decoded(kind, encode(kind, x))).all()
        x[1, 39] = -least
        with pytest.raises(NotFiniteError, match=f"beyond the range of {kind}"):
            encode(kind, x)


def test_wrong_arguments() -> None:
    x = np.zeros((2, 96), np.float32)
    with pytest.raises(ParameterError, match="got 'IQ4_NL', wanted one of F32, F16"):
        encode("IQ4_NL", x)
    with pytest.raises(ParameterError, match="Q4_K: got rows of 96 weights, wanted a multiple of 256"):
        encode("Q4_K", x)
    with pytest.raises(ParameterError, match="got 1 dimensions"):
        encode("Q4_0", x[0])
    for bad in (np.ones(95, np.float32), np.full(96, np.nan, np.float32), np.full(96, -1, np.float32)):
        with pytest.raises(ParameterError, match="importance"):
            encode("Q4_0", x, bad)
    assert encode("Q4_0", x[:0]).shape == (0, 54)


@pytest.mark.parametrize("source", ENCODED)
def test_from_every_type(level: str, source: str) -> None:
    """Rows of a stored type, decoded on the way."""
    k = 224 if source in (*FLOATS, *PLAIN) else 768
    raw = weights(source, 300, k, np.random.default_rng(4))
    values = decoded(source, raw).reshape(300, k)
    with Encoder(2) as encoder:
        floats = np.empty((300, k), np.float32)
        encoder.convert(source, raw.ctypes.data, "F32", floats.ctypes.data, 300, k)
        np.testing.assert_allclose(floats, values, rtol=1e-6)
        out = np.empty((300, k // 32 * 34), np.uint8)
        encoder.convert(source, raw.ctypes.data, "Q8_0", out.ctypes.data, 300, k)
        np.testing.assert_array_equal(out, encoder.encode("Q8_0", floats))
        encoder.check(source, raw.ctypes.data, 300, k)


def test_many_short_runs_with_more_threads_than_cores() -> None:
    """One tape is used again and again, with one row or two, while late threads still look at it."""
    x = np.random.default_rng(5).standard_normal((64, 256), np.float32)
    wanted = {kind: encode(kind, x) for kind in ("F32", "Q8_0", "Q4_0")}

    def run(seed: int) -> None:
        with Encoder(4) as encoder:
            for i in range(100):
                rows = 1 + (i * 7 + seed) % 64
                for kind, raw in wanted.items():
                    np.testing.assert_array_equal(encoder.encode(kind, x[:rows]), raw[:rows])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))

"""Packing activations: both layouts that layout.py describes, read back with NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import naive
import numpy as np
import pytest
from kernel_harness import LEVELS, Array, Buffer, pack_op, packed, panel_tokens, run

TINY = 1e-36  # blocks whose largest activation is smaller become zero: 127 / top would be past float32


class Packed(NamedTuple):
    """What the kernel wrote, token by token."""

    quants: Array  # int8 (n_tok, k)
    scales: Array  # float32 (n_tok, k / 32)
    sums_16: Array  # scaled sums of 16 quants, float32 (n_tok, k / 16); of 32 in the row form
    sums_32: Array  # (n_tok, k / 32)


def _panels(buffer: Buffer, dtype: Any, level: str, n_tok: int, *inner: int) -> Array:
    """(n_tok, inner[0], ...) out of [panel][inner[0]][TOKENS][inner[1:]]."""
    tokens = panel_tokens(level)
    first, *rest = inner
    panels = -(-n_tok // tokens)
    flat = buffer.array.view(dtype)[: panels * tokens * int(np.prod(inner))]
    return np.moveaxis(flat.reshape(panels, first, tokens, *rest), 2, 1).reshape(-1, *inner)[:n_tok]


def _read_rows(fields: dict[str, Any], n_tok: int, k: int) -> Packed:
    """The row form; what it has by lanes of 4 quants is checked here."""
    quants = fields["xq"].array.view(np.int8)[: n_tok * k].reshape(n_tok, k)
    lanes = {name: fields[name].array[: n_tok * k] for name in ("ld", "ln", "ls")}
    scales = lanes["ld"].view(np.float32).reshape(n_tok, -1, 8)
    negated = lanes["ln"].view(np.int32).reshape(n_tok, -1)
    sums = lanes["ls"].view(np.float32).reshape(n_tok, -1, 8)
    assert (scales == scales[:, :, :1]).all()
    np.testing.assert_array_equal(negated, -quants.reshape(n_tok, -1, 4).astype(np.int32).sum(axis=2))
    np.testing.assert_array_equal(sums, -negated.reshape(sums.shape).astype(np.float32) * scales)
    by_block, by_16, by_32 = (fields[name].array.view(np.float32) for name in ("xd", "xn", "xs"))
    found = (by_block[: n_tok * k // 32], by_16[: n_tok * k // 16], by_32[: n_tok * k // 32])
    by_block, by_16, by_32 = (array.reshape(n_tok, -1) for array in found)
    np.testing.assert_array_equal(by_block, scales[:, :, 0])
    return Packed(quants, by_block, by_16, by_32)


def _read_panels(fields: dict[str, Any], level: str, n_tok: int, k: int) -> Packed:
    quants = _panels(fields["xq"], np.int8, level, n_tok, k // 4, 4).reshape(n_tok, k)
    scales = _panels(fields["xd"], np.float32, level, n_tok, k // 32)
    by_16 = _panels(fields["xn"], np.float32, level, n_tok, k // 16)
    return Packed(quants, scales, by_16, _panels(fields["xs"], np.float32, level, n_tok, k // 32))


def pack(level: str, x: Array, n_threads: int = 1, segment: int = 64) -> Packed:
    n_tok, k = x.shape
    fields = packed(k, n_tok, True, False)
    run(level, pack_op(Buffer(x), fields, segment), n_threads=n_threads, n_tok=n_tok)
    return _read_rows(fields, n_tok, k) if n_tok < 8 else _read_panels(fields, level, n_tok, k)


def check(x: Array, got: Packed) -> None:
    """Scales within float32 rounding of naive's, quants within half a step of x, sums of what was stored."""
    quants, scales = naive.quantise_q8(x)
    np.testing.assert_allclose(got.scales, scales, rtol=2e-7, atol=1e-44)
    assert np.abs(got.quants.astype(int) - quants).max() <= 1
    assert (got.quants != quants).mean() < 0.01  # halves, and what is within a rounding error of a half
    step = np.repeat(got.scales.astype(np.float64), 32, axis=1)
    assert (np.abs(got.quants * step - x) <= 0.50002 * step + 1e-37).all()
    for size, sums in ((16, got.sums_16), (32, got.sums_32)):
        wanted = (got.quants * step).reshape(len(x), -1, size)
        np.testing.assert_array_less(np.abs(sums - wanted.sum(axis=2)), 1e-6 * np.abs(wanted).sum(axis=2) + 1e-44)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_tok", [1, 2, 7, 8, 9, 33])
def test_quants(level: str, n_tok: int) -> None:
    rng = np.random.default_rng(n_tok)
    for k in (32, 96, 288):
        x = rng.standard_normal((n_tok, k), np.float32)
        check(x, pack(level, x))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_tok", [2, 9])
def test_zeros_huge_and_tiny_blocks(level: str, n_tok: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, (n_tok, 256)).astype(np.float32)
    x[:, 1::32] = 0.0
    magnitudes = [0.0, 1e37, 1e-35, 2 * TINY, 1e10, 1e-10, 1.0, 65504.0]
    x *= np.repeat(np.array(magnitudes, np.float32), 32)
    got = pack(level, x)
    assert not got.quants[:, :32].any()
    assert not got.scales[:, 0].any() and not got.sums_32[:, 0].any()
    check(x, got)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_tok", [2, 9])
def test_blocks_below_the_smallest_scale_are_zero(level: str, n_tok: int) -> None:
    for top in (TINY / 3, 1e-38, 1e-42, 1.4e-45):
        x = np.zeros((n_tok, 64), np.float32)
        x[:, 3], x[:, 40] = top, 1.0
        got = pack(level, x)
        assert not got.quants[:, :32].any()
        assert np.isfinite(got.scales).all() and not got.sums_16[:, :2].any()
        assert (got.quants[:, 40] == 127).all()


@pytest.mark.parametrize("level", LEVELS)
def test_largest_activation_is_127(level: str) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((64, 96), np.float32)
    quants = pack(level, x).quants.reshape(64, 3, 32).astype(int)
    assert (np.abs(quants).max(axis=2) == 127).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_tok", [3, 20])
def test_threads_and_segments_change_nothing(level: str, n_tok: int) -> None:
    x = np.random.default_rng(3).standard_normal((n_tok, 288), np.float32)
    alone = pack(level, x)
    for n_threads, segment in ((1, 512), (2, 32), (3, 96)):
        for a, b in zip(alone, pack(level, x, n_threads, segment), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_tok", [1, 7, 8, 9, 33])
def test_floats(level: str, n_tok: int) -> None:
    rng = np.random.default_rng(4)
    for k in (1, 7, 33, 100):
        x = rng.standard_normal((n_tok, k), np.float32)
        fields = packed(k, n_tok, False, True)
        run(level, pack_op(Buffer(x), fields, segment=32), n_threads=2, n_tok=n_tok)
        got = fields["xf"].array.view(np.float32)
        got = got[: n_tok * k].reshape(n_tok, k) if n_tok < 8 else _panels(fields["xf"], np.float32, level, n_tok, k)
        np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_tok", [2, 9])
def test_both_forms_at_once(level: str, n_tok: int) -> None:
    x = np.random.default_rng(5).standard_normal((n_tok, 96), np.float32)
    fields = packed(96, n_tok, True, True)
    run(level, pack_op(Buffer(x), fields), n_tok=n_tok)
    got = _read_rows(fields, n_tok, 96) if n_tok < 8 else _read_panels(fields, level, n_tok, 96)
    check(x, got)
    floats = fields["xf"].array.view(np.float32)
    floats = floats[: x.size].reshape(x.shape) if n_tok < 8 else _panels(fields["xf"], np.float32, level, n_tok, 96)
    np.testing.assert_array_equal(floats, x)

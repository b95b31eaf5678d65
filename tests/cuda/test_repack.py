"""Packing weights for the GPU: sizes to the byte, rows contiguous, and the weights that a reader gets back."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from naive import QType

from hotcold.formats.errors import ParameterError
from hotcold.runtime.cuda.repack import KINDS, PACKINGS, pack, packed_bytes

TWO, ONE = (4, 12, 0, 8, 6, 14, 2, 10), (3, 2, 1, 0, 7, 6, 5, 4)  # where a run's codes are in `high`


def widths(kind: str) -> tuple[int, ...]:
    return (256, 768) if kind.endswith("_K") else (32, 96, 576)


def unpack(kind: str, arrays: tuple[np.ndarray, ...], n_rows: int) -> np.ndarray:
    """Weights float32 [n_rows, k] from the packed arrays, by the description of the layout."""
    first = arrays[0]
    if kind in ("F32", "F16"):
        return first.view(np.float32 if kind == "F32" else np.float16).astype(np.float32).reshape(n_rows, -1)
    if kind == "BF16":
        return (first.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(n_rows, -1)
    if kind == "Q8_0":
        codes = first.view(np.uint8).astype(np.float32) - 128
    elif kind in ("Q2_K", "Q3_K"):
        codes = np.stack([first >> at & 3 for at in TWO], axis=-1)
    else:
        places = range(0, 32, 4) if kind in ("Q4_0", "Q4_1", "Q4_K") else (0, 8, 16, 24, 4, 12, 20, 28)
        codes = np.stack([first >> at & 15 for at in places], axis=-1)
    if kind in ("Q5_0", "Q5_1", "Q5_K", "Q3_K"):
        codes = codes | np.stack([arrays[1] >> at & 1 for at in ONE], axis=-1).astype(np.uint32) << (
            2 if kind == "Q3_K" else 4
        )
    if kind == "Q6_K":
        codes = codes | np.stack([arrays[1] >> at & 3 for at in TWO], axis=-1).astype(np.uint32) << 4
    codes = codes.astype(np.float32).reshape(-1)
    scale = arrays[-1].view(np.float16).astype(np.float32)
    minimum = np.zeros(1, np.float32)
    if kind in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"):
        scale, minimum = scale[::2], scale[1::2]
    if kind in ("Q2_K", "Q4_K", "Q5_K"):
        sub = arrays[-2]
        low, high = (sub & 15, sub >> 4) if kind == "Q2_K" else (sub & 255, sub >> 8)
        each = len(low) // len(scale)
        scale, minimum = np.repeat(scale, each) * low, -np.repeat(minimum, each) * high
    if kind in ("Q3_K", "Q6_K"):
        scale = np.repeat(scale, 16) * arrays[-2]
    codes -= {"Q4_0": 8, "Q5_0": 16, "Q3_K": 4, "Q6_K": 32}.get(kind, 0)
    share = len(codes) // len(scale)
    return (codes * np.repeat(scale, share) + np.resize(np.repeat(minimum, share), len(codes))).reshape(n_rows, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back(kind: str) -> None:
    rng = np.random.default_rng(1)
    for k in widths(kind):
        raw = naive.random_blocks(QType[kind], 5, k, rng)
        arrays = pack(kind, raw, k)
        want = naive.dequantize(raw, QType[kind])
        np.testing.assert_allclose(unpack(kind, arrays, 5), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_dtypes(kind: str) -> None:
    rng = np.random.default_rng(2)
    for k in widths(kind):
        raw = naive.random_blocks(QType[kind], 3, k, rng)
        arrays = pack(kind, raw, k)
        assert sum(a.nbytes for a in arrays) == packed_bytes(kind, 3, k)
        assert all(a.ndim == 1 and a.flags.c_contiguous for a in arrays)
        assert [a.dtype for a in arrays] == [np.dtype(dtype) for dtype, _ in PACKINGS[kind].arrays]
        extra = 4 * k // 256 if kind in ("Q3_K", "Q4_K", "Q5_K") else 0
        assert packed_bytes(kind, 3, k) == 3 * (raw.shape[1] + extra)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_contiguous(kind: str) -> None:
    k = widths(kind)[-1]
    raw = naive.random_blocks(QType[kind], 7, k, np.random.default_rng(3))
    whole, part = pack(kind, raw, k), pack(kind, raw[2:5], k)
    for a, b in zip(whole, part, strict=True):
        each = a.size // 7
        np.testing.assert_array_equal(a[2 * each : 5 * each].view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_are_filled_up_to_whole_runs(kind: str) -> None:
    raw = naive.random_blocks(QType[kind], 3, 13, np.random.default_rng(4))
    arrays = pack(kind, raw, 13)
    assert packed_bytes(kind, 3, 13) == packed_bytes(kind, 3, 16) == arrays[0].nbytes
    got = unpack(kind, arrays, 3)
    np.testing.assert_array_equal(got[:, :13], naive.dequantize(raw, QType[kind]))
    assert not got[:, 13:].any()


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "F16"])
def test_more_than_a_chunk(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = naive.random_blocks(QType[kind], 5, 512, np.random.default_rng(5))
    want = pack(kind, raw, 512)
    monkeypatch.setattr("hotcold.runtime.cuda.repack.CHUNK", 768)
    for a, b in zip(pack(kind, raw, 512), want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_rows() -> None:
    for kind in KINDS:
        empty = pack(kind, np.zeros((0, PACKINGS[kind].size), np.uint8), PACKINGS[kind].block)
        assert packed_bytes(kind, 0, 256) == 0 and all(a.size == 0 for a in empty)


def test_errors_name_what_was_wrong() -> None:
    with pytest.raises(ParameterError, match="IQ4_NL"):
        packed_bytes("IQ4_NL", 1, 256)
    with pytest.raises(ParameterError, match="multiple of 256"):
        packed_bytes("Q4_K", 1, 96)
    with pytest.raises(ParameterError, match=r"\[n_rows, 36\]"):
        pack("Q4_0", np.zeros((2, 18), np.uint8), 64)

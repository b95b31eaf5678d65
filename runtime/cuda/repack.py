"""Weights as the GPU keeps them: GGUF's blocks taken apart into arrays that a warp reads in whole lines.

A row is cut into *runs* of 8 neighbouring weights, one a thread at a time; k / 8 runs a row, nothing between rows. Each
array holds one field of the runs (or of the groups of weights that share a scale), in the order of rows and runs:

  codes   of 4 bits: a uint32 a run, weight b from bit 4 b on; of 5 and 6: a uint32 of their low nibbles, byte b for
          weight b below and 4 + b above; of 8: two uint32, a byte a weight, 128 more than in the file; of 2 and 3:
          a uint16 (_spread); floats: their bytes in order, as uint32
  high    what codes of 5, 6 and 3 bits have beyond those: a uint8 (_ones), uint16 (_spread), uint8 a run
  sub     of K-quants: a group's 6-bit scale and minimum expanded to bytes (uint16: scale below), or a signed scale
  scale   a float16 a block, as uint16; a uint32 of two float16 where there is a minimum too (scale below)

Bytes a weight are GGUF's, except for the expanded scales of Q3_K, Q4_K and Q5_K (4 bytes more in 256 weights). Rows of
plain floats are filled up with zeros to whole runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.errors import ParameterError

RUN = 8  # weights that a thread reads at once

Bytes = NDArray[np.uint8]
Arrays = tuple[NDArray[Any], ...]


@dataclass(frozen=True)
class Packing:
    """How a type is packed: weights and bytes of its GGUF block, and its arrays as (dtype, weights an element)."""

    block: int
    size: int
    arrays: tuple[tuple[type[np.generic], int], ...]
    split: Callable[[Bytes], Arrays]  # blocks uint8 [n, size] -> the arrays, each of n rows


def packed_bytes(kind: str, n_rows: int, k: int) -> int:
    """Bytes on the GPU of n_rows rows of k weights: the sum over pack's arrays."""
    packing = _packing(kind)
    weights = n_rows * _padded(packing, kind, k)
    return sum(weights // share * np.dtype(dtype).itemsize for dtype, share in packing.arrays)


def pack(kind: str, data: Bytes, k: int) -> Arrays:
    """The arrays (1-D) of rows of k weights; data uint8 [n_rows, row_bytes], as in the file. ParameterError.

    The part of rows [i, j) is contiguous in every array: elements [i * e, j * e) where e = array.size / n_rows.
    """
    packing = _packing(kind)
    padded, row_bytes = _padded(packing, kind, k), k // packing.block * packing.size
    if data.ndim != 2 or data.dtype != np.uint8 or data.shape[1] != row_bytes:
        raise ParameterError(f"pack: got {data.dtype} {data.shape}, wanted uint8 [n_rows, {row_bytes}] for {kind}")
    if padded != k:
        data = np.pad(data, ((0, 0), (0, (padded - k) * packing.size)))
    parts = packing.split(np.ascontiguousarray(data).reshape(-1, packing.size))
    return tuple(
        np.ascontiguousarray(part).reshape(-1).view(dtype)
        for part, (dtype, _) in zip(parts, packing.arrays, strict=True)
    )


def _packing(kind: str) -> Packing:
    if kind not in PACKINGS:
        raise ParameterError(f"pack: got weights of type {kind}, wanted one of {', '.join(KINDS)}")
    return PACKINGS[kind]


def _padded(packing: Packing, kind: str, k: int) -> int:
    """k, or for plain floats the next whole number of runs."""
    if k < 0 or k % packing.block:
        raise ParameterError(f"pack: got rows of {k} weights, wanted a multiple of {packing.block} for {kind}")
    return -(-k // RUN) * RUN


def _words(codes: Bytes) -> Bytes:
    """Runs of 8 codes below 16, uint8 [..., 8], as the 4 bytes of a word: code b from bit 4 b on."""
    out: Bytes = codes[..., ::2] | codes[..., 1::2] << 4
    return out


def _nibbles(codes: Bytes) -> Bytes:
    """The low 4 bits of runs of 8 codes, uint8 [..., 8], as 4 bytes: byte b holds code b below and code 4 + b above."""
    out: Bytes = (codes[..., :4] & 15) | codes[..., 4:] << 4
    return out


def _spread(codes: Bytes) -> NDArray[np.uint16]:
    """Runs of 8 two-bit codes, uint8 [..., 8], as a uint16 each: code b is at bit _TWO[b].

    From w = r | r << 20, (w >> 4) & 0x03030303 are then codes 0 to 3 as bytes, and (w >> 6) & 0x03030303 codes 4 to 7.
    """
    out: NDArray[np.uint16] = np.bitwise_or.reduce(codes.astype(np.uint16) << _TWO, axis=-1)
    return out


def _ones(bits: Bytes) -> Bytes:
    """Runs of 8 bits, uint8 [..., 8], as a byte each: bit b of a run is at bit _ONE[b].

    From w = r * (1 + 2**9 + 2**18 + 2**27), (w >> 3) & 0x01010101 are then bits 0 to 3, (w >> 7) & 0x01010101 the rest.
    """
    out: Bytes = np.bitwise_or.reduce(bits << _ONE, axis=-1)
    return out


_TWO = np.array([4, 12, 0, 8, 6, 14, 2, 10], np.uint16)
_ONE = np.array([3, 2, 1, 0, 7, 6, 5, 4], np.uint8)


def _runs(codes: Bytes) -> Bytes:
    return codes.reshape(len(codes), codes.shape[1] // RUN, RUN)


def _halves(qs: Bytes) -> Bytes:
    """Bytes of nibbles -> codes in order: first all low ones, then all high ones."""
    return np.concatenate([qs & 15, qs >> 4], axis=-1)


def _bits(packed: Bytes) -> Bytes:
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _float(data: Bytes) -> Arrays:
    return (data,)


def _q4_0(data: Bytes) -> Arrays:
    return _words(_runs(_halves(data[:, 2:]))), data[:, :2]


def _q4_1(data: Bytes) -> Arrays:
    return _words(_runs(_halves(data[:, 4:]))), data[:, :4]


def _q5_0(data: Bytes) -> Arrays:
    return _nibbles(_runs(_halves(data[:, 6:]))), _ones(_runs(_bits(data[:, 2:6]))), data[:, :2]


def _q5_1(data: Bytes) -> Arrays:
    return _nibbles(_runs(_halves(data[:, 8:]))), _ones(_runs(_bits(data[:, 4:8]))), data[:, :4]


def _q8_0(data: Bytes) -> Arrays:
    return data[:, 2:] ^ 128, data[:, :2]


def _six_bit(scales: Bytes) -> Bytes:
    """The 12 bytes of Q4_K's and Q5_K's scales -> uint8 [n, 8, 2]: scale and minimum of each group of 32."""
    a, b, c = scales[:, :4], scales[:, 4:8], scales[:, 8:]
    scale = np.concatenate([a & 63, (c & 15) | (a >> 6) << 4], axis=1)
    minimum = np.concatenate([b & 63, c >> 4 | (b >> 6) << 4], axis=1)
    return np.stack([scale, minimum], axis=-1)


def _k_nibbles(qs: Bytes) -> Bytes:
    """128 bytes -> 256 codes: each 32 bytes hold 32 low nibbles, then 32 high ones."""
    return _halves(qs.reshape(-1, 4, 32)).reshape(-1, 256)


def _q4_k(data: Bytes) -> Arrays:
    return _words(_runs(_k_nibbles(data[:, 16:]))), _six_bit(data[:, 4:16]), data[:, :4]


def _q5_k(data: Bytes) -> Arrays:
    high = np.stack([data[:, 16:48] >> group & 1 for group in range(8)], axis=1).reshape(-1, 256)
    return _nibbles(_runs(_k_nibbles(data[:, 48:]))), _ones(_runs(high)), _six_bit(data[:, 4:16]), data[:, :4]


def _crumbs(qs: Bytes) -> Bytes:
    """Bytes [n, g * 32] of two-bit codes -> codes [n, g * 128]: of each 32 bytes the lowest two bits come first."""
    groups = qs.reshape(len(qs), qs.shape[1] // 32, 1, 32)
    return (groups >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(len(qs), qs.shape[1] * 4)


def _q6_k(data: Bytes) -> Arrays:
    low = _halves(data[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    return _nibbles(_runs(low)), _spread(_runs(_crumbs(data[:, 128:192]))), data[:, 192:208], data[:, 208:]


def _q2_k(data: Bytes) -> Arrays:
    return _spread(_runs(_crumbs(data[:, 16:80]))), data[:, :16], data[:, 80:]


def _q3_k(data: Bytes) -> Arrays:
    high = np.stack([data[:, :32] >> group & 1 for group in range(8)], axis=1).reshape(-1, 256)
    low, third = data[:, 96:104], data[:, 104:108]
    scale = np.concatenate([low & 15, low >> 4], axis=1)
    scale |= np.concatenate([third >> shift & 3 for shift in (0, 2, 4, 6)], axis=1) << 4
    signed = (scale.astype(np.int8) - np.int8(32)).view(np.uint8)
    return _spread(_runs(_crumbs(data[:, 32:96]))), _ones(_runs(high)), signed, data[:, 108:]


_CODES = (np.uint32, 8)
_SMALL = (np.uint16, 8)
_HIGH = (np.uint8, 8)
_PAIRS = (np.uint32, 32)
_SCALE = (np.uint16, 32)
PACKINGS = {
    "F32": Packing(1, 4, ((np.uint32, 1),), _float),
    "F16": Packing(1, 2, ((np.uint32, 2),), _float),
    "BF16": Packing(1, 2, ((np.uint32, 2),), _float),
    "Q4_0": Packing(32, 18, (_CODES, _SCALE), _q4_0),
    "Q4_1": Packing(32, 20, (_CODES, _PAIRS), _q4_1),
    "Q5_0": Packing(32, 22, (_CODES, _HIGH, _SCALE), _q5_0),
    "Q5_1": Packing(32, 24, (_CODES, _HIGH, _PAIRS), _q5_1),
    "Q8_0": Packing(32, 34, ((np.uint32, 4), _SCALE), _q8_0),
    "Q2_K": Packing(256, 84, (_SMALL, (np.uint8, 16), (np.uint32, 256)), _q2_k),
    "Q3_K": Packing(256, 110, (_SMALL, _HIGH, (np.int8, 16), (np.uint16, 256)), _q3_k),
    "Q4_K": Packing(256, 144, (_CODES, (np.uint16, 32), (np.uint32, 256)), _q4_k),
    "Q5_K": Packing(256, 176, (_CODES, _HIGH, (np.uint16, 32), (np.uint32, 256)), _q5_k),
    "Q6_K": Packing(256, 210, (_CODES, _SMALL, (np.int8, 16), (np.uint16, 256)), _q6_k),
}
KINDS = tuple(PACKINGS)

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
CHUNK = 1 << 17  # weights packed at a time: what is in between stays in the CPU's cache

Bytes = NDArray[np.uint8]
Eights = NDArray[np.uint64]  # a run's codes, a byte each
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
    blocks = np.ascontiguousarray(data).reshape(data.size // packing.size, packing.size)
    weights = len(blocks) * packing.block
    arrays = tuple(np.empty(weights // share, dtype) for dtype, share in packing.arrays)
    step = CHUNK // packing.block
    for first in range(0, len(blocks), step):
        for array, part in zip(arrays, packing.split(blocks[first : first + step]), strict=True):
            packed = np.ascontiguousarray(part).reshape(-1).view(array.dtype)
            at = first * array.size // len(blocks)
            array[at : at + packed.size] = packed
    return arrays


def _packing(kind: str) -> Packing:
    if kind not in PACKINGS:
        raise ParameterError(f"pack: got weights of type {kind}, wanted one of {', '.join(KINDS)}")
    return PACKINGS[kind]


def _padded(packing: Packing, kind: str, k: int) -> int:
    """k, or for plain floats the next whole number of runs."""
    if k < 0 or k % packing.block:
        raise ParameterError(f"pack: got rows of {k} weights, wanted a multiple of {packing.block} for {kind}")
    return -(-k // RUN) * RUN


def _mask(byte: int) -> np.uint64:
    return np.uint64(0x0101010101010101 * byte)


def _word(codes: Eights) -> NDArray[np.uint32]:
    """Codes below 16: code b from bit 4 b on."""
    codes = (codes | codes >> np.uint64(4)) & np.uint64(0x00FF00FF00FF00FF)
    codes = (codes | codes >> np.uint64(8)) & np.uint64(0x0000FFFF0000FFFF)
    return (codes | codes >> np.uint64(16)).astype(np.uint32)


def _nibbles(codes: Eights) -> NDArray[np.uint32]:
    """Codes below 16: byte b holds code b below and code 4 + b above."""
    return (codes | codes >> np.uint64(28)).astype(np.uint32)


def _spread(codes: Eights) -> NDArray[np.uint16]:
    """Codes below 4: code b at bit (4, 12, 0, 8, 6, 14, 2, 10)[b], where a product with four bits puts all of them.

    From w = r | r << 20, (w >> 4) & 0x03030303 are then codes 0 to 3 as bytes, and (w >> 6) & 0x03030303 codes 4 to 7.
    """
    return (codes * np.uint64(2**52 + 2**32 + 2**22 + 2**2) >> np.uint64(48)).astype(np.uint16)


def _ones(codes: Eights) -> Bytes:
    """Codes below 2: code b at bit (3, 2, 1, 0, 7, 6, 5, 4)[b], likewise.

    From w = r * (1 + 2**9 + 2**18 + 2**27), (w >> 3) & 0x01010101 are then codes 0 to 3, and (w >> 7) & 0x01010101
    codes 4 to 7.
    """
    places = (59, 50, 41, 32, 31, 22, 13, 4)
    return (codes * np.uint64(sum(2**place for place in places)) >> np.uint64(56)).astype(np.uint8)


def _eights(data: Bytes) -> Eights:
    """Bytes [n, 8 g] as [n, g]."""
    eights: Eights = np.ascontiguousarray(data).view("<u8")
    return eights


def _halves(data: Bytes, span: int) -> Eights:
    """Bytes of two codes: of every `span` bytes first all low nibbles, then all high ones."""
    both = _eights(data).reshape(len(data), data.shape[1] // span, span // 8)
    codes = np.concatenate([both & _mask(15), both >> np.uint64(4) & _mask(15)], axis=2)
    return codes.reshape(len(data), data.shape[1] // 4)


def _crumbs(data: Bytes) -> Eights:
    """Bytes of four codes: of every 32 bytes first all lowest two bits, then the next."""
    four = _eights(data).reshape(len(data), data.shape[1] // 32, 1, 4)
    codes = four >> np.arange(0, 8, 2, dtype=np.uint64)[:, None] & _mask(3)
    return codes.reshape(len(data), data.shape[1] // 2)


def _bits(data: Bytes) -> Eights:
    """32 bytes of eight codes: first all lowest bits, then the next."""
    codes = _eights(data)[:, None] >> np.arange(8, dtype=np.uint64)[:, None] & _mask(1)
    return codes.reshape(len(data), 32)


def _float(data: Bytes) -> Arrays:
    return (data,)


def _q4_0(data: Bytes) -> Arrays:
    return _word(_halves(data[:, 2:], 16)), data[:, :2]


def _q4_1(data: Bytes) -> Arrays:
    return _word(_halves(data[:, 4:], 16)), data[:, :4]


# A byte of Q5_0's or Q5_1's high bits, which are in the order of the weights -> the byte of _ones.
_ORDERED = _ones(_eights(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")))[:, 0]


def _q5_0(data: Bytes) -> Arrays:
    return _nibbles(_halves(data[:, 6:], 16)), _ORDERED[data[:, 2:6]], data[:, :2]


def _q5_1(data: Bytes) -> Arrays:
    return _nibbles(_halves(data[:, 8:], 16)), _ORDERED[data[:, 4:8]], data[:, :4]


def _q8_0(data: Bytes) -> Arrays:
    return data[:, 2:] ^ np.uint8(128), data[:, :2]


def _six_bit(scales: Bytes) -> Bytes:
    """The 12 bytes of Q4_K's and Q5_K's scales -> uint8 [n, 8, 2]: scale and minimum of each group of 32."""
    a, b, c = scales[:, :4], scales[:, 4:8], scales[:, 8:]
    scale = np.concatenate([a & 63, (c & 15) | (a >> 6) << 4], axis=1)
    minimum = np.concatenate([b & 63, c >> 4 | (b >> 6) << 4], axis=1)
    return np.stack([scale, minimum], axis=-1)


def _q4_k(data: Bytes) -> Arrays:
    return _word(_halves(data[:, 16:], 32)), _six_bit(data[:, 4:16]), data[:, :4]


def _q5_k(data: Bytes) -> Arrays:
    codes, high = _halves(data[:, 48:], 32), _bits(data[:, 16:48])
    return _nibbles(codes), _ones(high), _six_bit(data[:, 4:16]), data[:, :4]


def _q6_k(data: Bytes) -> Arrays:
    codes, high = _halves(data[:, :128], 64), _crumbs(data[:, 128:192])
    return _nibbles(codes), _spread(high), data[:, 192:208], data[:, 208:]


def _q2_k(data: Bytes) -> Arrays:
    return _spread(_crumbs(data[:, 16:80])), data[:, :16], data[:, 80:]


def _q3_k(data: Bytes) -> Arrays:
    low, third = data[:, 96:104], data[:, 104:108]
    scale = np.concatenate([low & 15, low >> 4], axis=1)
    scale |= np.concatenate([third >> shift & 3 for shift in (0, 2, 4, 6)], axis=1) << 4
    signed = (scale.astype(np.int8) - np.int8(32)).view(np.uint8)
    return _spread(_crumbs(data[:, 32:96])), _ones(_bits(data[:, :32])), signed, data[:, 108:]


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

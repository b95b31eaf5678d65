"""Keys and values as the cache keeps them, in NumPy: quantised by position and 32 dims, and laid out in pages."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Array = np.ndarray
TYPES = ("f16", "q8_0", "q4_0")


class Quantised(NamedTuple):
    """quants (..., dim // 32, 32), integers around 0; scales float16 (..., dim // 32)."""

    quants: Array
    scales: Array

    @property
    def floats(self) -> Array:
        """What they stand for, float64 (..., dim)."""
        found = self.quants * self.scales[..., None].astype(np.float64)
        return found.reshape(*found.shape[:-2], -1)


def quantised(x: Array, kind: str, keys: bool) -> Quantised:
    """x (..., dim), dim a multiple of 32."""
    groups = x.reshape(*x.shape[:-1], -1, 32).astype(np.float32)
    top, bottom = groups.max(-1), -groups.min(-1)
    if kind == "q8_0":
        scale = np.maximum(top, bottom) / 127
        low, high = -127, 127
    elif keys:
        scale = np.where(top >= bottom, -top, bottom) / 8
        low, high = -8, 7
    else:
        scale = np.maximum(top / 7, bottom / 8)
        low, high = -8, 7
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    quants = np.clip(np.rint(groups * inverse[..., None]), low, high).astype(np.int64)
    return Quantised(quants, scale.astype(np.float16))


def kept(x: Array, kind: str, keys: bool) -> Array:
    """What the cache has of x (..., dim), as float64."""
    return x.astype(np.float16).astype(np.float64) if kind == "f16" else quantised(x, kind, keys).floats


def page(x: Array, kind: str, keys: bool) -> Array:
    """The bytes of a page that has x (32, dim)."""
    if kind == "f16":
        return np.ascontiguousarray((x.T if keys else x).astype(np.float16)).view(np.uint8).reshape(-1)
    q = quantised(x, kind, keys)
    parts = []
    for group in range(x.shape[1] // 32):
        quants = q.quants[:, group]  # (position, dim)
        parts.append(np.ascontiguousarray(q.scales[:, group]).view(np.uint8))
        if kind == "q8_0" and keys:
            block = (quants + 128).reshape(32, 8, 4).transpose(1, 0, 2)
        elif kind == "q8_0":
            block = (quants % 256).reshape(8, 4, 32).transpose(0, 2, 1)
        else:
            pairs = quants[:, :16] + 8 | quants[:, 16:] + 8 << 4
            block = pairs.reshape(32, 4, 4).transpose(1, 0, 2) if keys else pairs.reshape(8, 4, 16).transpose(0, 2, 1)
        parts.append(np.ascontiguousarray(block).astype(np.uint8).reshape(-1))
    return np.concatenate(parts)

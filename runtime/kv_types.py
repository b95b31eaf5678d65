"""What keys and values may be kept as, and how many bytes that takes; imports no Numba.

A page is what a block of KV_BLOCK positions has of one head. As float16, keys are [dim][position], so that scores of
neighbouring positions are neighbouring lanes, and values [position][dim]. Quantised, 32 dims after 32 dims, each of
them float16 scales [position], then quants in fours of bytes that one dot product takes together, as many bytes as
ggml's blocks of 32 have:

q8_0   keys [8 fours of dims][position][4], with 128 added; values [8 fours of positions][dim][4], signed.
q4_0   with 8 added, two in a byte. Keys [4][position][4]: low halves are dims 0 to 15, high ones 16 to 31; values
       [8 fours of positions][16][4]: likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..formats.errors import ParameterError, UnsupportedError
from .cpu.layout import KV_BLOCK

_GROUP = 32  # dims that share a scale


@dataclass(frozen=True)
class KVType:
    """number: as kernels know it. bits: of a quant; 0: there are no blocks, every element is a float16."""

    name: str
    number: int
    bits: int

    def row_bytes(self, dim: int) -> int:
        """Bytes of one position of one head."""
        return dim // _GROUP * (2 + 4 * self.bits) if self.bits else 2 * dim

    def page_bytes(self, dim: int) -> int:
        """Bytes of a page."""
        return KV_BLOCK * self.row_bytes(dim)

    def clear(self, pages: np.ndarray, dim: int, first: int, keys: bool) -> None:
        """Zero what pages (uint8, contiguous) have of positions from `first` on."""
        if not self.bits:
            shape = (-1, KV_BLOCK) if keys else (-1, KV_BLOCK, dim)
            pages.view(np.uint16).reshape(shape)[:, first:] = 0
            return
        groups = pages.reshape(-1, KV_BLOCK * (2 + 4 * self.bits))
        groups[:, 2 * first : 2 * KV_BLOCK] = 0
        quants = groups[:, 2 * KV_BLOCK :]
        if keys:
            quants.reshape(-1, self.bits, KV_BLOCK, 4)[:, :, first:] = 0
        else:
            late = np.arange(KV_BLOCK).reshape(-1, 4) >= first
            found = quants.reshape(-1, KV_BLOCK // 4, 4 * self.bits, 4).swapaxes(2, 3)
            quants[:] = np.where(late[..., None], 0, found).swapaxes(2, 3).reshape(quants.shape)


F16 = KVType("f16", 0, 0)
KV_TYPES = {kind.name: kind for kind in (F16, KVType("q8_0", 1, 8), KVType("q4_0", 2, 4))}


@dataclass(frozen=True)
class KVTypes:
    """The types of keys and of values."""

    keys: KVType
    values: KVType

    @classmethod
    def parse(cls, keys: str, values: str) -> KVTypes:
        """By name; ParameterError for an unknown one."""
        found = []
        for argument, name in (("cache_type_k", keys), ("cache_type_v", values)):
            kind = KV_TYPES.get(name.lower()) if isinstance(name, str) else None
            if kind is None:
                raise ParameterError(f"{argument}: got {name!r:.60}, wanted one of {', '.join(KV_TYPES)}")
            found.append(kind)
        return cls(*found)

    @property
    def quantised(self) -> bool:
        """Whether either is."""
        return self != PLAIN

    def check(self, name: str, dim_k: int, dim_v: int) -> None:
        """UnsupportedError where heads of these dims cannot be quantised; name: of the model."""
        for argument, kind, dim in (("cache_type_k", self.keys, dim_k), ("cache_type_v", self.values, dim_v)):
            if kind.bits and dim % _GROUP:
                raise UnsupportedError(
                    f"{argument}: {kind.name} needs heads of a multiple of {_GROUP} dims, and {name!r:.60} has heads "
                    f"of {dim}; use f16"
                )

    def row_bytes(self, dim_k: int, dim_v: int) -> int:
        """Bytes of one position of one head, keys and values."""
        return self.keys.row_bytes(dim_k) + self.values.row_bytes(dim_v)


PLAIN = KVTypes(F16, F16)

"""Multiplying bytes and nothing else: what the machine's dot-product unit can do at best."""

from __future__ import annotations

from typing import Any

from .layout import PEAK_BYTES, PEAK_TILE, Read
from .loads import i64_at, load_i8, put_i32
from .simd import hsum, splat_i32
from .tape import finish, take
from .tiles import tile_dot4, tile_zero
from .vector import LANES, WIDE


def build(family: str, variant: str) -> Any:
    """Each of n parts is `size` times the inner step of a prompt's product, on PEAK_BYTES at src, which stay in the
    cache; its sum makes sure that all of it happens."""
    args_of, lanes, wide, count = Read, LANES, WIDE, PEAK_TILE[WIDE]
    mask = PEAK_BYTES // WIDE - 2

    def peak(args, step, ith, turn):
        src, size, parts = i64_at(args + args_of.src), i64_at(args + args_of.size), i64_at(args + args_of.parts)
        while True:
            i = take(args, turn, parts)
            if i < 0:
                break
            tile, weights = tile_zero(splat_i32(0, lanes), count), load_i8(src, wide)
            for n in range(size):
                tile = tile_dot4(tile, weights, src + (n & mask) * wide, False)
            total = tile[0]
            for j in range(1, count):
                total = total + tile[j]
            put_i32(i64_at(args + args_of.sums) + 4 * i, hsum(total))
            finish(args)
        return parts

    return peak

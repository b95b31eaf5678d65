"""Finding a block's scale (and minimum) so that the weighted squared error of its rounded weights is least.

Blocks are searched side by side, a block a lane: x and w are float32 [size][lanes], values and their importance, and
every number below is one vector of lanes. A candidate scale gives integers by rounding; for those integers the best
scale (and minimum) is a least-squares fit; the best fit of all candidates wins. Rounding with the winner gives new
integers, and so on (Lloyd's iteration).
"""

from __future__ import annotations

from typing import Any

from .loads import load_f32
from .simd import fma, splat_f32, vabs, vdiv, where_less
from .weights import inline

MAGIC = 12582912.0  # added to and taken from a float32 below 2**22, it rounds to an integer
TINY = 1e-30


def rounder(lanes: int, lowest: int, highest: int) -> Any:
    """(v) -> v rounded to an integer within [lowest, highest], as float32."""
    low, high = float(lowest), float(highest)

    @inline
    def rounded(v):
        magic = splat_f32(MAGIC, lanes)
        # Limits first, as the sum with the magic number is exact only for small values.
        least, most = splat_f32(low, lanes), splat_f32(high, lanes)
        v = where_less(v, most, v, most)
        v = where_less(least, v, v, least)
        return (v + magic) - magic

    return rounded


def inverse(lanes: int) -> Any:
    """(v) -> 1 / v, and 0 where v is 0 or next to it."""

    @inline
    def inverted(v):
        one, zero = splat_f32(1.0, lanes), splat_f32(0.0, lanes)
        return where_less(splat_f32(TINY, lanes), vabs(v), vdiv(one, v), zero)

    return inverted


def symmetric(lanes: int, size: int, half: int, candidates: tuple[float, float, int], rounds: int) -> Any:
    """(x, w) -> the scales, signed, of integers from -half to half - 1.

    candidates: (first, step, count) of what the largest |x| shall become, once with its own sign and once with the
    other; rounds: how often the winner is fitted again.
    """
    rounded, inverted = rounder(lanes, -half, half - 1), inverse(lanes)
    row = 4 * lanes
    first, step, n = candidates

    @inline
    def search(x, w):
        zero = splat_f32(0.0, lanes)
        top, largest = zero, zero
        for i in range(size):
            v = load_f32(x + i * row, lanes)
            a = vabs(v)
            top = where_less(largest, a, v, top)
            largest = where_less(largest, a, a, largest)
        inv_top = inverted(top)
        best, scale = zero, zero
        for c in range(2 * n + rounds):
            if c < n:
                inv = inv_top * splat_f32(first + step * c, lanes)
            elif c < 2 * n:
                inv = inv_top * splat_f32(-(first + step * (c - n)), lanes)
            else:
                inv = inverted(scale)
            sxq, sqq = zero, zero
            for i in range(size):
                v = load_f32(x + i * row, lanes)
                q = rounded(v * inv)
                wq = load_f32(w + i * row, lanes) * q
                sxq = fma(wq, v, sxq)
                sqq = fma(wq, q, sqq)
            fitted = sxq * inverted(sqq)
            gain = sxq * fitted  # by how much the error is less than that of all zeros
            scale = where_less(best, gain, fitted, scale)
            best = where_less(best, gain, gain, best)
        return scale

    return search


def asymmetric(lanes: int, size: int, most: int, candidates: tuple[float, float, int], rounds: int, free: bool) -> Any:
    """(x, w) -> the scales and minima of integers from 0 to most: x is near scale * q + minimum.

    candidates: (first, step, count) of what the range of x is divided by; rounds: how often the winner is fitted
    again; free: the minimum may be above zero.
    """
    rounded, inverted = rounder(lanes, 0, most), inverse(lanes)
    row = 4 * lanes
    first, step, n = candidates

    @inline
    def search(x, w):
        zero = splat_f32(0.0, lanes)
        low = load_f32(x, lanes)
        high = low
        sw, sx = zero, zero
        for i in range(size):
            v, u = load_f32(x + i * row, lanes), load_f32(w + i * row, lanes)
            low = where_less(v, low, v, low)
            high = where_less(high, v, v, high)
            sw = sw + u
            sx = fma(u, v, sx)
        if not free:
            low = where_less(low, zero, low, zero)
            high = where_less(low, high, high, low)
        inv_range = inverted(high - low)
        best, scale, minimum = zero - splat_f32(1.0, lanes), zero, low
        raised = fma(high - low, splat_f32(0.5 / most, lanes), low)
        for c in range(2 * n + rounds):
            if c < n:
                inv, base = inv_range * splat_f32(first + step * c, lanes), low
            elif c < 2 * n:
                inv, base = inv_range * splat_f32(first + step * (c - n), lanes), raised
            else:
                inv, base = inverted(scale), minimum
            sxq, sqq, sq = zero, zero, zero
            shift = zero - base * inv
            for i in range(size):
                v, u = load_f32(x + i * row, lanes), load_f32(w + i * row, lanes)
                q = rounded(fma(v, inv, shift))
                uq = u * q
                sq = sq + uq
                sxq = fma(uq, v, sxq)
                sqq = fma(uq, q, sqq)
            det = sw * sqq - sq * sq
            inv_det = inverted(det)
            s = (sw * sxq - sx * sq) * inv_det
            m = (sqq * sx - sq * sxq) * inv_det
            # Where all integers are the same, the determinant is nothing but rounding errors.
            least = sw * sqq * splat_f32(1e-5, lanes)
            if free:
                gain = where_less(least, det, s * sxq + m * sx, best)
            else:
                alone = sxq * inverted(sqq)
                s, m = where_less(zero, m, alone, s), where_less(zero, m, zero, m)
                mean = sx * inverted(sw)
                flat = where_less(zero, sqq, zero, where_less(mean, zero, mean, zero))
                s, m = where_less(least, det, s, alone), where_less(least, det, m, flat)
                gain = s * sxq + m * sx
            scale = where_less(best, gain, s, scale)
            minimum = where_less(best, gain, m, minimum)
            best = where_less(best, gain, gain, best)
        return scale, minimum

    return search

"""Products of bands (band_vectors.py) with any number of tokens: a kernel a weight type, for one token and for prompts.

32 columns of a band are taken apart into eight vectors, which stay in registers while the tokens pass by. What a token
gets does not depend on how many there are. The weights are read in order, once for each BAND_TILE tokens.
"""

from __future__ import annotations

from typing import Any

from .band_scales import scale_reader
from .band_vectors import band_dot, load_band, plane_bytes
from .layout import BAND_TILE, BLOCK_BYTES, Bands
from .loads import f32_at, i32_at, i64_at, load_f16, load_f32, prefetch, put_f32, store
from .simd import fma, shl, splat_f32, splat_i32, to_f32
from .tape import finish, take_near
from .vector import LANES
from .weights import PLAIN, SUPER, Super, inline

AHEAD = 16384  # bytes of weights to prefetch ahead: what two loaded threads have under way, and more than a page


def _extend(t: Any, group: int) -> Any:
    """(weights, scales, x, sum) -> the sum of a token, whose block of activations is at x, 32 columns on."""
    lanes, bits, has_min, shift = LANES, t.bits, t.has_min, t.offset.bit_length() - 1

    @inline
    def by_32(us, scales, x, total):
        scale, minimum = scales
        d = splat_f32(f32_at(x + 32), lanes)
        if has_min:
            total = fma(minimum, splat_f32(f32_at(x + 36), lanes), total)
            ints = band_dot(us, x, splat_i32(0, lanes), 0, 8, bits)
        else:
            ints = band_dot(us, x, shl(splat_i32(i32_at(x + 40) + i32_at(x + 44), lanes), shift), 0, 8, bits)
        return fma(to_f32(ints), scale * d, total)

    @inline
    def half(us, first, scale, minimum, x, less, d, total):
        if has_min:
            total = fma(minimum, to_f32(splat_i32(0 - less, lanes)) * d, total)
            ints = band_dot(us, x, splat_i32(0, lanes), first, 4, bits)
        else:
            ints = band_dot(us, x, shl(splat_i32(less, lanes), shift), first, 4, bits)
        return fma(to_f32(ints), scale * d, total)

    @inline
    def by_16(us, scales, x, total):
        first, last, first_minimum, last_minimum = scales
        d = splat_f32(f32_at(x + 32), lanes)
        total = half(us, 0, first, first_minimum, x, i32_at(x + 40), d, total)
        return half(us, 4, last, last_minimum, x, i32_at(x + 44), d, total)

    return by_32 if group == 32 else by_16


def _scales(t: Any, group: int) -> Any:
    """(block, its scales and minima as float vectors if it is a super block, number of 32 columns) -> their scales."""
    lanes, vector, has_min, plain = LANES, 4 * LANES, t.has_min, not isinstance(t, Super)

    @inline
    def by_32(p, scales, minima, i):
        if plain:
            scale = load_f16(p, lanes)
            return scale, load_f16(p + 2 * lanes, lanes) if has_min else scale
        scale = load_f32(scales + i * vector, lanes)
        return scale, load_f32(minima + i * vector, lanes) if has_min else scale

    @inline
    def by_16(p, scales, minima, i):
        first, last = scales + 2 * i * vector, scales + (2 * i + 1) * vector
        if has_min:
            first, last = minima + 2 * i * vector, minima + (2 * i + 1) * vector
        return (
            load_f32(scales + 2 * i * vector, lanes),
            load_f32(scales + (2 * i + 1) * vector, lanes),
            load_f32(first, lanes),
            load_f32(last, lanes),
        )

    return by_32 if group == 32 else by_16


def build(family: str, variant: str) -> Any:
    """`bands:TYPE`: out[token, r] = row r . x[token], plus the bias, plus what is there if the op adds."""
    args_of, lanes, vector, ahead = Bands, LANES, 4 * LANES, AHEAD
    x_bytes, most = BLOCK_BYTES, BAND_TILE
    super_ = variant in SUPER
    t: Any = SUPER[variant] if super_ else PLAIN[variant]
    group, has_min, bits = t.group if super_ else 32, t.has_min, t.bits
    planes, n_sub = plane_bytes(bits), 8 if super_ else 1
    n_factors = 2 if has_min else 1
    head = lanes * (2 * n_factors + (t.places[1] if super_ else 0))
    extend, scales_of = _extend(t, group), _scales(t, group)
    read_scales = scale_reader(variant, has_min) if super_ else None

    @inline
    def begin(p, spare):
        """Get ready for a block: unpack its scales, where it has sub-blocks; their place, and that of the minima."""
        prefetch(p + ahead, head)
        if super_:
            read_scales(p, spare, spare + 16 * vector)
        return spare, spare + 16 * vector

    @inline
    def alone(p, x, n_blocks, spare):
        """One token's sums with a band."""
        total = splat_f32(0.0, lanes)
        for _ in range(n_blocks // n_sub):
            scales, minima = begin(p, spare)
            q = p + head
            for i in range(n_sub):
                prefetch(q + ahead, planes)
                total = extend(load_band(q, bits), scales_of(p, scales, minima, i), x, total)
                q += planes
                x += x_bytes
            p = q
        return total

    @inline
    def several(p, x, n_blocks, spare, totals, count):
        """The same of `count` tokens, whose blocks lie side by side; their sums are at `totals`."""
        for token in range(count):
            store(totals + token * vector, splat_f32(0.0, lanes))
        for _ in range(n_blocks // n_sub):
            scales, minima = begin(p, spare)
            q = p + head
            for i in range(n_sub):
                prefetch(q + ahead, planes)
                us, own = load_band(q, bits), scales_of(p, scales, minima, i)
                for token in range(count):
                    at = totals + token * vector
                    store(at, extend(us, own, x + token * x_bytes, load_f32(at, lanes)))
                q += planes
                x += count * x_bytes
            p = q

    @inline
    def write(args, total, out, r, n, spare):
        """One token's outputs of a band."""
        bias, add = i64_at(args + args_of.bias), i64_at(args + args_of.add)
        if r + lanes <= n:
            if bias != 0:
                total = total + load_f32(bias + r * 4, lanes)
            if add != 0:
                total = total + load_f32(out, lanes)
            store(out, total)
        else:
            store(spare, total)
            for i in range(n - r):
                value = f32_at(spare + i * 4)
                if bias != 0:
                    value += f32_at(bias + (r + i) * 4)
                if add != 0:
                    value += f32_at(out + i * 4)
                put_f32(out + i * 4, value)

    def bands(args, step, ith, turn):
        n_tok = i64_at(step + i64_at(args + args_of.count))
        w, out, k, n = (
            i64_at(args + args_of.w),
            i64_at(args + args_of.out),
            i64_at(args + args_of.k),
            i64_at(args + args_of.n),
        )
        stride, xb, band_bytes = (
            i64_at(args + args_of.out_stride),
            i64_at(args + args_of.xb),
            i64_at(args + args_of.band_bytes),
        )
        spare = i64_at(args + args_of.scratch) + ith * i64_at(args + args_of.scratch_bytes)
        totals = spare + 32 * vector
        n_blocks, n_bands = k // 32, (n + lanes - 1) // lanes
        chunk = i64_at(args + args_of.chunk) if n_tok < most else i64_at(args + args_of.large)
        n_chunks = (n_bands + chunk - 1) // chunk
        while True:
            first = take_near(args, turn, n_chunks, ith, args + args_of.regions) * chunk
            if first < 0:
                break
            last = min(first + chunk, n_bands)
            for t0 in range(0, n_tok, most):
                count = min(most, n_tok - t0)
                x = xb + t0 * n_blocks * x_bytes
                for g in range(first, last):
                    r, p = g * lanes, w + g * band_bytes
                    target = out + (t0 * stride + r) * 4
                    if count == 1:
                        write(args, alone(p, x, n_blocks, spare), target, r, n, spare)
                    else:
                        several(p, x, n_blocks, spare, totals, count)
                        for token in range(count):
                            total = load_f32(totals + token * vector, lanes)
                            write(args, total, target + token * stride * 4, r, n, spare)
            finish(args)
        return n_chunks

    return bands

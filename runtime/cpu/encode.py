"""Encoders: float32 weights into the blocks of a GGUF type, 16 blocks (or the sub-blocks of one) side by side."""

from __future__ import annotations

from typing import Any

from .encode_layout import Encode
from .loads import (
    f32_at,
    i64_at,
    load_f16,
    load_f32,
    load_i8,
    put_f16,
    put_f32,
    put_i32,
    store,
    store_dwords,
    store_f16,
    u8_at,
)
from .scale_search import asymmetric, inverse, rounder, symmetric
from .simd import (
    as_i32,
    band,
    bor,
    fma,
    hmax,
    hsum,
    less,
    narrow_i8,
    narrow_i16,
    round_to_i32,
    shl,
    shr,
    splat_f32,
    to_i32,
    vabs,
    vsqrt,
    where_less,
)
from .tape import finish, take
from .vector import LANES
from .weights import inline

BLOCKS = 16  # of 32 weights, encoded side by side
# In a thread's scratch, after the values: what their errors count, integers as bytes, scales, blocks of half a group.
WEIGHTS, BYTES, SCALES, SPARE = 2048, 4096, 4608, 5120
CHUNK = 16384  # weights that a thread takes at a time


def build(family: str, variant: str) -> Any:
    """`encode:TYPE`: rows of x as rows of blocks."""
    if variant in ("F32", "F16", "BF16"):
        return _floats(variant)
    if variant == "Q8_0":
        return _q8_0()
    if variant in ("Q4_0", "Q5_0"):
        return groups(BLOCKS, 32, *_symmetric(16 if variant == "Q5_0" else 8))
    if variant in ("Q4_1", "Q5_1"):
        return groups(BLOCKS, 32, *_asymmetric(31 if variant == "Q5_1" else 15))
    from .encode_k import encoder

    return groups(*encoder(variant))


def groups(lanes: int, size: int, n_bytes: int, encode_group: Any) -> Any:
    """A kernel that encodes groups of `lanes` blocks of `size` weights.

    encode_group: (x, w, scratch, out), with x and w float32 [size][lanes]; n_bytes: what it writes for a block, or for
    the group if lanes * size is 256.
    """
    args_of = Encode
    whole = lanes * size == 256  # the group is a super-block
    per_chunk = CHUNK // (lanes * size)
    out_bytes = n_bytes if whole else lanes * n_bytes
    weights_at, spare_at = WEIGHTS, SPARE
    weigh = weigher(lanes, size)

    def encode(args, step, ith, turn):
        x, out, k = i64_at(args + args_of.x), i64_at(args + args_of.out), i64_at(args + args_of.k)
        importance = i64_at(args + args_of.importance)
        scratch = i64_at(args + args_of.scratch) + ith * i64_at(args + args_of.scratch_bytes)
        n = i64_at(args + args_of.rows) * (k // size)
        n_groups = (n + lanes - 1) // lanes
        n_chunks = (n_groups + per_chunk - 1) // per_chunk
        while True:
            c = take(args, turn, n_chunks)
            if c < 0:
                break
            for g in range(c * per_chunk, min((c + 1) * per_chunk, n_groups)):
                for lane in range(lanes):
                    block = min(g * lanes + lane, n - 1)
                    source = x + block * (size * 4)
                    for i in range(size):
                        put_f32(scratch + (i * lanes + lane) * 4, f32_at(source + i * 4))
                    if importance != 0:
                        source = importance + block * size % k * 4
                        for i in range(size):
                            put_f32(scratch + weights_at + (i * lanes + lane) * 4, f32_at(source + i * 4))
                weigh(scratch, scratch + weights_at, importance != 0)
                to = out + g * out_bytes
                if whole or (g + 1) * lanes <= n:
                    encode_group(scratch, scratch + weights_at, scratch, to)
                else:
                    encode_group(scratch, scratch + weights_at, scratch, scratch + spare_at)
                    for i in range(0, (n - g * lanes) * n_bytes, 2):
                        store(to + i, load_i8(scratch + spare_at + i, 2))
            finish(args)
        return n_chunks

    return encode


def weigher(lanes: int, size: int) -> Any:
    """(x, w, given): what each weight's error counts: 1 + |x| / their root mean square, or the given importance."""
    row = 4 * lanes
    inverted = inverse(lanes)

    @inline
    def weigh(x, w, given):
        one, least = splat_f32(1.0, lanes), splat_f32(1e-6, lanes)
        total = splat_f32(0.0, lanes)
        if given:
            for i in range(size):
                total = total + load_f32(w + i * row, lanes)
            factor = splat_f32(size * lanes, lanes) * inverted(splat_f32(hsum(total), lanes))
            for i in range(size):
                u = load_f32(w + i * row, lanes) * factor
                store(w + i * row, where_less(u, least, least, u))
        else:
            for i in range(size):
                v = load_f32(x + i * row, lanes)
                total = fma(v, v, total)
            factor = inverted(vsqrt(total * splat_f32(1.0 / size, lanes)))
            for i in range(size):
                store(w + i * row, fma(vabs(load_f32(x + i * row, lanes)), factor, one))

    return weigh


def bytes_writer(lanes: int, size: int) -> Any:
    """(q0, q1, q2, q3, to): four integers of each lane (float32) as bytes at to + lane * size; their high bits."""

    @inline
    def write(q0, q1, q2, q3, to):
        a, b, c, d = to_i32(q0), to_i32(q1), to_i32(q2), to_i32(q3)
        store_dwords(to, bor(bor(a, shl(b, 8)), bor(shl(c, 16), shl(d, 24))), size)

    return write


def _symmetric(half: int) -> tuple[int, Any]:
    lanes, size, row, five = BLOCKS, 32, 4 * BLOCKS, half == 16
    search = symmetric(lanes, size, half, (half - 1.2, 0.2, 12), 2)
    rounded, inverted, write = rounder(lanes, -half, half - 1), inverse(lanes), bytes_writer(lanes, size)
    pack, n_bytes = _packer(2, five), 22 if five else 18
    bytes_at, scales_at = BYTES, SCALES

    @inline
    def encode_group(x, w, scratch, out):
        store_f16(scratch + scales_at, limited(search(x, w)))
        inv = inverted(load_f16(scratch + scales_at, lanes))
        offset = splat_f32(half, lanes)
        for i in range(0, size, 4):
            at = x + i * row
            q0 = rounded(load_f32(at, lanes) * inv) + offset
            q1 = rounded(load_f32(at + row, lanes) * inv) + offset
            q2 = rounded(load_f32(at + 2 * row, lanes) * inv) + offset
            q3 = rounded(load_f32(at + 3 * row, lanes) * inv) + offset
            write(q0, q1, q2, q3, scratch + bytes_at + i)
        for lane in range(lanes):
            to = out + lane * n_bytes
            store(to, load_i8(scratch + scales_at + lane * 2, 2))
            pack(scratch + bytes_at + lane * 32, to)

    return n_bytes, encode_group


def _asymmetric(most: int) -> tuple[int, Any]:
    lanes, size, row, five = BLOCKS, 32, 4 * BLOCKS, most == 31
    search = asymmetric(lanes, size, most, (most - 1.0, 0.15, 14), 3, True)
    rounded, inverted, write = rounder(lanes, 0, most), inverse(lanes), bytes_writer(lanes, size)
    pack, n_bytes = _packer(4, five), 24 if five else 20
    bytes_at, scales_at = BYTES, SCALES

    @inline
    def encode_group(x, w, scratch, out):
        scale, minimum = search(x, w)
        store_f16(scratch + scales_at, limited(scale))
        store_f16(scratch + scales_at + 32, limited(minimum))
        inv = inverted(load_f16(scratch + scales_at, lanes))
        shift = splat_f32(0.0, lanes) - load_f16(scratch + scales_at + 32, lanes) * inv
        for i in range(0, size, 4):
            at = x + i * row
            q0 = rounded(fma(load_f32(at, lanes), inv, shift))
            q1 = rounded(fma(load_f32(at + row, lanes), inv, shift))
            q2 = rounded(fma(load_f32(at + 2 * row, lanes), inv, shift))
            q3 = rounded(fma(load_f32(at + 3 * row, lanes), inv, shift))
            write(q0, q1, q2, q3, scratch + bytes_at + i)
        for lane in range(lanes):
            to = out + lane * n_bytes
            store(to, load_i8(scratch + scales_at + lane * 2, 2))
            store(to + 2, load_i8(scratch + scales_at + 32 + lane * 2, 2))
            pack(scratch + bytes_at + lane * 32, to)

    return n_bytes, encode_group


@inline
def limited(scale):
    """Scales within float16's range."""
    most, least = splat_f32(65504.0, 16), splat_f32(-65504.0, 16)
    scale = where_less(scale, most, scale, most)
    return where_less(least, scale, scale, least)


def _packer(at: int, five: bool) -> Any:
    """(q, to): 32 bytes as nibbles, the first half low, after the scales of the block at `to`; fifth bits before."""

    @inline
    def pack(q, to):
        low, high = load_i8(q, 16), load_i8(q + 16, 16)
        if five:
            put_i32(to + at, high_bits(q))
            store(to + at + 4, bor(band(low, 15), shl(high, 4)))
        else:
            store(to + at, bor(low, shl(high, 4)))

    return pack


@inline
def high_bits(q):
    """Bit 4 of each of 32 bytes, as 32 bits."""
    word = 0
    for i in range(32):
        word |= (u8_at(q + i) >> 4) << i
    return word


def _q8_0() -> Any:
    args_of, per_chunk = Encode, CHUNK // 32

    def encode(args, step, ith, turn):
        x, out = i64_at(args + args_of.x), i64_at(args + args_of.out)
        n = i64_at(args + args_of.rows) * (i64_at(args + args_of.k) // 32)
        n_chunks = (n + per_chunk - 1) // per_chunk
        while True:
            c = take(args, turn, n_chunks)
            if c < 0:
                break
            for b in range(c * per_chunk, min((c + 1) * per_chunk, n)):
                v, to = load_f32(x + b * 128, 32), out + b * 34
                scale = min(hmax(vabs(v)) * (1.0 / 127.0), 65504.0)
                put_f16(to, scale)
                inv = 1.0 / scale if scale > 1e-30 else 0.0
                store(to + 2, narrow_i8(round_to_i32(v * splat_f32(inv, 32))))
            finish(args)
        return n_chunks

    return encode


def _floats(variant: str) -> Any:
    args_of, lanes, chunk = Encode, LANES, CHUNK
    put = store_f16 if variant == "F16" else store_bf16

    def encode(args, step, ith, turn):
        x, out = i64_at(args + args_of.x), i64_at(args + args_of.out)
        n = i64_at(args + args_of.rows) * i64_at(args + args_of.k)
        n_chunks = (n + chunk - 1) // chunk
        while True:
            c = take(args, turn, n_chunks)
            if c < 0:
                break
            i, end = c * chunk, min((c + 1) * chunk, n)
            while i + lanes <= end:
                put(out + i * 2, load_f32(x + i * 4, lanes))
                i += lanes
            while i < end:
                put(out + i * 2, load_f32(x + i * 4, 1))
                i += 1
            finish(args)
        return n_chunks

    return encode


@inline
def store_bf16(address, v):
    """Store a float32 vector as bfloat16, to nearest, ties to even."""
    bits = as_i32(v)
    store(address, narrow_i16(shr(less(bits + band(shr(bits, 16), 1), -0x7FFF), 16)))

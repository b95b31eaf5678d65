"""Dot products of bytes; register tiles: tuples of vectors, one a token, that stay in registers."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import emit_reduce
from .vector import F32, I8, I16, I32, I64, LEVEL, SOFT_HALF, call, const, load_from, shuffle, splat_of, store_to


def emit_dot(b, acc, u, s, big):
    """acc[i] += 4 products of unsigned bytes `u` and signed bytes `s`, exactly.

    `big`: u may exceed 127. The short form of avx2 sums pairs in 16 bits and would saturate there.
    """
    n = u.type.count
    ints = acc.type
    if LEVEL.name == "avx512vnni":
        return call(b, f"llvm.x86.avx512.vpdpbusd.{n * 8}", ints, acc, u, s)
    if LEVEL.name == "avx2" and n == 32:
        ones, shorts = const(I16, [1] * 16), ir.VectorType(I16, 16)
        if not big:
            pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", shorts, u, s)
            return b.add(acc, call(b, "llvm.x86.avx2.pmadd.wd", ints, pairs, ones))
        for mask, weight in ((0x7F, None), (0x80, 1)):  # u = low 7 bits + 128 * top bit
            bits = b.and_(u, const(I8, [mask] * n))
            if weight:
                bits = b.lshr(bits, const(I8, [7] * n))
            pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", shorts, bits, s)
            acc = b.add(acc, call(b, "llvm.x86.avx2.pmadd.wd", ints, pairs, const(I16, [128 if weight else 1] * 16)))
        return acc
    words = ir.VectorType(I32, n)
    product = b.mul(b.zext(u, words), b.sext(s, words))
    pairs = b.add(shuffle(b, product, product, range(0, n, 2)), shuffle(b, product, product, range(1, n, 2)))
    return b.add(
        acc, b.add(shuffle(b, pairs, pairs, range(0, n // 2, 2)), shuffle(b, pairs, pairs, range(1, n // 2, 2)))
    )


@intrinsic(prefer_literal=True)
def dot4(typingctx, acc, u, s, big):
    """acc (i32 lanes) += dot products of 4 neighbouring bytes, `u` unsigned times `s` signed."""
    return acc(acc, u, s, big), lambda c, b, sig, args: emit_dot(b, *args[:3], big.literal_value)


@intrinsic(prefer_literal=True)
def tile_zero(typingctx, like, n):
    """A tile of n zero vectors of the type of `like`."""
    ty = types.UniTuple(like, n.literal_value)
    return ty(like, n), lambda c, b, sig, args: cgutils.pack_array(b, [ir.Constant(like.llvm, None)] * n.literal_value)


@intrinsic(prefer_literal=True)
def tile_dot4(typingctx, tile, u, address, big):
    """tile[t] += dot4(u, the 4 bytes at address + 4 t, in every lane)."""
    vec = tile.dtype

    def codegen(context, b, sig, args):
        out = []
        for t in range(tile.count):
            word = load_from(b, b.add(args[2], I64(4 * t)), I32)
            s = b.bitcast(splat_of(b, word, vec.n), ir.VectorType(I8, 4 * vec.n))
            out.append(emit_dot(b, b.extract_value(args[0], t), args[1], s, big.literal_value))
        return cgutils.pack_array(b, out)

    return tile(tile, u, types.intp, big), codegen


@intrinsic
def tile_dot4_by(typingctx, tile, address, stride, s):
    """tile[t] += dot4(the 4 unsigned bytes at address + t * stride, in every lane, s)."""
    vec = tile.dtype

    def codegen(context, b, sig, args):
        out = []
        for t in range(tile.count):
            word = load_from(b, b.add(args[1], b.mul(args[2], I64(t))), I32)
            u = b.bitcast(splat_of(b, word, vec.n), ir.VectorType(I8, 4 * vec.n))
            out.append(emit_dot(b, b.extract_value(args[0], t), u, args[3], True))
        return cgutils.pack_array(b, out)

    return tile(tile, types.intp, types.intp, s), codegen


@intrinsic(prefer_literal=True)
def tile_splat_i32(typingctx, like, address, n):
    """A tile of n vectors of the type of `like`, with the integer at address + 4 t in every lane."""
    ty = types.UniTuple(like, n.literal_value)

    def codegen(context, b, sig, args):
        words = [load_from(b, b.add(args[1], I64(4 * t)), I32) for t in range(n.literal_value)]
        return cgutils.pack_array(b, [splat_of(b, word, like.n) for word in words])

    return ty(like, types.intp, n), codegen


def emit_fma(b, x, y, z):
    name = "fmuladd" if SOFT_HALF else "fma"
    return call(b, f"llvm.{name}.v{x.type.count}f32", x.type, x, y, z)


def _tile_scalars(b, address, t, n):
    return splat_of(b, load_from(b, b.add(address, I64(4 * t)), F32), n)


@intrinsic
def tile_fma(typingctx, tile, v, address):
    """tile[t] += v * (float at address + 4 t)."""

    def codegen(context, b, sig, args):
        out = []
        for t in range(tile.count):
            x = _tile_scalars(b, args[2], t, v.n)
            out.append(emit_fma(b, args[1], x, b.extract_value(args[0], t)))
        return cgutils.pack_array(b, out)

    return tile(tile, v, types.intp), codegen


@intrinsic
def tile_fma_by(typingctx, tile, v, address, stride):
    """tile[t] += v * (float at address + t * stride)."""

    def codegen(context, b, sig, args):
        out = []
        for t in range(tile.count):
            x = _tile_scalars(b, b.add(args[2], b.mul(args[3], I64(t))), 0, v.n)
            out.append(emit_fma(b, args[1], x, b.extract_value(args[0], t)))
        return cgutils.pack_array(b, out)

    return tile(tile, v, types.intp, types.intp), codegen


@intrinsic
def tile_scale(typingctx, tile, ints, v, address):
    """tile[t] += ints[t] * v * (float at address + 4 t)."""

    def codegen(context, b, sig, args):
        out = []
        for t in range(tile.count):
            x = b.fmul(args[2], _tile_scalars(b, args[3], t, v.n))
            value = b.sitofp(b.extract_value(args[1], t), v.llvm)
            out.append(emit_fma(b, value, x, b.extract_value(args[0], t)))
        return cgutils.pack_array(b, out)

    return tile(tile, ints, v, types.intp), codegen


@intrinsic
def tile_add(typingctx, x, y):
    """x[t] + y[t], of vectors or of numbers."""

    def codegen(context, b, sig, args):
        pairs = [(b.extract_value(args[0], t), b.extract_value(args[1], t)) for t in range(x.count)]
        return cgutils.pack_array(b, [b.fadd(left, right) for left, right in pairs])

    return x(x, y), codegen


@intrinsic
def tile_words(typingctx, high, low):
    """256 * high[t] + low[t], of integers."""

    def codegen(context, b, sig, args):
        eight, out = const(I32, [8] * high.dtype.n), []
        for t in range(high.count):
            out.append(b.add(b.shl(b.extract_value(args[0], t), eight), b.extract_value(args[1], t)))
        return cgutils.pack_array(b, out)

    return high(high, low), codegen


@intrinsic
def tile_hsum(typingctx, tile):
    """The sum of each vector's lanes."""

    def codegen(context, b, sig, args):
        return cgutils.pack_array(b, [emit_reduce(b, b.extract_value(args[0], t), "add") for t in range(tile.count)])

    return types.UniTuple(types.float32, tile.count)(tile), codegen


@intrinsic(prefer_literal=True)
def tile_load(typingctx, like, address, stride, n):
    """A tile of n vectors of the type of `like`, from address, address + stride, ..."""
    ty = types.UniTuple(like, n.literal_value)

    def codegen(context, b, sig, args):
        at = [b.add(args[1], b.mul(args[2], I64(t))) for t in range(n.literal_value)]
        return cgutils.pack_array(b, [load_from(b, address, like.llvm) for address in at])

    return ty(like, types.intp, types.intp, n), codegen


@intrinsic
def tile_store(typingctx, address, tile, stride):
    """Store the vectors of a tile at address, address + stride, ..."""

    def codegen(context, b, sig, args):
        for t in range(tile.count):
            store_to(b, b.extract_value(args[1], t), b.add(args[0], b.mul(args[2], I64(t))))
        return context.get_dummy_value()

    return types.void(types.intp, tile, types.intp), codegen

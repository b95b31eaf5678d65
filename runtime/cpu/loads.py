"""Loads and stores of scalars and vectors, as Numba intrinsics; addresses are plain integers."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .vector import (
    ELEMENTS,
    F32,
    I8,
    I16,
    I32,
    I64,
    WIDE,
    Vec,
    call,
    const,
    float_to_half,
    half_to_float,
    join,
    load_from,
    pointer,
    shuffle,
    splat_of,
    store_to,
)


def _scalar_load(result, ty, convert=None):
    @intrinsic
    def get(typingctx, address):
        def codegen(context, builder, sig, args):
            value = load_from(builder, args[0], ty)
            return convert(builder, value) if convert else value

        return result(types.intp), codegen

    return get


def _half_scalar(builder, bits):
    one = builder.insert_element(ir.Constant(ir.VectorType(I16, 4), [0] * 4), bits, I32(0))
    return builder.extract_element(half_to_float(builder, one), I32(0))


i64_at = _scalar_load(types.int64, I64)
i32_at = _scalar_load(types.int32, I32)
f32_at = _scalar_load(types.float32, F32)
f64_at = _scalar_load(types.float64, ir.DoubleType())
i8_at = _scalar_load(types.int32, I8, lambda b, v: b.sext(v, I32))
u8_at = _scalar_load(types.int32, I8, lambda b, v: b.zext(v, I32))
f16_at = _scalar_load(types.float32, I16, _half_scalar)


def _scalar_store(arg, convert=None):
    @intrinsic
    def put(typingctx, address, value):
        def codegen(context, builder, sig, args):
            store_to(builder, convert(builder, args[1]) if convert else args[1], args[0])
            return context.get_dummy_value()

        return types.void(types.intp, arg), codegen

    return put


put_f32 = _scalar_store(types.float32)
put_i8 = _scalar_store(types.int32, lambda b, v: b.trunc(v, I8))
put_i32 = _scalar_store(types.int32)
put_i64 = _scalar_store(types.int64)


@intrinsic
def put_f16(typingctx, address, value):
    """Store one float32 as float16."""

    def codegen(context, builder, sig, args):
        bits = float_to_half(builder, splat_of(builder, args[1], 4))
        store_to(builder, builder.extract_element(bits, I32(0)), args[0])
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), codegen


def _loader(elt, raw=None, convert=None):
    @intrinsic(prefer_literal=True)
    def load(typingctx, address, n):
        vec = Vec(elt, n.literal_value)

        def codegen(context, builder, sig, args):
            value = load_from(builder, args[0], ir.VectorType(raw or ELEMENTS[elt], vec.n))
            return convert(builder, value) if convert else value

        return vec(types.intp, n), codegen

    return load


load_i8, load_i32, load_f32 = _loader("i8"), _loader("i32"), _loader("f32")
load_f16 = _loader("f32", I16, half_to_float)
load_bf16 = _loader(
    "f32",
    I16,
    lambda b, v: b.bitcast(
        b.shl(b.zext(v, ir.VectorType(I32, v.type.count)), const(I32, [16] * v.type.count)),
        ir.VectorType(F32, v.type.count),
    ),
)


@intrinsic
def store(typingctx, address, v):
    """Store a vector."""

    def codegen(context, builder, sig, args):
        store_to(builder, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.intp, v), codegen


@intrinsic
def store_f16(typingctx, address, v):
    """Store a float32 vector as float16."""

    def codegen(context, builder, sig, args):
        store_to(builder, float_to_half(builder, args[1]), args[0])
        return context.get_dummy_value()

    return types.void(types.intp, v), codegen


@intrinsic
def store_dwords(typingctx, address, v, stride):
    """Store the 4-byte pieces of `v` at `address`, `address + stride`, ..."""

    def codegen(context, builder, sig, args):
        n = v.n * ELEMENTS[v.elt].width // 32 if v.elt != "f32" else v.n
        words = builder.bitcast(args[1], ir.VectorType(I32, n))
        for i in range(n):
            at = builder.add(args[0], builder.mul(args[2], I64(i)))
            store_to(builder, builder.extract_element(words, I32(i)), at)
        return context.get_dummy_value()

    return types.void(types.intp, v, types.intp), codegen


@intrinsic
def store_halves(typingctx, address, v, stride):
    """Store a float32 vector as float16 at `address`, `address + stride`, ..."""

    def codegen(context, builder, sig, args):
        halves = float_to_half(builder, args[1])
        for i in range(v.n):
            at = builder.add(args[0], builder.mul(args[2], I64(i)))
            store_to(builder, builder.extract_element(halves, I32(i)), at)
        return context.get_dummy_value()

    return types.void(types.intp, v, types.intp), codegen


@intrinsic
def store_bytes(typingctx, address, v, stride):
    """Store the bytes of `v` at `address`, `address + stride`, ..."""

    def codegen(context, builder, sig, args):
        for i in range(v.n):
            at = builder.add(args[0], builder.mul(args[2], I64(i)))
            store_to(builder, builder.extract_element(args[1], I32(i)), at)
        return context.get_dummy_value()

    return types.void(types.intp, v, types.intp), codegen


@intrinsic
def store_quads(typingctx, address, v0, v1, v2, v3, stride):
    """Store the 4-byte pieces of four vectors side by side: all first ones at `address`, the next at `+ stride`, ..."""

    def codegen(context, builder, sig, args):
        n = v0.n * ELEMENTS[v0.elt].width // 32 if v0.elt != "f32" else v0.n
        rows = [builder.bitcast(v, ir.VectorType(I32, n)) for v in args[1:5]]
        # In each quarter of 16 bytes, first pairs of pieces (0 0 1 1 and 2 2 3 3 of two vectors), then pairs of pairs.
        halves, ats = ((0, 1), (2, 3)), range(0, n, 4)
        low, high = ([at + i + j for at in ats for i in half for j in (0, n)] for half in halves)
        first, second = ([at + i + j for at in ats for j in (0, n) for i in half] for half in halves)
        quads = []
        for pairs in (low, high):
            a, b = shuffle(builder, rows[0], rows[1], pairs), shuffle(builder, rows[2], rows[3], pairs)
            quads += [shuffle(builder, a, b, first), shuffle(builder, a, b, second)]
        for i in range(n):
            piece = shuffle(builder, quads[i % 4], quads[i % 4], range(i // 4 * 4, i // 4 * 4 + 4))
            store_to(builder, piece, builder.add(args[0], builder.mul(args[5], I64(i))))
        return context.get_dummy_value()

    return types.void(types.intp, v0, v1, v2, v3, types.intp), codegen


@intrinsic
def four_f16(typingctx, a, b, c, d):
    """float16 at four addresses -> 4 float32 lanes."""

    def codegen(context, builder, sig, args):
        bits = ir.Constant(ir.VectorType(I16, 4), [0] * 4)
        for i, address in enumerate(args):
            bits = builder.insert_element(bits, load_from(builder, address, I16), I32(i))
        return half_to_float(builder, bits)

    return Vec("f32", 4)(*[types.intp] * 4), codegen


@intrinsic(prefer_literal=True)
def spaced_f16(typingctx, address, stride, n):
    """n float16, `stride` bytes (an even number) apart -> n float32 lanes; nothing beyond the last is read."""
    step, count = stride.literal_value, n.literal_value

    def codegen(context, builder, sig, args):
        words = ir.VectorType(I16, WIDE // 2)
        if WIDE == 64 and step * (count - 1) + 2 == 2 * WIDE:  # two registers end with the last: one permutation
            low, high = (load_from(builder, builder.add(args[0], I64(at)), words) for at in (0, WIDE))
            return half_to_float(builder, shuffle(builder, low, high, range(0, WIDE, step // 2)))
        bits = ir.Constant(ir.VectorType(I16, count), [0] * count)
        for i in range(count):
            one = load_from(builder, builder.add(args[0], I64(step * i)), I16)
            bits = builder.insert_element(bits, one, I32(i))
        return half_to_float(builder, bits)

    return Vec("f32", count)(types.intp, stride, n), codegen


@intrinsic(prefer_literal=True)
def splat_f16(typingctx, a, b, n):
    """float16 at two addresses -> n float32 lanes, the first half from `a` (converted as one vector)."""

    def codegen(context, builder, sig, args):
        half = n.literal_value // 2
        parts = [splat_of(builder, load_from(builder, args[i], I16), half) for i in range(2)]
        return half_to_float(builder, join(builder, *parts))

    return Vec("f32", n.literal_value)(types.intp, types.intp, n), codegen


@intrinsic(prefer_literal=True)
def prefetch(typingctx, address, nbytes):
    """Ask for the cache lines of [address, address + nbytes); any address is allowed."""

    def codegen(context, b, sig, args):
        for offset in range(0, nbytes.literal_value, 64):
            line = pointer(b, b.add(args[0], I64(offset)), I8)
            call(b, "llvm.prefetch.p0", ir.VoidType(), line, I32(0), I32(3), I32(1))
        return context.get_dummy_value()

    return types.void(types.intp, nbytes), codegen

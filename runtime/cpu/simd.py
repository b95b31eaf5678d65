"""Arithmetic on vectors, as Numba intrinsics: making, rearranging, converting, calculating and reducing."""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from .vector import (
    ELEMENTS,
    F32,
    I8,
    I32,
    I64,
    LEVEL,
    SCALARS,
    SOFT_HALF,
    Vec,
    call,
    const,
    join,
    piece,
    shuffle,
    splat_of,
)


@intrinsic(prefer_literal=True)
def splat_f32(typingctx, x, n):
    vec = Vec("f32", n.literal_value)
    return vec(types.float32, n), lambda context, b, sig, args: splat_of(b, args[0], vec.n)


@intrinsic(prefer_literal=True)
def splat_i32(typingctx, x, n):
    vec = Vec("i32", n.literal_value)
    return vec(types.int32, n), lambda context, b, sig, args: splat_of(b, args[0], vec.n)


@intrinsic(prefer_literal=True)
def lane_numbers(typingctx, n):
    """0, 1, ..., n-1 as i32."""
    vec = Vec("i32", n.literal_value)
    return vec(n), lambda context, b, sig, args: const(I32, range(vec.n))


@intrinsic
def concat(typingctx, a, b):
    """`a` then `b`."""
    return Vec(a.elt, 2 * a.n)(a, b), lambda context, builder, sig, args: join(builder, *args)


@intrinsic(prefer_literal=True)
def part(typingctx, v, start, n):
    """n elements from `start` on."""
    s, c = start.literal_value, n.literal_value
    return Vec(v.elt, c)(v, start, n), lambda context, b, sig, args: piece(b, args[0], s, c)


@intrinsic(prefer_literal=True)
def spread(typingctx, v, start, repeat, n):
    """n lanes: elements start, start+1, ... of `v`, each `repeat` times."""
    s, r, c = start.literal_value, repeat.literal_value, n.literal_value

    def codegen(context, b, sig, args):
        return shuffle(b, args[0], args[0], [s + i // r for i in range(c)])

    return Vec(v.elt, c)(v, start, repeat, n), codegen


@intrinsic
def swap_pairs(typingctx, v):
    """Elements 1, 0, 3, 2, ..."""
    return v(v), lambda context, b, sig, args: shuffle(b, args[0], args[0], [i ^ 1 for i in range(v.n)])


@intrinsic
def negate_even(typingctx, v):
    """-v[0], v[1], -v[2], ..."""

    def codegen(context, b, sig, args):
        return b.fmul(args[0], const(F32, [-1.0, 1.0] * (v.n // 2)))

    return v(v), codegen


def _byte_constant(name):
    def make(op):
        @intrinsic(prefer_literal=True)
        def apply(typingctx, v, k):
            value = k.literal_value

            def codegen(context, b, sig, args):
                return op(b, args[0], const(ELEMENTS[v.elt], [value] * v.n))

            return v(v, k), codegen

        apply.__doc__ = name
        return apply

    return make


band = _byte_constant("bitwise and with a constant")(lambda b, v, c: b.and_(v, c))
bxor = _byte_constant("bitwise xor with a constant")(lambda b, v, c: b.xor(v, c))
shl = _byte_constant("shift left by a constant")(lambda b, v, c: b.shl(v, c))
less = _byte_constant("subtract a constant")(lambda b, v, c: b.sub(v, c))
shr = _byte_constant("logical shift right by a constant")(lambda b, v, c: b.lshr(v, c))


@intrinsic
def bor(typingctx, a, b):
    """Bitwise or."""
    return a(a, b), lambda context, builder, sig, args: builder.or_(*args)


@intrinsic
def nibbles(typingctx, v):
    """Each 16-byte group -> its 16 low nibbles, then its 16 high ones."""
    groups = v.n // 16

    def codegen(context, b, sig, args):
        index = [g * 16 + i for g in range(groups) for _ in range(2) for i in range(16)]
        twice = shuffle(b, args[0], args[0], index)
        # Shift as 64-bit lanes (x86 has no 8-bit shift); the mask drops what crosses over.
        quads = b.bitcast(twice, ir.VectorType(I64, v.n // 4))
        moved = b.lshr(quads, const(I64, [0, 0, 4, 4] * groups))
        return b.and_(b.bitcast(moved, ir.VectorType(I8, 2 * v.n)), const(I8, [15] * (2 * v.n)))

    return Vec("i8", 2 * v.n)(v), codegen


@intrinsic(prefer_literal=True)
def nibbles_to_f32(typingctx, v, offset):
    """16 bytes -> their low nibbles, then their high ones, each less a constant, as floats."""
    values = [float(i - offset.literal_value) for i in range(16)]

    def codegen(context, b, sig, args):
        words = b.zext(args[0], ir.VectorType(I32, 16))
        high = b.lshr(words, const(I32, [4] * 16))
        if LEVEL.name == "avx512vnni":  # a table: permute looks at the low 4 bits of an index only
            floats, table = ir.VectorType(F32, 16), const(F32, values)
            low, high = (call(b, "llvm.x86.avx512.permvar.sf.512", floats, table, index) for index in (words, high))
            return join(b, low, high)
        both = join(b, b.and_(words, const(I32, [15] * 16)), high)
        signed = b.sub(both, const(I32, [offset.literal_value] * 32))
        return b.sitofp(signed, ir.VectorType(F32, 32))

    return Vec("f32", 32)(v, offset), codegen


@intrinsic(prefer_literal=True)
def bits_to_bytes(typingctx, mask, value):
    """The 32 bits of an integer -> 32 bytes, `value` where the bit is set."""

    def codegen(context, b, sig, args):
        flags = b.bitcast(b.trunc(args[0], I32), ir.VectorType(ir.IntType(1), 32))
        return b.select(flags, const(I8, [value.literal_value] * 32), const(I8, [0] * 32))

    return Vec("i8", 32)(types.int64, value), codegen


@intrinsic
def bytes_of(typingctx, word):
    """A 64-bit integer as 8 bytes."""
    return Vec("i8", 8)(types.int64), lambda c, b, sig, args: b.bitcast(args[0], ir.VectorType(I8, 8))


def _convert(elt, emit):
    @intrinsic
    def convert(typingctx, v):
        out = Vec(elt, v.n)
        return out(v), lambda context, b, sig, args: emit(b, args[0], out.llvm)

    return convert


to_f32 = _convert("f32", lambda b, v, t: b.sitofp(v, t))  # from i32, or signed i8
unsigned_to_f32 = _convert("f32", lambda b, v, t: b.uitofp(v, t))
to_i32 = _convert("i32", lambda b, v, t: b.fptosi(v, t))  # toward zero
narrow_i8 = _convert("i8", lambda b, v, t: b.trunc(v, t))
narrow_i16 = _convert("i16", lambda b, v, t: b.trunc(v, t))
as_f32 = _convert("f32", lambda b, v, t: b.bitcast(v, t))
as_i32 = _convert("i32", lambda b, v, t: b.bitcast(v, t))


def _unary(name):
    @intrinsic
    def apply(typingctx, v):
        return v(v), lambda c, b, sig, args: call(b, f"llvm.{name}.v{v.n}f32", v.llvm, args[0])

    return apply


def _binary(name):
    @intrinsic
    def apply(typingctx, a, b):
        return a(a, b), lambda c, bd, sig, args: call(bd, f"llvm.{name}.v{a.n}f32", a.llvm, *args)

    return apply


vabs, vsqrt, vmax, vmin = _unary("fabs"), _unary("sqrt"), _binary("maxnum"), _binary("minnum")


@intrinsic
def round_to_i32(typingctx, v):
    """float32 -> i32, to nearest, ties to even, for |v| < 2**22 (the classic magic-number addition)."""
    out = Vec("i32", v.n)

    def codegen(context, b, sig, args):
        magic = b.fadd(args[0], const(F32, [12582912.0] * v.n))
        return b.sub(b.bitcast(magic, out.llvm), const(I32, [0x4B400000] * v.n))

    return out(v), codegen


def _arith(op, float_op, int_op):
    @intrinsic
    def apply(typingctx, a, b):
        return a(a, b), lambda c, bd, sig, args: getattr(bd, float_op if a.elt == "f32" else int_op)(*args)

    @overload(op)
    def vec_op(a, b):
        if isinstance(a, Vec) and isinstance(b, Vec):
            return lambda a, b: apply(a, b)

    return apply


vadd = _arith(operator.add, "fadd", "add")
vsub = _arith(operator.sub, "fsub", "sub")
vmul = _arith(operator.mul, "fmul", "mul")


@intrinsic
def vdiv(typingctx, a, b):
    return a(a, b), lambda c, bd, sig, args: bd.fdiv(*args)


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c."""
    name = f"llvm.fma.v{a.n}f32" if not SOFT_HALF else f"llvm.fmuladd.v{a.n}f32"
    return a(a, b, c), lambda ctx, bd, sig, args: call(bd, name, a.llvm, *args)


@intrinsic
def where_less(typingctx, a, b, yes, no):
    """Lane by lane: yes where a < b, else no (with a NaN too)."""

    def codegen(context, bd, sig, args):
        compare = bd.fcmp_ordered if a.elt == "f32" else bd.icmp_signed
        return bd.select(compare("<", args[0], args[1]), args[2], args[3])

    return yes(a, b, yes, no), codegen


@intrinsic
def bits_less(typingctx, a, b):
    """One bit a lane, the first lowest: whether a < b."""

    def codegen(context, bd, sig, args):
        flags = bd.fcmp_ordered("<", args[0], args[1])
        return bd.zext(bd.bitcast(flags, ir.IntType(a.n)), I64)

    return types.int64(a, b), codegen


def _count_bits(name, *extra):
    @intrinsic
    def apply(typingctx, x):
        return types.int64(types.int64), lambda c, b, sig, args: call(b, f"llvm.{name}.i64", I64, args[0], *extra)

    return apply


count_ones, lowest_bit = _count_bits("ctpop"), _count_bits("cttz", ir.Constant(ir.IntType(1), 1))


def emit_reduce(b, x, name):
    """The sum ("add") or the largest ("max") of a vector's lanes."""
    n, floats = x.type.count, x.type.element == F32
    while n > 1:  # halves: a tree, the same order on every level
        n //= 2
        low, high = piece(b, x, 0, n), piece(b, x, n, n)
        if name == "max":
            x = call(b, f"llvm.maxnum.v{n}f32", low.type, low, high)
        else:
            x = b.fadd(low, high) if floats else b.add(low, high)
    return b.extract_element(x, I32(0))


def _reduce(name):
    @intrinsic
    def apply(typingctx, v):
        return SCALARS[v.elt](v), lambda context, b, sig, args: emit_reduce(b, args[0], name)

    return apply


hsum, hmax = _reduce("add"), _reduce("max")

"""LLVM vectors as Numba types, so that kernels read as Python and compile to the vector unit.

`Vec(elt, n)` is a Numba type over `<n x elt>`; elements are i8, i16, i32 and f32. Signedness is a matter of the
operation, not of the type. Addresses are plain integers. Only the process that compiles kernels imports this file;
its instruction-set level comes from HOTCOLD_ISA (see isa.py) and is fixed for the life of that process.
"""

from __future__ import annotations

import operator
import os

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from .isa import LEVELS

LEVEL = LEVELS[os.environ.get("HOTCOLD_ISA") or "generic"]
WIDE = LEVEL.vector_bytes  # bytes in the widest register
LANES = WIDE // 4  # 32-bit lanes in it
_X86 = llvm.get_process_triple().startswith(("x86_64", "amd64"))
# Below avx2, x86 has no conversion instruction for float16, and LLVM would call a library that is not there.
_SOFT_HALF = _X86 and LEVEL.name == "generic"

_ELT = {"i8": ir.IntType(8), "i16": ir.IntType(16), "i32": ir.IntType(32), "f32": ir.FloatType()}
_SCALAR = {"i8": types.int32, "i16": types.int32, "i32": types.int32, "f32": types.float32}
_i8, _i16, _i32, _i64, _f32, _half = _ELT["i8"], _ELT["i16"], _ELT["i32"], ir.IntType(64), _ELT["f32"], ir.HalfType()


class Vec(types.Type):
    """A vector of `n` elements of kind `elt`."""

    def __init__(self, elt: str, n: int) -> None:
        self.elt, self.n = elt, n
        super().__init__(name=f"{elt}x{n}")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(_ELT[self.elt], self.n)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.llvm)


def const(elt: ir.Type, values) -> ir.Constant:
    """A constant LLVM vector."""
    return ir.Constant(ir.VectorType(elt, len(values)), [ir.Constant(elt, v) for v in values])


def call(builder, name: str, result, *args):
    """Call the LLVM intrinsic `name`."""
    fnty = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, fnty, name), args)


def pointer(builder, address, pointee):
    """An integer address as a pointer."""
    return builder.inttoptr(address, pointee.as_pointer())


def load_from(builder, address, ty, align=1):
    """Load a value of LLVM type `ty`."""
    value = builder.load(pointer(builder, address, ty))
    value.align = align
    return value


def store_to(builder, value, address, align=1):
    builder.store(value, pointer(builder, address, value.type)).align = align


def shuffle(builder, a, b, index):
    return builder.shuffle_vector(a, b, const(_i32, list(index)))


def splat_of(builder, scalar, n):
    one = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, n), ir.Undefined), scalar, _i32(0))
    return builder.shuffle_vector(one, one, const(_i32, [0] * n))


def join(builder, a, b):
    """Concatenate two equally long vectors."""
    n = a.type.count
    return shuffle(builder, a, b, range(2 * n))


def piece(builder, v, start, n):
    return shuffle(builder, v, v, range(start, start + n))


def half_to_float(builder, bits):
    """<n x i16> holding float16 -> <n x float>."""
    n = bits.type.count
    floats = ir.VectorType(_f32, n)
    if not _SOFT_HALF:
        return builder.fpext(builder.bitcast(bits, ir.VectorType(_half, n)), floats)
    ints = ir.VectorType(_i32, n)
    wide = builder.zext(bits, ints)
    magnitude = builder.shl(builder.and_(wide, const(_i32, [0x7FFF] * n)), const(_i32, [13] * n))
    sign = builder.shl(builder.and_(wide, const(_i32, [0x8000] * n)), const(_i32, [16] * n))
    scaled = builder.fmul(builder.bitcast(magnitude, floats), const(_f32, [2.0**112] * n))  # exponent bias 15 -> 127
    return builder.bitcast(builder.or_(builder.bitcast(scaled, ints), sign), floats)


def float_to_half(builder, v):
    """<n x float> -> <n x i16> holding float16, to nearest."""
    n = v.type.count
    shorts, ints, floats = (ir.VectorType(t, n) for t in (_i16, _i32, _f32))
    if not _SOFT_HALF:
        return builder.bitcast(builder.fptrunc(v, ir.VectorType(_half, n)), shorts)
    bits = builder.bitcast(v, ints)
    sign = builder.and_(builder.lshr(bits, const(_i32, [16] * n)), const(_i32, [0x8000] * n))
    magnitude = builder.bitcast(builder.and_(bits, const(_i32, [0x7FFFFFFF] * n)), floats)
    magnitude = call(builder, f"llvm.minnum.v{n}f32", floats, magnitude, const(_f32, [65504.0] * n))
    small = builder.bitcast(builder.fmul(magnitude, const(_f32, [2.0**-112] * n)), ints)
    odd = builder.and_(builder.lshr(small, const(_i32, [13] * n)), const(_i32, [1] * n))
    rounded = builder.lshr(builder.add(builder.add(small, const(_i32, [0xFFF] * n)), odd), const(_i32, [13] * n))
    return builder.trunc(builder.or_(rounded, sign), shorts)


# --- scalars in memory -------------------------------------------------------------------------------------------


def _scalar_load(result, ty, convert=None):
    @intrinsic
    def get(typingctx, address):
        def codegen(context, builder, sig, args):
            value = load_from(builder, args[0], ty)
            return convert(builder, value) if convert else value

        return result(types.intp), codegen

    return get


def _half_scalar(builder, bits):
    one = builder.insert_element(ir.Constant(ir.VectorType(_i16, 4), [0] * 4), bits, _i32(0))
    return builder.extract_element(half_to_float(builder, one), _i32(0))


i64_at = _scalar_load(types.int64, _i64)
i32_at = _scalar_load(types.int32, _i32)
f32_at = _scalar_load(types.float32, _f32)
f64_at = _scalar_load(types.float64, ir.DoubleType())
i8_at = _scalar_load(types.int32, _i8, lambda b, v: b.sext(v, _i32))
u8_at = _scalar_load(types.int32, _i8, lambda b, v: b.zext(v, _i32))
u16_at = _scalar_load(types.int32, _i16, lambda b, v: b.zext(v, _i32))
f16_at = _scalar_load(types.float32, _i16, _half_scalar)


def _scalar_store(arg, convert=None):
    @intrinsic
    def put(typingctx, address, value):
        def codegen(context, builder, sig, args):
            store_to(builder, convert(builder, args[1]) if convert else args[1], args[0])
            return context.get_dummy_value()

        return types.void(types.intp, arg), codegen

    return put


put_f32 = _scalar_store(types.float32)
put_i32 = _scalar_store(types.int32)


@intrinsic
def put_f16(typingctx, address, value):
    """Store one float32 as float16."""

    def codegen(context, builder, sig, args):
        bits = float_to_half(builder, splat_of(builder, args[1], 4))
        store_to(builder, builder.extract_element(bits, _i32(0)), args[0])
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), codegen


# --- vectors in memory -------------------------------------------------------------------------------------------


def _loader(elt, raw=None, convert=None):
    @intrinsic(prefer_literal=True)
    def load(typingctx, address, n):
        vec = Vec(elt, n.literal_value)

        def codegen(context, builder, sig, args):
            value = load_from(builder, args[0], ir.VectorType(raw or _ELT[elt], vec.n))
            return convert(builder, value) if convert else value

        return vec(types.intp, n), codegen

    return load


load_i8, load_i32, load_f32 = _loader("i8"), _loader("i32"), _loader("f32")
load_f16 = _loader("f32", _i16, half_to_float)
load_bf16 = _loader(
    "f32",
    _i16,
    lambda b, v: b.bitcast(
        b.shl(b.zext(v, ir.VectorType(_i32, v.type.count)), const(_i32, [16] * v.type.count)),
        ir.VectorType(_f32, v.type.count),
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
        n = v.n * _ELT[v.elt].width // 32 if v.elt != "f32" else v.n
        words = builder.bitcast(args[1], ir.VectorType(_i32, n))
        for i in range(n):
            at = builder.add(args[0], builder.mul(args[2], _i64(i)))
            store_to(builder, builder.extract_element(words, _i32(i)), at)
        return context.get_dummy_value()

    return types.void(types.intp, v, types.intp), codegen


@intrinsic(prefer_literal=True)
def splat_f16(typingctx, a, b, n):
    """float16 at two addresses -> n float32 lanes, the first half from `a` (converted as one vector)."""

    def codegen(context, builder, sig, args):
        half = n.literal_value // 2
        parts = [splat_of(builder, load_from(builder, args[i], _i16), half) for i in range(2)]
        return half_to_float(builder, join(builder, *parts))

    return Vec("f32", n.literal_value)(types.intp, types.intp, n), codegen


# --- making and rearranging --------------------------------------------------------------------------------------


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
    return vec(n), lambda context, b, sig, args: const(_i32, range(vec.n))


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


def _byte_constant(name):
    def make(op):
        @intrinsic(prefer_literal=True)
        def apply(typingctx, v, k):
            value = k.literal_value

            def codegen(context, b, sig, args):
                return op(b, args[0], const(_ELT[v.elt], [value] * v.n))

            return v(v, k), codegen

        apply.__doc__ = name
        return apply

    return make


band = _byte_constant("bitwise and with a constant")(lambda b, v, c: b.and_(v, c))
bxor = _byte_constant("bitwise xor with a constant")(lambda b, v, c: b.xor(v, c))
shl = _byte_constant("shift left by a constant")(lambda b, v, c: b.shl(v, c))
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
        quads = b.bitcast(twice, ir.VectorType(_i64, v.n // 4))
        moved = b.lshr(quads, const(_i64, [0, 0, 4, 4] * groups))
        return b.and_(b.bitcast(moved, ir.VectorType(_i8, 2 * v.n)), const(_i8, [15] * (2 * v.n)))

    return Vec("i8", 2 * v.n)(v), codegen


@intrinsic(prefer_literal=True)
def bits_to_bytes(typingctx, mask, value):
    """The 32 bits of an integer -> 32 bytes, `value` where the bit is set."""

    def codegen(context, b, sig, args):
        flags = b.bitcast(b.trunc(args[0], _i32), ir.VectorType(ir.IntType(1), 32))
        return b.select(flags, const(_i8, [value.literal_value] * 32), const(_i8, [0] * 32))

    return Vec("i8", 32)(types.int64, value), codegen


@intrinsic
def bytes_of(typingctx, word):
    """A 64-bit integer as 8 bytes."""
    return Vec("i8", 8)(types.int64), lambda c, b, sig, args: b.bitcast(args[0], ir.VectorType(_i8, 8))


# --- conversion --------------------------------------------------------------------------------------------------


def _convert(elt, emit):
    @intrinsic
    def convert(typingctx, v):
        out = Vec(elt, v.n)
        return out(v), lambda context, b, sig, args: emit(b, args[0], out.llvm)

    return convert


to_f32 = _convert("f32", lambda b, v, t: b.sitofp(v, t))  # from i32, or signed i8
unsigned_to_f32 = _convert("f32", lambda b, v, t: b.uitofp(v, t))
to_i32 = _convert("i32", lambda b, v, t: b.fptosi(v, t))  # toward zero
widen = _convert("i32", lambda b, v, t: b.sext(v, t))
narrow_i8 = _convert("i8", lambda b, v, t: b.trunc(v, t))
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


vabs, vmax, vmin = _unary("fabs"), _binary("maxnum"), _binary("minnum")


@intrinsic
def round_to_i32(typingctx, v):
    """float32 -> i32, to nearest, ties to even, for |v| < 2**22 (the classic magic-number addition)."""
    out = Vec("i32", v.n)

    def codegen(context, b, sig, args):
        magic = b.fadd(args[0], const(_f32, [12582912.0] * v.n))
        return b.sub(b.bitcast(magic, out.llvm), const(_i32, [0x4B400000] * v.n))

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
    name = f"llvm.fma.v{a.n}f32" if not _SOFT_HALF else f"llvm.fmuladd.v{a.n}f32"
    return a(a, b, c), lambda ctx, bd, sig, args: call(bd, name, a.llvm, *args)


@intrinsic
def where_less(typingctx, a, b, yes, no):
    """Lane by lane: yes where a < b (i32), else no."""

    def codegen(context, bd, sig, args):
        return bd.select(bd.icmp_signed("<", args[0], args[1]), args[2], args[3])

    return yes(a, b, yes, no), codegen


def _reduce(name, start=None):
    @intrinsic
    def apply(typingctx, v):
        def codegen(context, b, sig, args):
            x = args[0]
            n = v.n
            while n > 1:  # halves: a tree, the same order on every level
                n //= 2
                low, high = piece(b, x, 0, n), piece(b, x, n, n)
                if name == "max":
                    x = call(b, f"llvm.maxnum.v{n}f32", low.type, low, high)
                else:
                    x = b.fadd(low, high) if v.elt == "f32" else b.add(low, high)
            return b.extract_element(x, _i32(0))

        return _SCALAR[v.elt](v), codegen

    return apply


hsum, hmax = _reduce("add"), _reduce("max")


# --- dot products ------------------------------------------------------------------------------------------------


def emit_dot(b, acc, u, s, big):
    """acc[i] += 4 products of unsigned bytes `u` and signed bytes `s`, exactly.

    `big`: u may exceed 127. The short form of avx2 sums pairs in 16 bits and would saturate there.
    """
    n = u.type.count
    ints = acc.type
    if LEVEL.name == "avx512vnni":
        return call(b, f"llvm.x86.avx512.vpdpbusd.{n * 8}", ints, acc, u, s)
    if LEVEL.name == "avx2" and n == 32:
        ones, shorts = const(_i16, [1] * 16), ir.VectorType(_i16, 16)
        if not big:
            pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", shorts, u, s)
            return b.add(acc, call(b, "llvm.x86.avx2.pmadd.wd", ints, pairs, ones))
        for mask, weight in ((0x7F, None), (0x80, 1)):  # u = low 7 bits + 128 * top bit
            bits = b.and_(u, const(_i8, [mask] * n))
            if weight:
                bits = b.lshr(bits, const(_i8, [7] * n))
            pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", shorts, bits, s)
            acc = b.add(acc, call(b, "llvm.x86.avx2.pmadd.wd", ints, pairs, const(_i16, [128 if weight else 1] * 16)))
        return acc
    words = ir.VectorType(_i32, n)
    product = b.mul(b.zext(u, words), b.sext(s, words))
    pairs = b.add(shuffle(b, product, product, range(0, n, 2)), shuffle(b, product, product, range(1, n, 2)))
    return b.add(
        acc, b.add(shuffle(b, pairs, pairs, range(0, n // 2, 2)), shuffle(b, pairs, pairs, range(1, n // 2, 2)))
    )


@intrinsic(prefer_literal=True)
def dot4(typingctx, acc, u, s, big):
    """acc (i32 lanes) += dot products of 4 neighbouring bytes, `u` unsigned times `s` signed."""
    return acc(acc, u, s, big), lambda c, b, sig, args: emit_dot(b, *args[:3], big.literal_value)


# --- register tiles: tuples of vectors, one a token ----------------------------------------------------------------


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
            word = load_from(b, b.add(args[2], _i64(4 * t)), _i32)
            s = b.bitcast(splat_of(b, word, vec.n), ir.VectorType(_i8, 4 * vec.n))
            out.append(emit_dot(b, b.extract_value(args[0], t), args[1], s, big.literal_value))
        return cgutils.pack_array(b, out)

    return tile(tile, u, types.intp, big), codegen


def _fma(b, x, y, z):
    name = "fmuladd" if _SOFT_HALF else "fma"
    return call(b, f"llvm.{name}.v{x.type.count}f32", x.type, x, y, z)


def _tile_scalars(b, address, t, n):
    return splat_of(b, load_from(b, b.add(address, _i64(4 * t)), _f32), n)


@intrinsic
def tile_fma(typingctx, tile, v, address):
    """tile[t] += v * (float at address + 4 t)."""

    def codegen(context, b, sig, args):
        out = []
        for t in range(tile.count):
            x = _tile_scalars(b, args[2], t, v.n)
            out.append(_fma(b, args[1], x, b.extract_value(args[0], t)))
        return cgutils.pack_array(b, out)

    return tile(tile, v, types.intp), codegen


@intrinsic
def tile_scale(typingctx, tile, ints, v, address):
    """tile[t] += ints[t] * v * (float at address + 4 t)."""

    def codegen(context, b, sig, args):
        out = []
        for t in range(tile.count):
            x = b.fmul(args[2], _tile_scalars(b, args[3], t, v.n))
            value = b.sitofp(b.extract_value(args[1], t), v.llvm)
            out.append(_fma(b, value, x, b.extract_value(args[0], t)))
        return cgutils.pack_array(b, out)

    return tile(tile, ints, v, types.intp), codegen


@intrinsic
def tile_store(typingctx, address, tile, stride):
    """Store the vectors of a tile at address, address + stride, ..."""

    def codegen(context, b, sig, args):
        for t in range(tile.count):
            store_to(b, b.extract_value(args[1], t), b.add(args[0], b.mul(args[2], _i64(t))))
        return context.get_dummy_value()

    return types.void(types.intp, tile, types.intp), codegen


# --- threads -----------------------------------------------------------------------------------------------------


@intrinsic
def atomic_add(typingctx, address, value):
    """Add to the 64-bit integer at `address`; the old value."""

    def codegen(context, b, sig, args):
        return b.atomic_rmw("add", pointer(b, args[0], _i64), args[1], "acq_rel")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def atomic_get(typingctx, address):
    """The 64-bit integer at `address`, acquired."""
    return types.int64(types.intp), lambda c, b, sig, args: b.load_atomic(pointer(b, args[0], _i64), "acquire", 8)


@intrinsic
def atomic_swap(typingctx, address, expected, value):
    """Put `value` at `address` if it holds `expected`; whether it did."""

    def codegen(context, b, sig, args):
        result = b.cmpxchg(pointer(b, args[0], _i64), args[1], args[2], "acq_rel", "acquire")
        return b.extract_value(result, 1)

    return types.boolean(types.intp, types.int64, types.int64), codegen


@intrinsic
def atomic_put(typingctx, address, value):
    """Store to the 64-bit integer at `address`, releasing."""

    def codegen(context, b, sig, args):
        b.store_atomic(args[1], pointer(b, args[0], _i64), "release", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the core that this is a spin loop."""

    def codegen(context, b, sig, args):
        if _X86:
            call(b, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_kernel(typingctx, function, args_address, step, ith, turn):
    """Call the kernel at address `function`; the number of chunks that its work has."""

    def codegen(context, b, sig, args):
        return b.call(pointer(b, args[0], ir.FunctionType(_i64, [_i64] * 4)), args[1:])

    return types.int64(*[types.intp] * 5), codegen


@intrinsic
def call_plain(typingctx, function):
    """Call `int function(void)` at an address."""

    def codegen(context, b, sig, args):
        b.call(pointer(b, args[0], ir.FunctionType(_i32, [])), [])
        return context.get_dummy_value()

    return types.void(types.intp), codegen

"""LLVM vectors as Numba types, so that kernels read as Python and compile to the vector unit.

`Vec(elt, n)` is a Numba type over `<n x elt>`; elements are i8, i16, i32 and f32. Signedness is a matter of the
operation, not of the type. Below it are the helpers that emit LLVM code for the intrinsics in loads.py, simd.py,
tiles.py and atomics.py. Only the process that compiles kernels imports these files; its instruction-set level comes
from HOTCOLD_ISA (see isa.py) and is fixed for the life of that process.
"""

from __future__ import annotations

import os

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import register_model

from .isa import LEVELS

LEVEL = LEVELS[os.environ.get("HOTCOLD_ISA") or "generic"]
WIDE = LEVEL.vector_bytes  # bytes in the widest register
LANES = WIDE // 4  # 32-bit lanes in it
X86 = llvm.get_process_triple().startswith(("x86_64", "amd64"))
# Below avx2, x86 has no conversion instruction for float16, and LLVM would call a library that is not there.
SOFT_HALF = X86 and LEVEL.name == "generic"

ELEMENTS = {"i8": ir.IntType(8), "i16": ir.IntType(16), "i32": ir.IntType(32), "f32": ir.FloatType()}
SCALARS = {"i8": types.int32, "i16": types.int32, "i32": types.int32, "f32": types.float32}
I8, I16, I32, I64, F32, HALF = (
    ELEMENTS["i8"],
    ELEMENTS["i16"],
    ELEMENTS["i32"],
    ir.IntType(64),
    ELEMENTS["f32"],
    ir.HalfType(),
)


class Vec(types.Type):
    """A vector of `n` elements of kind `elt`."""

    def __init__(self, elt: str, n: int) -> None:
        self.elt, self.n = elt, n
        super().__init__(name=f"{elt}x{n}")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(ELEMENTS[self.elt], self.n)


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
    return builder.shuffle_vector(a, b, const(I32, list(index)))


def splat_of(builder, scalar, n):
    one = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, n), ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(one, one, const(I32, [0] * n))


def join(builder, a, b):
    """Concatenate two equally long vectors."""
    n = a.type.count
    return shuffle(builder, a, b, range(2 * n))


def piece(builder, v, start, n):
    return shuffle(builder, v, v, range(start, start + n))


def half_to_float(builder, bits):
    """<n x i16> holding float16 -> <n x float>."""
    n = bits.type.count
    floats = ir.VectorType(F32, n)
    if not SOFT_HALF:
        return builder.fpext(builder.bitcast(bits, ir.VectorType(HALF, n)), floats)
    ints = ir.VectorType(I32, n)
    wide = builder.zext(bits, ints)
    magnitude = builder.shl(builder.and_(wide, const(I32, [0x7FFF] * n)), const(I32, [13] * n))
    sign = builder.shl(builder.and_(wide, const(I32, [0x8000] * n)), const(I32, [16] * n))
    rebias = const(F32, [2.0**112] * n)  # exponent bias 15 -> 127
    scaled = builder.fmul(builder.bitcast(magnitude, floats), rebias)
    return builder.bitcast(builder.or_(builder.bitcast(scaled, ints), sign), floats)


def float_to_half(builder, v):
    """<n x float> -> <n x i16> holding float16, to nearest."""
    n = v.type.count
    shorts, ints, floats = (ir.VectorType(t, n) for t in (I16, I32, F32))
    if not SOFT_HALF:
        return builder.bitcast(builder.fptrunc(v, ir.VectorType(HALF, n)), shorts)
    bits = builder.bitcast(v, ints)
    sign = builder.and_(builder.lshr(bits, const(I32, [16] * n)), const(I32, [0x8000] * n))
    magnitude = builder.bitcast(builder.and_(bits, const(I32, [0x7FFFFFFF] * n)), floats)
    magnitude = call(builder, f"llvm.minnum.v{n}f32", floats, magnitude, const(F32, [65504.0] * n))
    small = builder.bitcast(builder.fmul(magnitude, const(F32, [2.0**-112] * n)), ints)
    odd = builder.and_(builder.lshr(small, const(I32, [13] * n)), const(I32, [1] * n))
    rounded = builder.lshr(builder.add(builder.add(small, const(I32, [0xFFF] * n)), odd), const(I32, [13] * n))
    # Below the normal range of half `small` has been rounded once already; a sum with 0.5 rounds it to 2**-24.
    moved = builder.bitcast(builder.fadd(magnitude, const(F32, [0.5] * n)), ints)
    subnormal = builder.fcmp_ordered("<", magnitude, const(F32, [2.0**-14] * n))
    rounded = builder.select(subnormal, builder.sub(moved, const(I32, [0x3F000000] * n)), rounded)
    return builder.trunc(builder.or_(rounded, sign), shorts)

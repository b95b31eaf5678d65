"""Wide loads and float16 out of packed words: what numba.cuda's language cannot say, with twins for its simulator.

These are device functions for kernels: they take no threads, only what they are given.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .jit import simulated

if simulated():

    def four(array: Any, i: Any) -> Any:
        """Elements i to i + 3 of a 1-D array of 4-byte elements, in one load; i is a multiple of 4."""
        return array[i], array[i + 1], array[i + 2], array[i + 3]

    def two(array: Any, i: Any) -> Any:
        """Elements i and i + 1, likewise; i is even."""
        return array[i], array[i + 1]

    def eight(x: Any, t: Any, i: Any) -> Any:
        """x[t, i] to x[t, i + 7] of a float32 [n, width] whose width is a multiple of 4, as i is."""
        return tuple(x[t, i + j] for j in range(8))

    def half(bits: Any) -> Any:
        """The float32 of a float16's 16 bits; higher bits do not count."""
        return np.float32(np.uint16(bits & 0xFFFF).view(np.float16))

    def as_float(bits: Any) -> Any:
        """The float32 of its 32 bits."""
        return np.uint32(bits).view(np.float32)

    def above(word: Any, mask: Any) -> Any:
        """2**23 plus the bits of a word under a mask below bit 23, as float32."""
        return np.uint32(np.uint32(word & mask) | np.uint32(0x4B000000)).view(np.float32)

else:
    from llvmlite import ir
    from numba import types
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic

    _I32, _I16, _F32 = ir.IntType(32), ir.IntType(16), ir.FloatType()

    def _vector(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, n: int) -> list[Any]:
        """n elements from `offset` (i64) on: one load, so that the offset must be a multiple of n."""
        data = context.make_array(array_type)(context, builder, value=array).data
        element = context.get_value_type(array_type.dtype)
        pointer = builder.bitcast(builder.gep(data, [offset]), ir.VectorType(element, n).as_pointer())
        loaded = builder.load(pointer, align=4 * n)
        return [builder.extract_element(loaded, _I32(j)) for j in range(n)]

    def _loader(n: int) -> Any:
        def load(typingctx, array, i):  # type: ignore[no-untyped-def]
            def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
                values = _vector(context, builder, signature.args[0], args[0], args[1], n)
                return context.make_tuple(builder, signature.return_type, values)

            return types.UniTuple(array.dtype, n)(array, types.uint64), codegen

        return intrinsic(load)

    two, four = _loader(2), _loader(4)

    @intrinsic
    def eight(typingctx, x, t, i):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            array = context.make_array(signature.args[0])(context, builder, value=args[0])
            width = cgutils.unpack_tuple(builder, array.shape, 2)[1]
            at = builder.add(builder.mul(args[1], width), args[2])
            values = _vector(context, builder, signature.args[0], args[0], at, 4)
            values += _vector(context, builder, signature.args[0], args[0], builder.add(at, at.type(4)), 4)
            return context.make_tuple(builder, signature.return_type, values)

        return types.UniTuple(x.dtype, 8)(x, types.uint64, types.uint64), codegen

    @intrinsic
    def half(typingctx, bits):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.fpext(builder.bitcast(builder.trunc(args[0], _I16), ir.HalfType()), _F32)

        return types.float32(types.uint32), codegen

    @intrinsic
    def as_float(typingctx, bits):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.bitcast(args[0], _F32)

        return types.float32(types.uint32), codegen

    @intrinsic
    def above(typingctx, word, mask):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            kind = ir.FunctionType(_I32, [_I32] * 3)  # one instruction, which compilers make two of
            bits = builder.asm(kind, "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [*args, _I32(0x4B000000)], False)
            return builder.bitcast(bits, _F32)

        return types.float32(types.uint32, types.uint32), codegen

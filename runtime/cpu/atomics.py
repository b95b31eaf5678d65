"""What threads share: atomic integers, spin loops and calls by address, as Numba intrinsics."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .vector import I32, I64, X86, call, pointer


@intrinsic
def atomic_add(typingctx, address, value):
    """Add to the 64-bit integer at `address`; the old value."""

    def codegen(context, b, sig, args):
        return b.atomic_rmw("add", pointer(b, args[0], I64), args[1], "acq_rel")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def atomic_get(typingctx, address):
    """The 64-bit integer at `address`, acquired."""
    return types.int64(types.intp), lambda c, b, sig, args: b.load_atomic(pointer(b, args[0], I64), "acquire", 8)


@intrinsic
def atomic_swap(typingctx, address, expected, value):
    """Put `value` at `address` if it holds `expected`; whether it did."""

    def codegen(context, b, sig, args):
        result = b.cmpxchg(pointer(b, args[0], I64), args[1], args[2], "acq_rel", "acquire")
        return b.extract_value(result, 1)

    return types.boolean(types.intp, types.int64, types.int64), codegen


@intrinsic
def atomic_put(typingctx, address, value):
    """Store to the 64-bit integer at `address`, releasing."""

    def codegen(context, b, sig, args):
        b.store_atomic(args[1], pointer(b, args[0], I64), "release", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the core that this is a spin loop."""

    def codegen(context, b, sig, args):
        if X86:
            call(b, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_kernel(typingctx, function, args_address, step, ith, turn):
    """Call the kernel at address `function`; the number of chunks that its work has."""

    def codegen(context, b, sig, args):
        return b.call(pointer(b, args[0], ir.FunctionType(I64, [I64] * 4)), args[1:])

    return types.int64(*[types.intp] * 5), codegen


@intrinsic
def call_plain(typingctx, function):
    """Call `int function(void)` at an address."""

    def codegen(context, b, sig, args):
        b.call(pointer(b, args[0], ir.FunctionType(I32, [])), [])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def ticks(typingctx):
    """The processor's time-stamp counter; 0 where a user program may not read one."""

    def codegen(context, b, sig, args):
        return call(b, "llvm.readcyclecounter", I64) if X86 else I64(0)

    return types.int64(), codegen

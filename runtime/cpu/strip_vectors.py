"""Strips: columns of a few rows of quantised weights, unpacked to bytes in the order that dot products want."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .tiles import emit_dot
from .vector import I8, I16, I32, I64, LANES, Vec, const, half_to_float, join, load_from, shuffle, store_to


def _pair_sums(b, x, y):
    """In each four lanes: the sums of x's first two and last two, and those of y's."""
    starts = range(0, x.type.count, 4)
    n = x.type.count
    evens = [at + i for at in starts for i in (0, 2, n, n + 2)]
    odds = [at + i for at in starts for i in (1, 3, n + 1, n + 3)]
    return b.add(shuffle(b, x, y, evens), shuffle(b, x, y, odds))


# A strip's 32 columns: eight vectors, of which the first four hold 16 columns and the last four the others; vector i of
# each four holds rows i, i + 4, i + 8, ..., 16 bytes a row.
STRIP_ROWS = max(8, LANES)
STRIP_VECTOR = 4 * STRIP_ROWS  # bytes of a vector, and of a float for each row


@intrinsic(prefer_literal=True)
def strip_dot(typingctx, strip, x, big, split):
    """Exact sums of 32 unsigned bytes of each of a strip's rows times the 32 signed bytes at x: i32, one lane a row.

    split: two vectors, the sums of the first 16 products and of the last; else one in a tuple.
    """
    halves = split.literal_value

    def codegen(context, b, sig, args):
        sums = [const(I32, [0] * STRIP_ROWS)] * (8 if halves else 4)
        for half in range(2):
            q = load_from(b, b.add(args[1], I64(16 * half)), ir.VectorType(I8, 16))
            q = shuffle(b, q, q, list(range(16)) * (STRIP_ROWS // 4))
            for i in range(4):
                u = load_from(b, b.add(args[0], I64((4 * half + i) * STRIP_VECTOR)), q.type)
                at = 4 * half * halves + i
                sums[at] = emit_dot(b, sums[at], u, q, big.literal_value)
        for _ in range(2):
            sums = [_pair_sums(b, sums[i], sums[i + 1]) for i in range(0, len(sums), 2)]
        return cgutils.pack_array(b, sums)

    return types.UniTuple(Vec("i32", STRIP_ROWS), 1 + halves)(strip, x, big, split), codegen


@intrinsic
def put_strip(typingctx, to, i, rows):
    """Store rows i, i + 4, ... (32 bytes each, in a tuple) of a strip's 32 columns, which are at `to`."""

    def codegen(context, b, sig, args):
        found = [b.extract_value(args[2], r) for r in range(rows.count)]
        while len(found) > 1:
            found = [join(b, found[r], found[r + 1]) for r in range(0, len(found), 2)]
        at = b.add(args[0], b.mul(args[1], I64(STRIP_VECTOR)))
        for half in range(2):
            index = [32 * r + 16 * half + j for r in range(rows.count) for j in range(16)]
            store_to(b, shuffle(b, found[0], found[0], index), b.add(at, I64(4 * half * STRIP_VECTOR)))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, rows), codegen


@intrinsic
def strip_bases(typingctx, p, stride):
    """The addresses of rows 0, 4, 8, ... of a strip.

    They are made anew where this stands: a compiler that keeps a pointer to each of 16 rows in a loop has no registers
    left for it.
    """

    def codegen(context, b, sig, args):
        opaque = ir.InlineAsm(ir.FunctionType(I64, [I64]), "", "=r,0")
        bases = [b.add(args[0], b.mul(args[1], I64(4 * r))) for r in range(STRIP_ROWS // 4)]
        return cgutils.pack_array(b, [b.call(opaque, [base]) for base in bases])

    return types.UniTuple(types.intp, STRIP_ROWS // 4)(types.intp, types.intp), codegen


@intrinsic
def strip_f16(typingctx, bases, stride):
    """float16 at each row of a strip -> float32 lanes."""

    def codegen(context, b, sig, args):
        bits = ir.Constant(ir.VectorType(I16, STRIP_ROWS), [0] * STRIP_ROWS)
        for row in range(STRIP_ROWS):
            at = b.add(b.extract_value(args[0], row // 4), b.mul(args[1], I64(row % 4)))
            bits = b.insert_element(bits, load_from(b, at, I16), I32(row))
        return half_to_float(b, bits)

    return Vec("f32", STRIP_ROWS)(bases, types.intp), codegen


@intrinsic
def put_strip_nibbles(typingctx, to, i, bases, offset):
    """The same out of 16 bytes of nibbles a row, `offset` bytes from its base: low ones first."""

    def codegen(context, b, sig, args):
        found = []
        for r in range(STRIP_ROWS // 4):
            at = b.add(b.extract_value(args[2], r), args[3])
            found.append(load_from(b, at, ir.VectorType(I8, 16)))
        while len(found) > 1:
            found = [join(b, found[r], found[r + 1]) for r in range(0, len(found), 2)]
        v, at = found[0], b.add(args[0], b.mul(args[1], I64(STRIP_VECTOR)))
        mask = const(I8, [15] * STRIP_VECTOR)
        store_to(b, b.and_(v, mask), at)
        # Shift as 64-bit lanes (x86 has no 8-bit shift); the mask drops what crosses over.
        n = STRIP_VECTOR // 8
        moved = b.bitcast(b.lshr(b.bitcast(v, ir.VectorType(I64, n)), const(I64, [4] * n)), v.type)
        store_to(b, b.and_(moved, mask), b.add(at, I64(4 * STRIP_VECTOR)))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, bases, types.intp), codegen

"""Bands: LANES rows of quantised weights, interleaved so that a vector holds four neighbouring weights of each row.

32 columns of a band are eight vectors of bytes, in memory as planes of bits: a plane of `width` bits is `width`
vectors, and vector i holds, from its lowest bits up, those of vectors i, i + width, i + 2 * width, ...
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .tiles import emit_dot
from .vector import I8, I16, I32, I64, LANES, LEVEL, WIDE, Vec, call, const, load_from, splat_of, store_to

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}  # widths by bits of a weight, lowest bits first
QUADS = 8  # vectors of 32 columns


def plane_bytes(bits: int) -> int:
    """Bytes of 32 columns of a band."""
    return 32 * LANES * bits // 8


def _move(b, v, by, mask):
    """Each byte shifted left (right where `by` is negative), and masked. x86 shifts no bytes, so 16 bits at a time."""
    if by:
        shorts = ir.VectorType(I16, WIDE // 2)
        shift = b.shl if by > 0 else b.lshr
        v = b.bitcast(shift(b.bitcast(v, shorts), const(I16, [abs(by)] * (WIDE // 2))), v.type)
    return v if mask == 255 else b.and_(v, const(I8, [mask] * WIDE))


def _pieces(bits):
    """(vector in memory, its shift, number of the weights' vector, where the bits belong, their mask) of all planes."""
    first, low = 0, 0
    for width in PLANES[bits]:
        for i in range(width):
            for j in range(QUADS // width):
                yield first + i, width * j, i + width * j, low, (1 << width) - 1
        first, low = first + width, low + width


@intrinsic(prefer_literal=True)
def load_band(typingctx, address, bits):
    """32 columns of a band: 8 vectors of unsigned bytes."""
    n = bits.literal_value
    bytes_ = Vec("i8", WIDE)

    def codegen(context, b, sig, args):
        memory = [load_from(b, b.add(args[0], I64(i * WIDE)), bytes_.llvm) for i in range(n)]
        out = [None] * QUADS
        for source, at, to, low, mask in _pieces(n):
            piece = _move(b, memory[source], low - at, mask << low)
            out[to] = piece if out[to] is None else b.or_(out[to], piece)
        return cgutils.pack_array(b, out)

    return types.UniTuple(bytes_, QUADS)(types.intp, bits), codegen


@intrinsic(prefer_literal=True)
def store_band(typingctx, address, source, bits):
    """Write 32 columns of a band out of their 8 vectors of unsigned bytes, which are at `source`."""
    n = bits.literal_value

    def codegen(context, b, sig, args):
        bytes_ = ir.VectorType(I8, WIDE)
        weights = [load_from(b, b.add(args[1], I64(i * WIDE)), bytes_) for i in range(QUADS)]
        memory = [const(I8, [0] * WIDE)] * n
        for to, at, i, low, mask in _pieces(n):
            memory[to] = b.or_(memory[to], _move(b, weights[i], at - low, mask << at))
        for i, v in enumerate(memory):
            store_to(b, v, b.add(args[0], I64(i * WIDE)))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, bits), codegen


def _four_bytes(b, address, quad):
    word = load_from(b, b.add(address, I64(4 * quad)), I32)
    return b.bitcast(splat_of(b, word, LANES), ir.VectorType(I8, WIDE))


def _pairs(b, us, address, first, count, bits):
    """avx2: sums in 32 bits, of products that are first added up in 16 bits, as many as surely fit."""
    shorts, ints = ir.VectorType(I16, WIDE // 2), ir.VectorType(I32, LANES)
    together = 32767 // (2 * 127 * ((1 << bits) - 1))
    total = None
    for start in range(first, first + count, together):
        held = None
        for i in range(start, min(start + together, first + count)):
            product = call(b, "llvm.x86.avx2.pmadd.ub.sw", shorts, b.extract_value(us, i), _four_bytes(b, address, i))
            held = product if held is None else b.add(held, product)
        wide = call(b, "llvm.x86.avx2.pmadd.wd", ints, held, const(I16, [1] * (WIDE // 2)))
        total = wide if total is None else b.add(total, wide)
    return total


def _signed(b, us, address, first, count):
    """avx2 and 8 bits: |q| times x with q's sign, where q = u - 128, so that pairs of products fit in 16 bits."""
    bytes_, shorts, ints = ir.VectorType(I8, WIDE), ir.VectorType(I16, WIDE // 2), ir.VectorType(I32, LANES)
    total = const(I32, [0] * LANES)
    for i in range(first, first + count):
        q = b.xor(b.extract_value(us, i), const(I8, [-128] * WIDE))
        size = call(b, f"llvm.abs.v{WIDE}i8", bytes_, q, ir.Constant(ir.IntType(1), 0))
        x = call(b, "llvm.x86.avx2.psign.b", bytes_, _four_bytes(b, address, i), q)
        pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", shorts, size, x)
        total = b.add(total, call(b, "llvm.x86.avx2.pmadd.wd", ints, pairs, const(I16, [1] * (WIDE // 2))))
    return total


@intrinsic(prefer_literal=True)
def band_dot(typingctx, us, x, start, first, count, bits):
    """start + the exact sums, a lane a row, of `count` vectors' bytes times the signed bytes at x that belong to them.

    start, of 8 bits: -128 times the sum of those signed bytes (which avx2 takes as said and does not read).
    """
    begin, n, width = first.literal_value, count.literal_value, bits.literal_value

    def codegen(context, b, sig, args):
        tuple_, address, total = args[:3]
        if LEVEL.name == "avx2" and width == 8:
            return _signed(b, tuple_, address, begin, n)
        if LEVEL.name == "avx2":
            return b.add(total, _pairs(b, tuple_, address, begin, n, width))
        halves = [total, const(I32, [0] * LANES)]  # two chains, since a product waits for the last one of its chain
        for i in range(begin, begin + n):
            halves[i % 2] = emit_dot(
                b, halves[i % 2], b.extract_value(tuple_, i), _four_bytes(b, address, i), width == 8
            )
        return b.add(*halves)

    return start(us, x, start, first, count, bits), codegen

"""Reading memory and nothing else: what the machine can do at best, beside which a kernel's own reading is judged."""

from __future__ import annotations

from typing import Any

from .layout import Read
from .loads import i64_at, load_i32, prefetch, put_i32
from .simd import hsum, splat_i32
from .tape import finish, take
from .vector import LANES, WIDE

AHEAD = 8 << 10  # bytes ahead of the reader that are asked for: the hardware's own prefetcher stops at a page's end


def build(family: str, variant: str) -> Any:
    """Each of n parts of a region is read by one thread, from end to end; its sum makes sure that all loads happen."""
    args_of, lanes, wide, four, ahead = Read, LANES, WIDE, 4 * WIDE, AHEAD

    def read(args, step, ith, turn):
        src, size, parts = i64_at(args + args_of.src), i64_at(args + args_of.size), i64_at(args + args_of.parts)
        part = (size // parts + four - 1) // four * four
        while True:
            i = take(args, turn, parts)
            if i < 0:
                break
            at, end = src + i * part, min(src + (i + 1) * part, src + size)
            a, b, c, d = splat_i32(0, lanes), splat_i32(0, lanes), splat_i32(0, lanes), splat_i32(0, lanes)
            while at + four <= end:
                prefetch(at + ahead, four)
                a = a + load_i32(at, lanes)
                b = b + load_i32(at + wide, lanes)
                c = c + load_i32(at + 2 * wide, lanes)
                d = d + load_i32(at + 3 * wide, lanes)
                at += four
            while at + wide <= end:
                a = a + load_i32(at, lanes)
                at += wide
            put_i32(i64_at(args + args_of.sums) + 4 * i, hsum((a + b) + (c + d)))
            finish(args)
        return parts

    return read

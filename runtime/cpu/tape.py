"""The tape: the CPU part of a graph as rows of (kernel address, argument record, barrier), walked by every thread.

Kernels have one signature, `(args, step, ith, turn)`, and return how many chunks their work has. Threads take chunks
from the op's counter until none is left, so a slow core holds nobody up. The rows up to a barrier are a segment, with
one count of finished chunks: a thread goes on when that count is full, whether or not the other threads have come by.
One that comes late (its core was lent to somebody else) finds nothing to take and catches up.

A row may have a condition, an integer that an earlier segment wrote; every thread then skips it, or none does.

A counter holds the number of its step, the *turn*, above bit 32, so that a thread that is late by a whole step cannot
take work of the next. After its last row, thread 0 sets all counters to the next turn.
"""

from __future__ import annotations

from typing import Any

from .atomics import atomic_add, atomic_get, atomic_put, atomic_swap, call_kernel, call_plain, pause, ticks
from .layout import Row
from .loads import i64_at, put_i64
from .weights import inline

_SPINS = 2000  # polls of a count before the core is offered to others
_ROW_BYTES = 8 * len(Row)


@inline
def take(args, turn, n):
    """The next of an op's n chunks, or -1 when none is left or the turn is over."""
    while True:
        value = atomic_get(args)
        if value >> 32 != turn or value & 0xFFFFFFFF >= n:
            return -1
        if atomic_swap(args, value, value + 1):
            return value & 0xFFFFFFFF


@inline
def take_near(args, turn, n, ith, place):
    """The same for work that is read in order: each thread has a region of its own, and then helps others from behind.

    Two threads that take turns along one stream would each fetch ahead what the other will read. place: address of
    the number of regions and of their words, a cache line each: the turn above bit 32, chunks taken from behind above
    bit 16, from the front below. A word of an older turn stands for an untouched region.
    """
    regions, claims = i64_at(place), i64_at(place + 8)
    own = ith % regions
    for i in range(regions):
        r = own + i
        if r >= regions:
            r -= regions
        begin, end, word = n * r // regions, n * (r + 1) // regions, claims + r * 64
        while True:
            value = atomic_get(word)
            age = ((turn - (value >> 32)) << 32) >> 32  # turns are 32 bits wide and wrap
            if age < 0:
                return -1
            used = value & 0xFFFFFFFF if age == 0 else 0
            front, back = used & 0xFFFF, used >> 16
            if begin + front >= end - back:
                break
            if atomic_get(args) >> 32 != turn:  # n may be the next step's already, and the word not yet
                return -1
            if i == 0:
                if atomic_swap(word, value, (turn << 32) | (used + 1)):
                    return begin + front
            elif atomic_swap(word, value, (turn << 32) | (used + 0x10000)):
                return end - back - 1
    return -1


@inline
def finish(args):
    """Count a chunk as finished; its results are visible to whoever sees the count."""
    atomic_add(i64_at(args + 8), 1)


def build(family: str, variant: str) -> Any:
    """The walker: every thread runs it over the same tape. `yield_function`: see call_plain, or 0."""
    row_bytes, row_of, spins = _ROW_BYTES, Row, _SPINS

    def walk(tape, n_rows, step, ith, turn, yield_function):
        expected = 0
        now = ticks()
        for i in range(n_rows):
            row = tape + i * row_bytes
            args = i64_at(row + row_of.args)
            when = i64_at(row + row_of.when)
            if when == 0 or atomic_get(when) == i64_at(row + row_of.want):
                expected += call_kernel(i64_at(row + row_of.kernel), args, step, ith, turn)
            if i64_at(row + row_of.barrier) != 0:
                polls = 0
                while atomic_get(i64_at(args + 8)) < expected:
                    if atomic_get(args) >> 32 != turn:
                        return 0
                    polls += 1
                    if polls < spins or yield_function == 0:
                        pause()
                    else:
                        call_plain(yield_function)
                expected = 0
            if ith == 0:
                before = now
                now = ticks()
                put_i64(row + row_of.ticks, i64_at(row + row_of.ticks) + now - before)
        if ith == 0:
            for i in range(n_rows):
                args = i64_at(tape + i * row_bytes + row_of.args)
                atomic_put(args, (turn + 1) << 32)
                atomic_put(i64_at(args + 8), 0)
        return 0

    return walk

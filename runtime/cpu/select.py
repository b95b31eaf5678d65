"""Choosing the neurons that a step computes: one sorted list for all its tokens, or all where that is as good."""

from __future__ import annotations

from typing import Any

from .atomics import atomic_add
from .layout import Choice, Select, Step
from .loads import f32_at, f64_at, i64_at, load_f32, put_f32, put_i32, put_i64
from .simd import bits_less, count_ones, lowest_bit, splat_f32
from .tape import finish, take
from .vector import LANES
from .weights import inline


def build(family: str, variant: str) -> Any:
    """`select:gates`: neurons whose gate is at least `top`, or between `low` and `high`; `select:scores`: score >= cut.

    Few tokens get a list of the neurons that any of them needs, and for each token and listed neuron the gate, or the
    score less its cut (`picked`). If the list is longer than the limit, or tokens are many, the step is dense.
    """
    args_of, step_of, choice_of, lanes = Select, Step, Choice, LANES
    predict = variant == "scores"
    full = (1 << LANES) - 1

    @inline
    def wanted(src, cut, low, high, top, n):
        """Bits of the lanes whose neurons are active; those of NaNs are, so that they are not hidden."""
        v = load_f32(src, n)
        if predict:
            return ~bits_less(v, load_f32(cut, n))
        middle = bits_less(v, splat_f32(low, n)) | bits_less(splat_f32(high, n), v)
        return ~(bits_less(v, splat_f32(top, n)) & middle)

    @inline
    def count(src, cut, low, high, top, n):
        total, i = 0, 0
        while i + lanes <= n:
            total += count_ones(wanted(src + i * 4, cut + i * 4, low, high, top, lanes) & full)
            i += lanes
        while i < n:
            total += wanted(src + i * 4, cut + i * 4, low, high, top, 1) & 1
            i += 1
        return total

    @inline
    def add(bits, i, n_tok, src, cut, n, to, picked, found):
        """Append the neurons i + each set bit."""
        while bits != 0:
            j = i + lowest_bit(bits)
            bits &= bits - 1
            put_i32(to + found * 4, j)
            for t in range(n_tok):
                value = f32_at(src + (t * n + j) * 4)
                if predict:
                    value -= f32_at(cut + j * 4)
                put_f32(picked + (t * n + found) * 4, value)
            found += 1
        return found

    def select(args, step, ith, turn):
        n_tok = i64_at(step + step_of.n_tok)
        src, n = i64_at(args + args_of.src), i64_at(args + args_of.n)
        low, high, top = f64_at(args + args_of.low), f64_at(args + args_of.high), f64_at(args + args_of.top)
        cut, to, picked = i64_at(args + args_of.cut), i64_at(args + args_of.list), i64_at(args + args_of.picked)
        choice, limit = i64_at(args + args_of.choice), i64_at(args + args_of.limit)
        few = n_tok < i64_at(step + step_of.tile_min)
        n_chunks = 1 if few else n_tok
        while True:
            c = take(args, turn, n_chunks)
            if c < 0:
                break
            if few:
                found, active, i = 0, 0, 0
                while i + lanes <= n:
                    union = 0
                    for t in range(n_tok):
                        bits = wanted(src + (t * n + i) * 4, cut + i * 4, low, high, top, lanes) & full
                        active += count_ones(bits)
                        union |= bits
                    found = add(union, i, n_tok, src, cut, n, to, picked, found)
                    i += lanes
                while i < n:
                    union = 0
                    for t in range(n_tok):
                        bits = wanted(src + (t * n + i) * 4, cut + i * 4, low, high, top, 1) & 1
                        active += bits
                        union |= bits
                    found = add(union, i, n_tok, src, cut, n, to, picked, found)
                    i += 1
            else:
                found, active = n, count(src + c * n * 4, cut, low, high, top, n)
            atomic_add(choice + choice_of.active, active)
            if c == 0:
                sparse = 1 if few and found <= limit else 0
                put_i64(choice + choice_of.sparse, sparse)
                put_i64(choice + choice_of.count, found)
                atomic_add(choice + choice_of.tokens, n_tok)
                if sparse != 0:
                    atomic_add(choice + choice_of.sparse_steps, 1)
                    atomic_add(choice + choice_of.listed, found)
                else:
                    atomic_add(choice + choice_of.dense_steps, 1)
            finish(args)
        return n_chunks

    return select

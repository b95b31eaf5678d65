"""A mixture of experts: which experts compute a token, and the sum of what they give.

The pairs of a token and one of its experts are sorted by expert, then by token. A pair's place in that order is its
position; where tokens are many, each expert's pairs begin at a whole panel, so some positions are empty.
"""

from __future__ import annotations

import math
from typing import Any

from .layout import Combine, Item, Route, Routing, Step
from .loads import f32_at, i8_at, i32_at, i64_at, load_f32, put_f32, put_i32, put_i64, store
from .products import TOKENS
from .simd import fma, hsum, splat_f32
from .tape import finish, take
from .vector import LANES
from .vmath import exp
from .weights import inline


def build(family: str, variant: str) -> Any:
    """`route`: from the router's logits to lists of pairs; `combine`: from the pairs' results to the tokens'."""
    return _route() if family == "route" else _combine()


def _route() -> Any:
    """One chunk, as there is little to do.

    Arrays: items (experts with pairs), pairs (by position, the pair's token, or -1), slots and weights (by token and
    choice, its position and weight; position -1: computed elsewhere).
    """
    args_of, item_of, routing_of, step_of = Route, Item, Routing, Step
    item_bytes, tokens, lanes = 8 * len(Item), TOKENS, LANES
    lowest, nan = -math.inf, math.nan

    @inline
    def choose(src, n, n_used, slots, weights):
        """The largest of n logits in falling order, the lower id first among equals; whether none of all is NaN."""
        found, valid = 0, True
        for e in range(n):
            value = f32_at(src + e * 4)
            if value != value:
                value, valid = lowest, False
            if found == n_used:
                if not value > f32_at(weights + (n_used - 1) * 4):
                    continue
                found -= 1
            i = found
            while i > 0 and f32_at(weights + (i - 1) * 4) < value:
                put_f32(weights + i * 4, f32_at(weights + (i - 1) * 4))
                put_i32(slots + i * 4, i32_at(slots + (i - 1) * 4))
                i -= 1
            put_f32(weights + i * 4, value)
            put_i32(slots + i * 4, e)
            found += 1
        return valid

    @inline
    def total(src, top, n):
        """Sum of e**(logit - top) over n logits."""
        sums, i = splat_f32(0.0, lanes), 0
        while i + lanes <= n:
            sums = sums + exp(load_f32(src + i * 4, lanes) - splat_f32(top, lanes), lanes)
            i += lanes
        value = hsum(sums)
        while i < n:
            value += hsum(exp(load_f32(src + i * 4, 1) - splat_f32(top, 1), 1))
            i += 1
        return value

    @inline
    def weigh(src, n, n_used, weights, valid, norm):
        """The chosen logits become shares of 1: among each other, or among all. NaNs and infinities show as NaNs."""
        top = f32_at(weights)
        if not valid or top - top != 0.0:
            for i in range(n_used):
                put_f32(weights + i * 4, nan)
            return
        scale = 1.0 / total(weights, top, n_used) if norm != 0 else 1.0 / total(src, top, n)
        for i in range(n_used):
            value = hsum(exp(load_f32(weights + i * 4, 1) - splat_f32(top, 1), 1))
            put_f32(weights + i * 4, value * scale)

    @inline
    def list_items(n, here, items, spare, pairs, panel):
        """Lay out positions from the experts' counts in `spare`, which becomes each expert's first position, or -1."""
        found, at = 0, 0
        for e in range(n):
            count = i64_at(spare + e * 8)
            put_i64(spare + e * 8, -1)
            if count == 0:
                continue
            if here != 0:
                if i8_at(here + e) == 0:
                    continue
            item = items + found * item_bytes
            put_i64(item + item_of.expert, e)
            put_i64(item + item_of.first, at)
            put_i64(item + item_of.count, count)
            put_i64(spare + e * 8, at)
            found += 1
            end = at + (count + panel - 1) // panel * panel
            for i in range(at + count, end):
                put_i32(pairs + i * 4, -1)
            at = end
        return found, at

    @inline
    def add(address, value):
        put_i64(address, i64_at(address) + value)

    def route(args, step, ith, turn):
        n_tok = i64_at(step + step_of.n_tok)
        src, n, n_used = i64_at(args + args_of.src), i64_at(args + args_of.n), i64_at(args + args_of.n_used)
        norm, here = i64_at(args + args_of.weights_norm), i64_at(args + args_of.here)
        heat, routing = i64_at(args + args_of.heat), i64_at(args + args_of.routing)
        items, pairs, spare = i64_at(args + args_of.items), i64_at(args + args_of.pairs), i64_at(args + args_of.spare)
        slots, weights = i64_at(args + args_of.slots), i64_at(args + args_of.weights)
        while take(args, turn, 1) == 0:
            for e in range(n):
                put_i64(spare + e * 8, 0)
            for t in range(n_tok):
                logits, at = src + t * n * 4, t * n_used * 4
                valid = choose(logits, n, n_used, slots + at, weights + at)
                weigh(logits, n, n_used, weights + at, valid, norm)
                for i in range(n_used):
                    e = i32_at(slots + at + i * 4)
                    add(spare + e * 8, 1)
                    add(heat + e * 8, 1)
            panel = tokens if n_tok >= i64_at(step + step_of.tile_min) else 1
            n_items, end = list_items(n, here, items, spare, pairs, panel)
            listed = 0
            for i in range(n_tok * n_used):
                e = i32_at(slots + i * 4)
                at = i64_at(spare + e * 8)
                put_i32(slots + i * 4, at)
                if at >= 0:
                    put_i32(pairs + at * 4, i // n_used)
                    put_i64(spare + e * 8, at + 1)
                    listed += 1
            put_i64(routing + routing_of.experts, n_items)
            put_i64(routing + routing_of.positions, end)
            add(routing + routing_of.tokens, n_tok)
            add(routing + routing_of.pairs, listed)
            add(routing + routing_of.read, n_items)
            finish(args)
        return 1

    return route


def _combine() -> Any:
    """out[t] (+)= sum over the token's pairs of weight * src[position], in the order of its choices."""
    args_of, step_of, lanes = Combine, Step, LANES

    @inline
    def combined(src, n, n_used, slots, weights, width):
        """Some columns of the sum."""
        sums = splat_f32(0.0, width)
        for i in range(n_used):
            at = i32_at(slots + i * 4)
            if at >= 0:
                sums = fma(load_f32(src + at * n * 4, width), splat_f32(f32_at(weights + i * 4), width), sums)
        return sums

    def combine(args, step, ith, turn):
        n_tok = i64_at(step + step_of.n_tok)
        src, out, n = i64_at(args + args_of.src), i64_at(args + args_of.out), i64_at(args + args_of.n)
        n_used, add = i64_at(args + args_of.n_used), i64_at(args + args_of.add)
        slots, weights = i64_at(args + args_of.slots), i64_at(args + args_of.weights)
        segment = i64_at(args + args_of.segment)
        parts = (n + segment - 1) // segment
        n_chunks = n_tok * parts
        while True:
            c = take(args, turn, n_chunks)
            if c < 0:
                break
            t = c // parts
            i = c % parts * segment
            end = min(i + segment, n)
            own, by = slots + t * n_used * 4, weights + t * n_used * 4
            while i < end:
                to = out + (t * n + i) * 4
                if i + lanes <= end:
                    sums = combined(src + i * 4, n, n_used, own, by, lanes)
                    if add != 0:
                        sums = sums + load_f32(to, lanes)
                    store(to, sums)
                    i += lanes
                else:
                    value = hsum(combined(src + i * 4, n, n_used, own, by, 1))
                    if add != 0:
                        value += f32_at(to)
                    put_f32(to, value)
                    i += 1
            finish(args)
        return n_chunks

    return combine

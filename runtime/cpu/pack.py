"""Packing activations for the matmuls (layout.py has the layouts), and the FFN's activation function before it."""

from __future__ import annotations

from typing import Any

from .layout import BAND_TILE, BLOCK_BYTES, Choice, Pack, Routing, Step
from .loads import f32_at, f64_at, i32_at, i64_at, load_f32, put_f32, put_i32, store, store_dwords
from .products import TOKENS
from .simd import hmax, hsum, narrow_i8, part, round_to_i32, splat_f32, splat_i32, to_f32, vabs, where_less
from .tape import finish, take
from .tiles import dot4
from .vector import LANES
from .vmath import gate
from .weights import inline

_tokens = TOKENS
_tile, _block_bytes = BAND_TILE, BLOCK_BYTES


@inline
def quantise(src):
    """32 floats -> (32 int8, scale): symmetric, scale = max|x| / 127, to nearest."""
    x = load_f32(src, 32)
    top = hmax(vabs(x))
    scale = top / 127.0
    inverse = 127.0 / top if top > 0.0 else 0.0
    return narrow_i8(round_to_i32(x * splat_f32(inverse, 32))), scale


def arrays(args_of: Any) -> Any:
    """(args) -> the addresses of a packed value's arrays, and whether quants and floats are wanted."""

    @inline
    def load(args):
        xq, xd = i64_at(args + args_of.xq), i64_at(args + args_of.xd)
        xn, xs, xf = i64_at(args + args_of.xn), i64_at(args + args_of.xs), i64_at(args + args_of.xf)
        ld, ln, ls = i64_at(args + args_of.ld), i64_at(args + args_of.ln), i64_at(args + args_of.ls)
        xb = i64_at(args + args_of.xb)
        quantised, floats = i64_at(args + args_of.quantised), i64_at(args + args_of.floats)
        return xq, xd, xn, xs, ld, ln, ls, xf, xb, quantised, floats

    return load


@inline
def neighbours(n_tok):
    """Tokens that a thread takes together, so that two threads do not write to one cache line: blocks are no lines."""
    return 4 if n_tok >= 16 else 1


@inline
def pack_blocks(src, begin, end, k, t, n_tok, xb):
    """Pack activations begin..end of token t of n_tok into blocks."""
    first = t // _tile * _tile
    count = min(_tile, n_tok - first)
    for i in range(begin, end, 32):
        q, scale = quantise(src + i * 4)
        sums = dot4(splat_i32(0, 8), narrow_i8(splat_i32(1, 32)), q, False)
        low, high = hsum(part(sums, 0, 4)), hsum(part(sums, 4, 4))
        to = xb + (first * (k // 32) + i // 32 * count + t - first) * _block_bytes
        store(to, q)
        put_f32(to + 32, scale)
        put_f32(to + 36, scale * (low + high))
        put_i32(to + 40, -low)
        put_i32(to + 44, -high)


@inline
def pack_span(src, begin, end, k, t, n_tok, rows, to):
    """Pack activations begin..end of token t of n_tok, read from `src` (the address of activation 0), as is wanted."""
    xq, xd, xn, xs, ld, ln, ls, xf, xb, quantised, floats = to
    panel, lane = t // _tokens, t % _tokens
    if xb != 0:
        pack_blocks(src, begin, end, k, t, n_tok, xb)
    if quantised != 0:
        for i in range(begin, end, 32):
            q, scale = quantise(src + i * 4)
            ones = narrow_i8(splat_i32(1, 32))
            sums = dot4(splat_i32(0, 8), ones, q, False)
            scaled = to_f32(sums) * splat_f32(scale, 8)
            first, second = hsum(part(scaled, 0, 4)), hsum(part(scaled, 4, 4))
            if rows:
                at = t * k + i
                store(xq + at, q)
                store(ld + at, splat_f32(scale, 8))
                store(ln + at, splat_i32(0, 8) - sums)
                store(ls + at, scaled)
                block, half, next_half = at // 32, at // 16, 1
            else:
                store_dwords(xq + (panel * k + i) * _tokens + lane * 4, q, 4 * _tokens)
                block = (panel * (k // 32) + i // 32) * _tokens + lane
                half, next_half = (panel * (k // 16) + i // 16) * _tokens + lane, _tokens
            put_f32(xd + block * 4, scale)
            put_f32(xn + half * 4, first)
            put_f32(xn + (half + next_half) * 4, second)
            put_f32(xs + block * 4, first + second)
    if floats != 0:
        if rows:
            for i in range(begin, end):
                put_f32(xf + (t * k + i) * 4, f32_at(src + i * 4))
        else:
            for i in range(begin, end):
                put_f32(xf + ((panel * k + i) * _tokens + lane) * 4, f32_at(src + i * 4))


@inline
def masked(h, a, threshold, scores, cut, n):
    """h, or 0 where |a|, the activated gate, is below the threshold or the predictor's score is below its cut."""
    zero = splat_f32(0.0, n)
    h = where_less(vabs(a), splat_f32(threshold, n), zero, h)
    if scores != 0:
        h = where_less(load_f32(scores, n), load_f32(cut, n), zero, h)
    return h


def neuron(activation: str) -> Any:
    """(gate, up or 0, score or 0, cut, threshold, n): h of n neurons, from the addresses of their values."""
    act, both = gate(activation), activation == "drelu"

    @inline
    def neurons(row, other, scores, cut, threshold, n):
        a = act(load_f32(row, n), n)
        h = a
        if other != 0:
            u = load_f32(other, n)
            if both:
                u = act(u, n)
            h = a * u
        return masked(h, a, threshold, scores, cut, n)

    return neurons


def build(family: str, variant: str) -> Any:
    """`pack`: src as it is. `activate:NAME`: act(src) * second, gate and up; without a second, act(src).

    Neurons that the sparse rules leave out become 0, so that a dense step gives what a sparse one would. With a choice,
    the arrays hold only the listed neurons. With a routing there is a row for each pair instead of each token:
    `activate` finds it at the pair's position, and `pack` takes the token's, where tokens are many.
    """
    args_of, step_of, choice_of, routing_of = Pack, Step, Choice, Routing
    activate = family == "activate"
    lanes = LANES
    neurons, packed = neuron(variant or "relu"), arrays(Pack)

    def pack(args, step, ith, turn):
        n_tok = i64_at(step + i64_at(args + args_of.count))
        as_rows = n_tok < i64_at(step + step_of.tile_min)
        routing, pairs = i64_at(args + args_of.routing), i64_at(args + args_of.pairs)
        if routing != 0:
            n_tok = i64_at(routing + routing_of.positions)
            if not activate and as_rows:
                n_tok = 0  # the tokens' own rows serve their pairs
        src, second = i64_at(args + args_of.src), i64_at(args + args_of.second)
        k, stride, segment = i64_at(args + args_of.k), i64_at(args + args_of.stride), i64_at(args + args_of.segment)
        threshold = f64_at(args + args_of.threshold)
        scores, cut = i64_at(args + args_of.scores), i64_at(args + args_of.cut)
        to = packed(args)
        choice = i64_at(args + args_of.choice)
        if choice != 0:
            k = i64_at(choice + choice_of.count)
        parts = (k + segment - 1) // segment
        together = neighbours(n_tok)
        n_chunks = (n_tok + together - 1) // together * parts
        while True:
            c = take(args, turn, n_chunks)
            if c < 0:
                break
            first = c // parts * together
            begin = (c % parts) * segment
            end = min(begin + segment, k)
            for t in range(first, min(first + together, n_tok)):
                row = src + t * stride * 4
                if pairs != 0:
                    token = i32_at(pairs + t * 4)
                    if token < 0:
                        continue
                    if not activate:
                        row = src + token * stride * 4
                if activate:
                    # In place: the gate projection is not needed again.
                    other = second + t * stride * 4 if second != 0 else 0
                    score = scores + t * stride * 4 if scores != 0 else 0
                    i = begin
                    while i + lanes <= end:
                        at = i * 4
                        up = other + at if other != 0 else 0
                        mask = score + at if score != 0 else 0
                        store(row + at, neurons(row + at, up, mask, cut + at, threshold, lanes))
                        i += lanes
                    while i < end:
                        at = i * 4
                        up = other + at if other != 0 else 0
                        mask = score + at if score != 0 else 0
                        put_f32(row + at, hsum(neurons(row + at, up, mask, cut + at, threshold, 1)))
                        i += 1
                pack_span(row, begin, end, k, t, n_tok, as_rows, to)
            finish(args)
        return n_chunks

    return pack

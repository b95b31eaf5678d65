"""Causal attention over the paged KV cache, with grouped queries, a sliding window and an online softmax.

The cache is read by spans of KV_SPAN blocks: scores of all positions, their softmax, the weighted sum of values. What
spans give for a query is merged in their order, first those of a part of KV_PART spans, then the parts (Milakov and
Gimelshein 2018; Dao 2023, "Flash-Decoding"), so a query's numbers depend on its own position alone. The queries of a
tile of tokens that share a key-value head share a pass.

Work is split by (tile, head), and, where that is not much, by part too: what each gives goes to a place of its own, and
the thread that brings the last one of a tile and head merges them.
"""

from __future__ import annotations

from typing import Any

from . import kv_products
from .atomics import atomic_add, atomic_put
from .layout import KV_BLOCK, KV_PART, KV_SPAN, QUERY_ROWS, SPLIT_TILES, Attention, Step
from .loads import f32_at, f64_at, i32_at, i64_at, load_f32, put_f32, put_i32, store
from .simd import hmax, hsum, lane_numbers, splat_f32, splat_i32, vmax, where_less
from .tape import finish, take_near
from .vmath import exp, tanh
from .weights import inline

_LOW = -1e30  # a score that no real one goes below
_ROW = KV_BLOCK * 4  # bytes of a query's scores of a block


@inline
def _cap(scores, step, n_blocks, cap):
    for b in range(n_blocks):
        s = load_f32(scores + b * step, 32) * splat_f32(1.0 / cap, 32)
        store(scores + b * step, splat_f32(cap, 32) * tanh(s, 32))


@inline
def _hide(scores, step, n_blocks, base, start, end, value):
    """Put a value where a query sees nothing: of positions base, base + 1, ..., before `start` and from `end` on."""
    for b in range(n_blocks):
        positions, hidden = lane_numbers(32) + splat_i32(base + b * 32, 32), splat_f32(value, 32)
        s = where_less(positions, splat_i32(end, 32), load_f32(scores + b * step, 32), hidden)
        store(scores + b * step, where_less(splat_i32(start - 1, 32), positions, s, hidden))


@inline
def _softmax(scores, step, n_blocks, to):
    """Scores of one query to weights; to: their maximum, then the sum of the weights."""
    best, total = splat_f32(_LOW, 32), splat_f32(0.0, 32)
    for b in range(n_blocks):
        best = vmax(best, load_f32(scores + b * step, 32))
    top = hmax(best)
    for b in range(n_blocks):
        p = exp(load_f32(scores + b * step, 32) - splat_f32(top, 32), 32)
        store(scores + b * step, p)
        total = total + p
    put_f32(to, top)
    put_f32(to + 4, hsum(total))


@inline
def merge(to, part, pad):
    """Add what a span gives to what those before it gave."""
    before, here = f32_at(to + pad * 4), f32_at(part + pad * 4)
    top = max(before, here)
    old = hsum(exp(splat_f32(before - top, 4), 4)) * 0.25
    new = hsum(exp(splat_f32(here - top, 4), 4)) * 0.25
    for c in range(0, pad, 32):
        a = load_f32(to + c * 4, 32) * splat_f32(old, 32)
        store(to + c * 4, a + load_f32(part + c * 4, 32) * splat_f32(new, 32))
    put_f32(to + pad * 4, top)
    put_f32(to + pad * 4 + 4, f32_at(to + pad * 4 + 4) * old + f32_at(part + pad * 4 + 4) * new)


@inline
def copy(to, source, nbytes):
    for c in range(0, nbytes, 64):
        store(to + c, load_f32(source + c, 16))


@inline
def rows_of(n):
    """Room for n queries of a head: whole panels of all widths."""
    return 1 if n == 1 else 3 if n <= 3 else 6 if n == 4 else 9 if n <= 8 else (n + 23) // 24 * 24


@inline
def put_out(out, part, dim, pad):
    """What all spans gave, divided by its sum."""
    inverse = 1.0 / f32_at(part + pad * 4 + 4)
    c = 0
    while c + 16 <= dim:
        store(out + c * 4, load_f32(part + c * 4, 16) * splat_f32(inverse, 16))
        c += 16
    while c < dim:
        put_f32(out + c * 4, f32_at(part + c * 4) * inverse)
        c += 1


def _scores(found: kv_products.Keys) -> Any:
    """(n, to, page, panels, dim, room, ahead): scores of n queries with a page, by panels of `width` queries."""
    one, three, four = found.few[1], found.few[3], found.few.get(4)
    many, most, has_four, panel_bytes = found.many, found.most, four is not None, found.panel_bytes
    four, convert, converts = four or three, found.convert or _nothing, found.convert is not None

    @inline
    def scores(n, to, page, panels, dim, room, ahead):
        if n == 1:
            one(to, page, panels, dim, ahead)
        elif n <= 3:
            three(to, page, panels, dim, ahead)
        elif n == 4 and has_four:
            four(to, page, panels, dim, ahead)
        else:
            if converts:
                convert(page, room, dim)
                page = room
            for t in range(0, n, most):
                many(to + t * _ROW, page, panels + t * dim * panel_bytes // 32, dim, ahead)

    return scores


def _mix(found: kv_products.Values) -> Any:
    """(n, o, stride, weights, page, dim, low, high, full, spare, room, ahead): what a page adds to n outputs."""
    one, three, four = found.few[1], found.few[3], found.few.get(4)
    many, most, has_four = found.many, found.most, four is not None
    four, convert, converts = four or three, found.convert or _nothing, found.convert is not None

    @inline
    def mix(n, o, stride, weights, page, dim, low, high, full, spare, room, ahead):
        if n == 1:
            one(o, stride, weights, page, dim, low, high, full, spare, ahead)
        elif n <= 3:
            three(o, stride, weights, page, dim, low, high, full, spare, ahead)
        elif n == 4 and has_four:
            four(o, stride, weights, page, dim, low, high, full, spare, ahead)
        else:
            if converts:
                convert(page, room, dim)
                page = room
            for t in range(0, n, most):
                many(o + t * stride, stride, weights + t * _ROW, page, dim, low, high, full, spare, ahead)

    return mix


def _width(found: kv_products.Keys) -> Any:
    """(n): queries of a panel."""
    most, has_four = found.most, 4 in found.few

    @inline
    def width(n):
        return 1 if n == 1 else 3 if n <= 3 else 4 if n == 4 and has_four else most

    return width


@inline
def _nothing(page, to, dim):
    pass


def build(family: str, variant: str) -> Any:
    """`attention:KEYS-VALUES` by their types; softcap: scores are cap * tanh(score / cap) (Gemma 2, arXiv:2408.00118).

    A thread's scratch, for QUERY_ROWS queries: int32 (first position seen, one past the last), spare memory of values,
    panels, a converted page, scores, what earlier spans gave, what this one gives.
    """
    args_of, step_of, block, span_blocks = Attention, Step, KV_BLOCK, KV_SPAN
    most_rows, most_tiles, row, span = QUERY_ROWS, SPLIT_TILES, _ROW, KV_BLOCK * KV_SPAN
    part_spans, part_positions = KV_PART, KV_BLOCK * KV_SPAN * KV_PART
    key_type, value_type = kv_products.keys(variant.split("-")[0]), kv_products.values(variant.split("-")[1])
    scores_of, mix, width, panel = _scores(key_type), _mix(value_type), _width(key_type), key_type.panel
    panel_bytes = key_type.panel_bytes

    @inline
    def page_of(base, table, b, n_kv, head, nbytes):
        return base + (i32_at(table + b * 4) * n_kv + head) * nbytes

    @inline
    def parts_of(tile, positions, window):
        """Parts that a tile sees: the first, and one past the last."""
        first, count = i32_at(tile), i32_at(tile + 4)
        last = i32_at(positions + (first + count - 1) * 4) + 1
        start = max(0, i32_at(positions + first * 4) + 1 - window) if window > 0 else 0
        return start // part_positions, (last + part_positions - 1) // part_positions

    def attention(args, step, ith, turn):
        n_tiles, tiles = i64_at(step + step_of.n_tiles), i64_at(step + step_of.tiles)
        positions, tables = i64_at(step + step_of.positions), i64_at(step + step_of.tables)
        q, out = i64_at(args + args_of.q), i64_at(args + args_of.out)
        n_head, n_kv = i64_at(args + args_of.n_head), i64_at(args + args_of.n_kv)
        dim_k, dim_v = i64_at(args + args_of.dim_k), i64_at(args + args_of.dim_v)
        keys, values = i64_at(args + args_of.keys), i64_at(args + args_of.values)
        key_bytes, value_bytes = i64_at(args + args_of.key_bytes), i64_at(args + args_of.value_bytes)
        scale, window = f64_at(args + args_of.scale), i64_at(args + args_of.window)
        cap, regions = f64_at(args + args_of.softcap), i64_at(args + args_of.regions)
        group = n_head // n_kv
        pad = (dim_v + 31) // 32 * 32
        stride = (pad + 16) * 4
        limits = i64_at(args + args_of.scratch) + ith * i64_at(args + args_of.scratch_bytes)
        spare = limits + most_rows * 8
        panels = spare + 1024
        room = panels + most_rows * ((dim_k * 4 + 63) // 64 * 64 + (dim_k + 31) // 32 * 8)
        scores = room + block * max(dim_k, dim_v) * 4 + 256
        whole = scores + most_rows * span * 4
        earlier = whole + most_rows * stride
        here = earlier + most_rows * stride

        # Parts apart, if there is room for all that they give; where they are many, several heads at a time, since
        # their pages lie side by side.
        needed, n_apart, longest = 0, 0, 0
        for i in range(min(n_tiles, most_tiles)):
            first_part, end_part = parts_of(tiles + i * 12, positions, window)
            longest = max(longest, i32_at(tiles + i * 12 + 4) * group)
            needed += (end_part - first_part) * n_head * i32_at(tiles + i * 12 + 4)
            n_apart += end_part - first_part
        split = n_tiles <= most_tiles and needed <= i64_at(args + args_of.n_parts)
        together = 1
        if split and n_apart >= 2 * regions:
            together = min(n_kv, max(1, most_rows // rows_of(longest)))
        n_sets = (n_kv + together - 1) // together
        n_chunks = (n_apart if split else n_tiles) * n_sets
        while True:
            chunk = take_near(args, turn, n_chunks, ith, args + args_of.regions)
            if chunk < 0:
                break
            part, i, p = i64_at(args + args_of.parts), 0, 0
            if split:
                first_part, end_part = parts_of(tiles, positions, window)
                while chunk >= (end_part - first_part) * n_sets:
                    chunk -= (end_part - first_part) * n_sets
                    part += (end_part - first_part) * n_head * i32_at(tiles + i * 12 + 4) * stride
                    i += 1
                    first_part, end_part = parts_of(tiles + i * 12, positions, window)
                p, h = first_part + chunk // n_sets, chunk % n_sets * together
                run_from, run_to = p, p + 1
            else:
                i, h = chunk // n_kv, chunk % n_kv
                first_part, end_part = parts_of(tiles + i * 12, positions, window)
                run_from, run_to = first_part, end_part
            n_parts, heads = end_part - first_part, min(together, n_kv - h)
            apart = split and n_parts > 1
            tile = tiles + i * 12
            first, n_query = i32_at(tile), i32_at(tile + 4) * group
            table = i64_at(tables + i32_at(tile + 8) * 8)
            last_block = i32_at(positions + (first + i32_at(tile + 4) - 1) * 4) // block
            for at in range(0, n_query, most_rows):
                n = min(most_rows, n_query - at)
                rows, wide = rows_of(n), width(n)
                panel_size = rows * dim_k * panel_bytes // 32
                starts_from, starts_to, ends_from, ends_to = 1 << 30, 0, 1 << 30, 0
                for t in range((n + wide - 1) // wide * wide):
                    query = at + min(t, n - 1)  # a short panel repeats the last query
                    token = first + query // group
                    to = panels + t // wide * wide * dim_k * panel_bytes // 32
                    for g in range(heads):
                        source = q + (token * n_head + (h + g) * group + query % group) * dim_k * 4
                        panel(source, to + g * panel_size, t % wide, wide, dim_k, scale)
                    end = i32_at(positions + token * 4) + 1
                    start = max(0, end - window) if window > 0 else 0
                    put_i32(limits + t * 8, start)
                    put_i32(limits + t * 8 + 4, end)
                    starts_from, starts_to = min(starts_from, start), max(starts_to, start)
                    ends_from, ends_to = min(ends_from, end), max(ends_to, end)
                row_step = (heads * rows + 23) // 24 * 24 * row
                for s in range(run_from * part_spans, run_to * part_spans):
                    low = max(s * span_blocks, starts_from // block)
                    high = min((s + 1) * span_blocks, (ends_to + block - 1) // block)
                    begins = s % part_spans == 0  # a part
                    to = earlier if begins else here
                    for b in range(low, high):
                        for g in range(heads):
                            page = page_of(keys, table, b, n_kv, h + g, key_bytes)
                            ahead = page_of(values, table, b, n_kv, h + g, value_bytes)
                            target = scores + (b - low) * row_step + g * rows * row
                            scores_of(n, target, page, panels + g * panel_size, dim_k, room, ahead)
                    if low < high or begins:
                        for t in range(n):
                            start, end = i32_at(limits + t * 8), i32_at(limits + t * 8 + 4)
                            partly = start > low * block or end < high * block
                            for g in range(heads):
                                result, own = to + (g * rows + t) * stride, scores + (g * rows + t) * row
                                for c in range(0, pad, 32):
                                    store(result + c * 4, splat_f32(0.0, 32))
                                if cap > 0.0:
                                    _cap(own, row_step, high - low, cap)
                                if partly:
                                    _hide(own, row_step, high - low, low * block, start, end, _LOW)
                                _softmax(own, row_step, high - low, result + pad * 4)
                                if partly:
                                    _hide(own, row_step, high - low, low * block, start, end, 0.0)
                                    if start >= high * block or end <= low * block:
                                        put_f32(result + pad * 4 + 4, 0.0)
                    for b in range(low, high):
                        full = starts_to <= b * block and ends_from >= (b + 1) * block
                        j, k = max(0, starts_from - b * block), min(block, ends_to - b * block)
                        next_block = min(b + span_blocks, last_block)
                        for g in range(heads):
                            page = page_of(values, table, b, n_kv, h + g, value_bytes)
                            ahead = page_of(keys, table, next_block, n_kv, h + g, key_bytes)
                            weights, result = scores + (b - low) * row_step + g * rows * row, to + g * rows * stride
                            mix(n, result, stride, weights, page, dim_v, j, k, full, spare, room, ahead)
                    if low < high and not begins:
                        for t in range(heads * rows):
                            merge(earlier + t * stride, here + t * stride, pad)
                    if not apart and n_parts > 1 and (s + 1) % part_spans == 0:
                        for t in range(n):
                            if s < (run_from + 1) * part_spans:
                                copy(whole + t * stride, earlier + t * stride, stride)
                            else:
                                merge(whole + t * stride, earlier + t * stride, pad)
                for g in range(heads):
                    found = (whole if n_parts > 1 else earlier) + g * rows * stride
                    for t in range(n):
                        if apart:
                            place = ((h + g) * n_parts + p - first_part) * n_query + at + t
                            copy(part + place * stride, earlier + (g * rows + t) * stride, stride)
                        else:
                            token, head = first + (at + t) // group, (h + g) * group + (at + t) % group
                            put_out(out + (token * n_head + head) * dim_v * 4, found + t * stride, dim_v, pad)
            if apart:
                for g in range(heads):
                    counter = i64_at(args + args_of.counts) + (i * n_kv + h + g) * 8
                    if atomic_add(counter, 1) == n_parts - 1:
                        atomic_put(counter, 0)
                        own = part + (h + g) * n_parts * n_query * stride
                        for t in range(n_query):
                            for p in range(1, n_parts):
                                merge(own + t * stride, own + (p * n_query + t) * stride, pad)
                            token, head = first + t // group, (h + g) * group + t % group
                            put_out(out + (token * n_head + head) * dim_v * 4, own + t * stride, dim_v, pad)
            finish(args)
        return n_chunks

    return attention

"""The first half of an FFN, fused: gates, the activation rule, and up only for the neurons that it leaves.

`ffn:GATE:UP:ACT` for one token, `ffn_tile:GATE:UP:ACT` for several, where a row is read if any token of the tile needs
it. GATE and UP are the weights' types, ACT the activation.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda, types

from .jit import Program
from .reduce import over_lanes
from .repack import KINDS
from .rows import ROWS, SPLIT, TILE, four_rows, one_row, over_split, pick, pick_token, spread, tile
from .weights import Device, array_types, device

ACTIVATIONS = ("silu", "gelu", "relu", "relu2", "drelu")
# Any types and activation can be built; those listed are what tests compile: each type, each activation and a mix.
_SAME = [f"{kind}:{kind}:silu" for kind in KINDS]
_LISTED = [*_SAME, *(f"Q4_0:Q4_0:{activation}" for activation in ACTIVATIONS[1:]), "Q4_K:Q6_K:silu"]
VARIANTS = {"ffn": _LISTED, "ffn_tile": _LISTED}


def launch(gate: str, up: str, activation: str, n: int, n_tok: int) -> tuple[str, tuple[int, int]]:
    """(kernel, grid) for n neurons and n_tok tokens: as for a matmul."""
    name = f"{gate}:{up}:{activation}"
    if n_tok == 1:
        return f"ffn:{name}", (-(-n // ROWS), 1)
    return f"ffn_tile:{name}", (-(-n // (ROWS * SPLIT)), -(-n_tok // TILE))


def build(family: str, variant: str, lanes: int) -> Program:
    """(*Wgate, *Wup, x, scores, cut [n], h, counts int64 [1], n, k, n_tok, use_scores, low, high, top).

    h[t, j] is the product of act(gate) and up, or 0 where neuron j is not active: where use_scores and scores[t, j] <
    cut[j] (nothing is read then), or where gate < top and not low <= gate <= high. Other comparisons with NaN leave it
    active. counts[0] grows by the active pairs of token and neuron. x as matmul's; grid: `launch`.
    """
    gate, up, activation = variant.split(":")
    kernel = (_single if family == "ffn" else _tiled)(gate, up, _ACTS[activation], lanes)
    g, u, floats = array_types(gate), array_types(up), types.float32[:, ::1]
    given = (floats, floats, types.float32[::1], floats, types.int64[::1])
    numbers = (*(types.int32,) * 4, *(types.float32,) * 3)
    return Program(spread(kernel, len(g), len(u)), (*g, *u, *given, *numbers), SPLIT * lanes)


@device
def _wanted(scores, cut, t, row, n, n_tok, use_scores):  # type: ignore[no-untyped-def]
    """Whether a neuron is there and its gate is to be computed."""
    if row >= n or t >= n_tok:
        return False
    return use_scores == 0 or not scores[t, row] < cut[row]


@device
def _active(g, low, high, top):  # type: ignore[no-untyped-def]
    return not (g < top and (g < low or g > high))


def _single(gate: str, up: str, act: Device, lanes: int) -> Device:
    threads = SPLIT * lanes
    sums = over_split(lanes)

    def products(kind: str) -> Device:
        four, one = four_rows(kind, threads), one_row(kind, threads)

        @device
        def needed(w, x, t, first, n, k, me, a, b, c, d):  # type: ignore[no-untyped-def]
            """Parts of four rows' products; which are wanted is the same in all threads."""
            row, last, t = np.uint64(first), np.uint64(n - 1), np.uint64(t)
            k, me = np.uint64(k), np.uint64(me)
            if a and b and c and d:
                return four(w, x, t, row, last, k, me)
            s0 = s1 = s2 = s3 = np.float32(0.0)
            if a:
                s0 = one(w, x, t, row, k, me)
            if b:
                s1 = one(w, x, t, row + np.uint64(1), k, me)
            if c:
                s2 = one(w, x, t, row + np.uint64(2), k, me)
            if d:
                s3 = one(w, x, t, row + np.uint64(3), k, me)
            return s0, s1, s2, s3

        return needed

    gates, ups = products(gate), products(up)

    def ffn(  # type: ignore[no-untyped-def]
        wg, wu, x, scores, cut, h, counts, n, k, n_tok, use_scores, low, high, top
    ):
        me, first, t = cuda.threadIdx.x, cuda.blockIdx.x * ROWS, cuda.blockIdx.y
        a = _wanted(scores, cut, t, first, n, n_tok, use_scores)
        b = _wanted(scores, cut, t, first + 1, n, n_tok, use_scores)
        c = _wanted(scores, cut, t, first + 2, n, n_tok, use_scores)
        d = _wanted(scores, cut, t, first + 3, n, n_tok, use_scores)
        s = gates(wg, x, t, first, n, k, me, a, b, c, d)
        g = sums(s[0], s[1], s[2], s[3])
        a, b = a and _active(g[0], low, high, top), b and _active(g[1], low, high, top)
        c, d = c and _active(g[2], low, high, top), d and _active(g[3], low, high, top)
        s = ups(wu, x, t, first, n, k, me, a, b, c, d)
        u = sums(s[0], s[1], s[2], s[3])
        if me < ROWS and first + me < n and t < n_tok:
            on = (a if me == 0 else b) if me < 2 else (c if me == 2 else d)
            h[t, first + me] = act(pick(g, me), pick(u, me)) if on else np.float32(0.0)
        if me == 0:
            count = (1 if a else 0) + (1 if b else 0) + (1 if c else 0) + (1 if d else 0)
            if count > 0:
                cuda.atomic.add(counts, 0, np.int64(count))

    return ffn


def _tiled(gate: str, up: str, act: Device, lanes: int) -> Device:
    gates, ups, total = tile(gate, lanes), tile(up, lanes), over_lanes(lanes, SPLIT * lanes)

    def ffn_tile(  # type: ignore[no-untyped-def]
        wg, wu, x, scores, cut, h, counts, n, k, n_tok, use_scores, low, high, top
    ):
        lane, t = cuda.threadIdx.x % lanes, cuda.blockIdx.y * TILE
        row = (cuda.blockIdx.x * SPLIT + cuda.threadIdx.x // lanes) * ROWS
        last = np.uint64(n - 1)
        at, first, tokens = min(np.uint64(row), last), np.uint64(t), np.uint64(n_tok)
        # Of the ROWS * TILE pairs of a row and a token, a lane of a warp looks after one. Rows that no token needs are
        # taken for rows of no weights.
        wanted = 0
        for i in range(lane, ROWS * TILE, lanes):
            if _wanted(scores, cut, t + i // ROWS, row + i % ROWS, n, n_tok, use_scores):
                wanted += 1
        width = np.uint64(k) if total(np.float32(wanted)) > 0 else np.uint64(0)
        g = gates(wg, x, first, tokens, at, last, width, np.uint64(lane))
        active = 0
        for i in range(lane, ROWS * TILE, lanes):
            r, tok = row + i % ROWS, t + i // ROWS
            if _wanted(scores, cut, tok, r, n, n_tok, use_scores):
                mine = pick(pick_token(g, i // ROWS), i % ROWS)
                h[tok, r] = mine
                if _active(mine, low, high, top):
                    active += 1
        count = total(np.float32(active))
        width = np.uint64(k) if count > 0 else np.uint64(0)
        u = ups(wu, x, first, tokens, at, last, width, np.uint64(lane))
        for i in range(lane, ROWS * TILE, lanes):
            r, tok = row + i % ROWS, t + i // ROWS
            value = np.float32(0.0)
            if _wanted(scores, cut, tok, r, n, n_tok, use_scores) and _active(h[tok, r], low, high, top):
                value = act(h[tok, r], pick(pick_token(u, i // ROWS), i % ROWS))
            if r < n and tok < n_tok:
                h[tok, r] = value
        if lane == 0 and count > 0:
            cuda.atomic.add(counts, 0, np.int64(count))

    return ffn_tile


@device
def _relu(g):  # type: ignore[no-untyped-def]
    return np.float32(0.0) if g <= np.float32(0.0) else g


@device
def _silu_up(g, u):  # type: ignore[no-untyped-def]
    e = np.float32(math.exp(-abs(g)))  # at most 1, whatever the gate
    return g * ((np.float32(1.0) if g >= np.float32(0.0) else e) / (np.float32(1.0) + e)) * u


@device
def _gelu_up(g, u):  # type: ignore[no-untyped-def]
    """GELU's tanh form (arXiv:1606.08415, section 2)."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (g + np.float32(0.044715) * g * g * g)
    return np.float32(0.5) * g * (np.float32(1.0) + np.float32(math.tanh(inner))) * u


@device
def _relu_up(g, u):  # type: ignore[no-untyped-def]
    return _relu(g) * u


@device
def _relu2_up(g, u):  # type: ignore[no-untyped-def]
    return _relu(g) * _relu(g) * u


@device
def _drelu_up(g, u):  # type: ignore[no-untyped-def]
    return _relu(g) * _relu(u)


_ACTS = {"silu": _silu_up, "gelu": _gelu_up, "relu": _relu_up, "relu2": _relu2_up, "drelu": _drelu_up}

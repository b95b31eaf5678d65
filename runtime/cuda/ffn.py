"""The first half of an FFN, fused: gates, the activation rule, and up only for the neurons that it leaves.

`ffn:GATE:UP:ACT` for one token, `ffn_tile:GATE:UP:ACT` for several, where a row is read if any token of the tile needs
it. GATE and UP are the weights' types, ACT the activation. `ffn:GATE:ACT` is an FFN without a gate: its only projection
is in the gate's place. With `:shares` behind it, it is for a mixture of experts, whose neurons count as much as their
expert; the others need fewer registers without.
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

ACTIVATIONS = ("silu", "gelu", "gelu_erf", "relu", "relu2", "drelu")
# Any types and activation can be built; those listed are what tests compile: each type, each activation, a mix, no
# gate, experts.
_SAME = [f"{kind}:{kind}:silu" for kind in KINDS]
_ACTIVATED = [f"Q4_0:Q4_0:{activation}" for activation in ACTIVATIONS[1:]]
_UNGATED = ["F16:gelu_erf", "Q4_0:gelu", "Q5_K:relu", "Q8_0:relu2"]
_SHARES = [f"{kind}:{kind}:silu:shares" for kind in ("F16", "Q4_0", "Q4_K", "Q6_K", "Q8_0")]
_LISTED = [*_SAME, *_ACTIVATED, "Q4_K:Q6_K:silu", *_UNGATED, *_SHARES]
VARIANTS = {"ffn": _LISTED, "ffn_tile": _LISTED}
_ONES = (np.float32(1.0),) * 4
SCORES, GATE_BIAS, UP_BIAS = 1, 2, 4  # mode


def launch(
    gate: str, up: str, activation: str, n: int, n_tok: int, shares: bool = False
) -> tuple[str, tuple[int, int]]:
    """(kernel, grid) for n neurons and n_tok tokens: as for a matmul. up: "" without a gate; shares: of experts."""
    name = f"{gate}:{up}:{activation}" if up else f"{gate}:{activation}"
    name += ":shares" if shares else ""
    if n_tok == 1:
        return f"ffn:{name}", (-(-n // ROWS), 1)
    return f"ffn_tile:{name}", (-(-n // (ROWS * SPLIT)), -(-n_tok // TILE))


def build(family: str, variant: str, lanes: int) -> Program:
    """(*Wgate, *Wup, x, scores, cut, gate_bias, up_bias, h, counts int64 [1], n, k, n_tok, per, mode, low, high, top).

    h[t, j] is the product of act(gate) and up, or 0 where neuron j is not active. It is active unless gate < top and
    not low <= gate <= high; other comparisons with NaN leave it active. mode: SCORES: nor is it, and nothing is read,
    where scores[t, j] < cut[j]. GATE_BIAS, UP_BIAS: the projections have a bias [n]. With shares, it is not active and
    nothing is read where scores[t, j // per] is 0, and h is multiplied by that. Arrays that are not named may be any.
    counts[0] grows by the active pairs of token and neuron. x as matmul's; grid: `launch`. Without a gate there is no
    Wup, and up is 1.
    """
    gate, *rest = variant.removesuffix(":shares").split(":")
    up, act, shares = rest[0] if len(rest) > 1 else "", _ACTS[rest[-1]], variant.endswith(":shares")
    g, floats, vector = array_types(gate), types.float32[:, ::1], types.float32[::1]
    u = array_types(up) if up else ()
    given = (floats, floats, vector, vector, vector, floats, types.int64[::1])
    numbers = (*(types.int32,) * 5, *(types.float32,) * 3)
    kernel = (_single if family == "ffn" else _tiled)(gate, up, act, shares, lanes)
    flat = spread(kernel, len(g), len(u)) if up else spread(kernel, len(g))
    return Program(flat, (*g, *u, *given, *numbers), SPLIT * lanes)


def _choice(shares: bool) -> Device:
    """(scores, cut, t, row, n, n_tok, per, mode): whether a neuron is there and its gate is to be computed."""

    def wanted(scores, cut, t, row, n, n_tok, per, mode):  # type: ignore[no-untyped-def]
        if row >= n or t >= n_tok:
            return False
        if shares:
            return scores[t, row // per] != np.float32(0.0)
        return mode & SCORES == 0 or not scores[t, row] < cut[row]

    return device(wanted)


@device
def _active(g, low, high, top):  # type: ignore[no-untyped-def]
    return not (g < top and (g < low or g > high))


@device
def _biased(s, bias, first, n, wanted):  # type: ignore[no-untyped-def]
    """Four rows' products with their biases, if wanted."""
    if wanted == 0:
        return s
    last = n - 1
    return (
        s[0] + bias[min(first, last)], s[1] + bias[min(first + 1, last)],
        s[2] + bias[min(first + 2, last)], s[3] + bias[min(first + 3, last)],
    )  # fmt: skip


def _single(gate: str, up: str, act: Device, shares: bool, lanes: int) -> Device:
    threads, gated, wanted = SPLIT * lanes, bool(up), _choice(shares)
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

    gates = products(gate)
    ups = products(up or gate)

    @device
    def body(  # type: ignore[no-untyped-def]
        wg, wu, x, scores, cut, gate_bias, up_bias, h, counts, n, k, n_tok, per, mode, low, high, top
    ):
        me, first, t = cuda.threadIdx.x, cuda.blockIdx.x * ROWS, cuda.blockIdx.y
        row = first + me
        mine = me < ROWS and row < n and t < n_tok
        a = wanted(scores, cut, t, first, n, n_tok, per, mode)
        b = wanted(scores, cut, t, first + 1, n, n_tok, per, mode)
        c = wanted(scores, cut, t, first + 2, n, n_tok, per, mode)
        d = wanted(scores, cut, t, first + 3, n, n_tok, per, mode)
        if not (a or b or c or d):
            if mine:
                h[t, row] = np.float32(0.0)
            return
        s = gates(wg, x, t, first, n, k, me, a, b, c, d)
        g = _biased(sums(s[0], s[1], s[2], s[3]), gate_bias, first, n, mode & GATE_BIAS)
        a, b = a and _active(g[0], low, high, top), b and _active(g[1], low, high, top)
        c, d = c and _active(g[2], low, high, top), d and _active(g[3], low, high, top)
        if gated:
            s = ups(wu, x, t, first, n, k, me, a, b, c, d)
            u = _biased(sums(s[0], s[1], s[2], s[3]), up_bias, first, n, mode & UP_BIAS)
        else:
            u = _ONES
        if mine:
            on = (a if me == 0 else b) if me < 2 else (c if me == 2 else d)
            value = np.float32(0.0)
            if on:
                value = act(pick(g, me), pick(u, me))
                if shares:
                    value *= scores[t, row // per]
            h[t, row] = value
        if me == 0:
            count = (1 if a else 0) + (1 if b else 0) + (1 if c else 0) + (1 if d else 0)
            if count > 0:
                cuda.atomic.add(counts, 0, np.int64(count))

    return _with(body, gated)


def _tiled(gate: str, up: str, act: Device, shares: bool, lanes: int) -> Device:
    gates, ups, total = tile(gate, lanes), tile(up or gate, lanes), over_lanes(lanes, SPLIT * lanes)
    gated, wanted = bool(up), _choice(shares)

    @device
    def body(  # type: ignore[no-untyped-def]
        wg, wu, x, scores, cut, gate_bias, up_bias, h, counts, n, k, n_tok, per, mode, low, high, top
    ):
        lane, t = cuda.threadIdx.x % lanes, cuda.blockIdx.y * TILE
        row = (cuda.blockIdx.x * SPLIT + cuda.threadIdx.x // lanes) * ROWS
        last = np.uint64(n - 1)
        at, first, tokens = min(np.uint64(row), last), np.uint64(t), np.uint64(n_tok)
        # Of the ROWS * TILE pairs of a row and a token, a lane of a warp looks after one. Rows that no token needs are
        # taken for rows of no weights.
        count = 0
        for i in range(lane, ROWS * TILE, lanes):
            if wanted(scores, cut, t + i // ROWS, row + i % ROWS, n, n_tok, per, mode):
                count += 1
        width = np.uint64(k) if total(np.float32(count)) > 0 else np.uint64(0)
        g = gates(wg, x, first, tokens, at, last, width, np.uint64(lane))
        active = 0
        for i in range(lane, ROWS * TILE, lanes):
            r, tok = row + i % ROWS, t + i // ROWS
            if wanted(scores, cut, tok, r, n, n_tok, per, mode):
                mine = pick(pick_token(g, i // ROWS), i % ROWS)
                if mode & GATE_BIAS:
                    mine += gate_bias[r]
                h[tok, r] = mine
                if _active(mine, low, high, top):
                    active += 1
        found = total(np.float32(active))
        if gated:
            width = np.uint64(k) if found > 0 else np.uint64(0)
            g = ups(wu, x, first, tokens, at, last, width, np.uint64(lane))
        for i in range(lane, ROWS * TILE, lanes):
            r, tok = row + i % ROWS, t + i // ROWS
            value = np.float32(0.0)
            if wanted(scores, cut, tok, r, n, n_tok, per, mode) and _active(h[tok, r], low, high, top):
                u = np.float32(1.0)
                if gated:
                    u = pick(pick_token(g, i // ROWS), i % ROWS)
                    if mode & UP_BIAS:
                        u += up_bias[r]
                value = act(h[tok, r], u)
                if shares:
                    value *= scores[tok, r // per]
            if r < n and tok < n_tok:
                h[tok, r] = value
        if lane == 0 and found > 0:
            cuda.atomic.add(counts, 0, np.int64(found))

    return _with(body, gated)


def _with(body: Device, gated: bool) -> Device:
    """The kernel of a body, with the weights that it has."""

    def ffn(  # type: ignore[no-untyped-def]
        wg, wu, x, scores, cut, gate_bias, up_bias, h, counts, n, k, n_tok, per, mode, low, high, top
    ):
        body(wg, wu, x, scores, cut, gate_bias, up_bias, h, counts, n, k, n_tok, per, mode, low, high, top)

    def plain(  # type: ignore[no-untyped-def]
        wg, x, scores, cut, gate_bias, up_bias, h, counts, n, k, n_tok, per, mode, low, high, top
    ):
        body(wg, wg, x, scores, cut, gate_bias, up_bias, h, counts, n, k, n_tok, per, mode, low, high, top)

    return ffn if gated else plain


@device
def _relu(g):  # type: ignore[no-untyped-def]
    return np.float32(0.0) if g <= np.float32(0.0) else g


@device
def _logistic(x):  # type: ignore[no-untyped-def]
    e = np.float32(math.exp(-abs(x)))  # at most 1, whatever x
    return (np.float32(1.0) if x >= np.float32(0.0) else e) / (np.float32(1.0) + e)


@device
def _silu_up(g, u):  # type: ignore[no-untyped-def]
    return g * _logistic(g) * u


@device
def _gelu_up(g, u):  # type: ignore[no-untyped-def]
    """GELU's tanh form (arXiv:1606.08415, section 2); 1 + tanh(z) is twice the logistic function of 2 z."""
    z2 = np.float32(2 * math.sqrt(2 / math.pi)) * (g + np.float32(0.044715) * g * g * g)
    return g * _logistic(z2) * u


@device
def _gelu_erf_up(g, u):  # type: ignore[no-untyped-def]
    return np.float32(0.5) * g * np.float32(math.erfc(-g * np.float32(math.sqrt(0.5)))) * u


@device
def _relu_up(g, u):  # type: ignore[no-untyped-def]
    return _relu(g) * u


@device
def _relu2_up(g, u):  # type: ignore[no-untyped-def]
    return _relu(g) * _relu(g) * u


@device
def _drelu_up(g, u):  # type: ignore[no-untyped-def]
    return _relu(g) * _relu(u)


_ACTS = {
    "silu": _silu_up,
    "gelu": _gelu_up,
    "gelu_erf": _gelu_erf_up,
    "relu": _relu_up,
    "relu2": _relu2_up,
    "drelu": _drelu_up,
}

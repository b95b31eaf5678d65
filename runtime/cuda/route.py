"""The router of a mixture of experts: which experts a token uses, and with what weights."""

from __future__ import annotations

import math

import numpy as np
from numba import cuda, types

from .jit import WARP, Program
from .reduce import over_block

VARIANTS = {"route": [""]}
_LOWEST = np.float32(-3.4028235e38)


@cuda.jit(device=True)
def _chosen(logits, t, expert, n_used):  # type: ignore[no-untyped-def]
    """Whether fewer than n_used experts come before this one: of equal logits the lower id does."""
    mine, before = logits[t, expert], 0
    for other in range(logits.shape[1]):
        value = logits[t, other]
        if value > mine or (value == mine and other < expert):
            before += 1
    return before < n_used


def build(family: str, variant: str, lanes: int) -> Program:
    """`route`: (logits [n, n_expert], experts int32 [m], out [n, m], n_used, normed). Grid: tokens.

    out[t, j] is the weight of expert experts[j] for token t: its softmax over all experts, if it is one of the n_used
    with the greatest logits, else 0; normed: divided by the sum of those n_used.
    """
    threads = 128 if lanes == WARP else lanes
    total, largest = over_block(threads), over_block(threads, largest=True)

    def route(logits, experts, out, n_used, normed):  # type: ignore[no-untyped-def]
        t, me, n_expert = cuda.blockIdx.x, cuda.threadIdx.x, logits.shape[1]
        best = _LOWEST
        for expert in range(me, n_expert, threads):
            best = max(best, logits[t, expert])
        best = largest(best)
        mass = np.float32(0.0)
        for expert in range(me, n_expert, threads):
            if normed == 0 or _chosen(logits, t, expert, n_used):
                mass += np.float32(math.exp(logits[t, expert] - best))
        mass = total(mass)
        for j in range(me, experts.shape[0], threads):
            weight = np.float32(0.0)
            if _chosen(logits, t, experts[j], n_used):
                weight = np.float32(math.exp(logits[t, experts[j]] - best)) / mass
            out[t, j] = weight

    floats = types.float32[:, ::1]
    return Program(route, (floats, types.int32[::1], floats, types.int32, types.int32), threads)

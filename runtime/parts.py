"""How a run of tokens is cut for the engine, so that the same text is always computed by the same kernels."""

from __future__ import annotations

from collections.abc import Iterator

from .cpu.layout import TILE_MIN


def parts(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of 0..n-1, of at most `size` each; none is shorter than TILE_MIN unless n is.

    A shorter run takes the kernels of single tokens, which round otherwise. size: at least 2 * TILE_MIN.
    """
    start = 0
    while start < n:
        stop = min(start + size, n)
        if 0 < n - stop < TILE_MIN:
            stop = n - TILE_MIN
        yield slice(start, stop)
        start = stop

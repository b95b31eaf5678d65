"""Sums and maxima over lanes and blocks, and that every thread gets them."""

from __future__ import annotations

from typing import Any

import cuda_simulator  # noqa: F401
import numpy as np
import pytest
from numba import cuda

from hotcold.runtime.cuda import jit
from hotcold.runtime.cuda.reduce import over_block, over_lanes, wait_lanes

SHAPES = [(1, 1), (1, 4), (2, 4), (4, 4), (4, 8)] if jit.simulated() else [(1, 64), (8, 256), (32, 32), (32, 512)]


def run(body: Any, values: np.ndarray) -> np.ndarray:
    """body(values, out) on one block of as many threads as values."""
    out = cuda.to_device(np.full_like(values, np.nan))
    cuda.jit(body)[1, len(values)](cuda.to_device(values), out)
    return np.asarray(out.copy_to_host())


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize(("lanes", "threads"), SHAPES)
def test_over_lanes(lanes: int, threads: int, largest: bool) -> None:
    total = over_lanes(lanes, threads, largest)

    def body(values, out):  # type: ignore[no-untyped-def]
        me = cuda.threadIdx.x
        first = total(values[me])
        out[me] = first + total(values[me] * np.float32(2.0))  # a second call must not see the first one's values

    values = np.random.default_rng(0).integers(-50, 50, threads).astype(np.float32)  # whose sums are exact
    groups = values.reshape(-1, lanes)
    wanted = 3 * (groups.max(axis=1) if largest else groups.sum(axis=1))
    np.testing.assert_array_equal(run(body, values), np.repeat(wanted, lanes))


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("threads", sorted({threads for _, threads in SHAPES}))
def test_over_block(threads: int, largest: bool) -> None:
    total = over_block(threads, largest)

    def body(values, out):  # type: ignore[no-untyped-def]
        me = cuda.threadIdx.x
        first = total(values[me])
        out[me] = first + total(values[me] * np.float32(2.0))

    values = np.random.default_rng(1).integers(-50, 50, threads).astype(np.float32)
    wanted = 3 * (values.max() if largest else values.sum())
    np.testing.assert_array_equal(run(body, values), np.full(threads, wanted))


@pytest.mark.parametrize(("lanes", "threads"), SHAPES)
def test_lanes_see_what_lanes_wrote(lanes: int, threads: int) -> None:
    wait = wait_lanes(lanes)

    def body(values, out):  # type: ignore[no-untyped-def]
        shared = cuda.shared.array(512, np.float32)
        me = cuda.threadIdx.x
        for turn in range(3):
            wait()
            shared[me] = values[me] + np.float32(turn)
            wait()
            out[me] = shared[me - me % lanes + (me + 1) % lanes]

    values = np.arange(threads, dtype=np.float32)
    np.testing.assert_array_equal(run(body, values), np.roll(values.reshape(-1, lanes), -1, axis=1).ravel() + 2)

"""The walker: many steps of one tape, of changing sizes, by more threads than there are cores."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from kernel_harness import LEVELS, Buffer, Op, Tape, exact_activations, pack_op, packed, weights

from hotcold.runtime.cpu.layout import MatMul, Norm, Step

K, N, MOST = 96, 50, 12


def chain(x: Buffer, out: Buffer) -> list[Op]:
    """x -> norm -> matmul into `out` -> pack of `out` -> matmul over x: each op reads what the one before wrote."""
    rng = np.random.default_rng(1)
    first, second = packed(K, MOST, True, False), packed(N, MOST, False, True)
    norm = {"src": x, "weight": Buffer.full(K, value=1), "k": K, "eps": 1e-5, "count": Step.n_tok, **first}
    common = {"bias": 0, "count": Step.n_tok, "add": 0, "chunk": 8, "panels": 1}
    down, up = weights("Q4_0", N, K, rng), weights("F32", K, N, rng)
    sizes = {"k": K, "n": N, "out_stride": N, "row_bytes": down.shape[1]}
    back = {"k": N, "n": K, "out_stride": K, "row_bytes": up.shape[1]}
    return [
        Op("norm", Norm, norm),
        Op("matmul:Q4_0", MatMul, {"w": Buffer(down), "out": out, **common, **sizes, **_arrays(first)}),
        pack_op(out, second),
        Op("matmul:F32", MatMul, {"w": Buffer(up), "out": x, **common, **back, **_arrays(second)}),
    ]


def _arrays(fields: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if name.startswith("x")}


def steps(level: str, n_threads: int, counts: list[int]) -> list[np.ndarray]:
    x, out = Buffer(exact_activations(MOST, K, np.random.default_rng(2))), Buffer.full((MOST, N), value=0)
    results = []
    with Tape(level, chain(x, out), n_threads) as tape:
        for count in counts:
            tape.walk(n_tok=count)
            results.append(np.array(x.array))
    return results


@pytest.mark.parametrize("level", LEVELS)
def test_every_step_is_whole(level: str) -> None:
    counts = [1, 12, 3, 8, 7, 2, 1, 9] * 25
    wanted = steps(level, 1, counts)
    assert all(np.isfinite(result).all() for result in wanted)
    for n_threads in (2, 5):
        for a, b in zip(wanted, steps(level, n_threads, counts), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("level", LEVELS[:1])
def test_tapes_side_by_side(level: str) -> None:
    """Two tapes walked from two Python threads, each with threads of its own."""
    counts = [1, 9, 2] * 10
    wanted = steps(level, 1, counts)
    results: list[list[np.ndarray]] = []
    walkers = [threading.Thread(target=lambda: results.append(steps(level, 2, counts))) for _ in range(2)]
    for walker in walkers:
        walker.start()
    for walker in walkers:
        walker.join(60)
    assert len(results) == 2
    for result in results:
        np.testing.assert_array_equal(wanted, result)


@pytest.mark.parametrize("level", LEVELS[:1])
def test_closing_ends_the_threads(level: str) -> None:
    before = threading.active_count()
    for walks in (0, 1):
        x, out = Buffer.full((MOST, K), value=1), Buffer.full((MOST, N), value=0)
        with Tape(level, chain(x, out), 4) as tape:
            assert threading.active_count() == before + 3
            for _ in range(walks):
                tape.walk(n_tok=1)
        assert threading.active_count() == before

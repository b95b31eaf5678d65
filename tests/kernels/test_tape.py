"""The walker: many steps of one tape, of changing sizes, by more threads than there are cores; rows with conditions."""

from __future__ import annotations

import math
import platform
import threading
from typing import Any

import naive
import numpy as np
import pytest
from kernel_harness import LEVELS, Array, Buffer, Op, Tape, choice, exact_activations, pack_op, packed, weights

from hotcold.runtime.cpu.layout import ARRAYS, TILE_MIN, AddParts, Choice, Down, MatMul, Norm, Pack, Rows, Select, Step

K, N, MOST = 96, 50, 12
NORM = {"k": K, "group": K, "n_weight": K, "eps": 1e-5, "gain": 1.0}


def chain(x: Buffer, out: Buffer) -> list[Op]:
    """x -> norm -> matmul into `out` -> pack of `out` -> matmul over x: each op reads what the one before wrote."""
    rng = np.random.default_rng(1)
    first, second = packed(K, MOST, True, False), packed(N, MOST, False, True)
    norm = {"src": x, "weight": Buffer.full(K, value=1), **NORM, "count": Step.n_tok, **first}
    common = {"bias": 0, "count": Step.n_tok, "add": 0, "chunk": 8, "panels": 1}
    down, up = weights("Q4_0", N, K, rng), weights("F32", K, N, rng)
    sizes = {"k": K, "n": N, "out_stride": N, "row_bytes": down.shape[1]}
    back = {"k": N, "n": K, "out_stride": K, "row_bytes": up.shape[1]}
    return [
        Op("norm:rms", Norm, norm),
        Op("matmul:Q4_0", MatMul, {"w": Buffer(down), "out": out, **common, **sizes, **_arrays(first)}),
        pack_op(out, second),
        Op("matmul:F32", MatMul, {"w": Buffer(up), "out": x, **common, **back, **_arrays(second)}),
    ]


def _arrays(fields: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if name in ARRAYS}


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


# --- rows with conditions ---


def copies(n: int, conditions: list[tuple[Buffer | int, int]], barriers: list[bool]) -> tuple[list[Op], list[Array]]:
    """Ops that pack the same n floats, each into an array of its own."""
    source = Buffer(np.arange(1, n + 1, dtype=np.float32)[None])
    ops, results = [], []
    for (when, want), barrier in zip(conditions, barriers, strict=True):
        fields = packed(n, 1, False, True)
        results.append(fields["xf"].array.view(np.float32)[:n])
        ops.append(pack_op(source, fields, segment=16)._replace(when=when, want=want, barrier=barrier))
    return ops, results


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("level", LEVELS)
def test_a_row_runs_where_its_condition_holds(level: str, n_threads: int) -> None:
    """Whether it has a barrier or not, at either end of a segment, and in a segment of skipped rows alone."""
    flag = Buffer(np.zeros(1, np.int64))
    conditions: list[tuple[Buffer | int, int]] = [(flag, 1), (flag, 0), (0, 0), (flag, 1), (flag, 2), (0, 1), (flag, 0)]
    for barriers in ([True] * 7, [False, True, False, False, True, False, True], [False] * 6 + [True]):
        ops, results = copies(100, conditions, barriers)
        with Tape(level, ops, n_threads) as tape:
            for value in (0, 1, 2, -1, 1, 1, 0) * 5:
                flag.array[0] = value
                for result in results:
                    result[:] = 0
                tape.walk(n_tok=1)
                for (when, want), result in zip(conditions, results, strict=True):
                    runs = when == 0 or want == value
                    np.testing.assert_array_equal(result, np.arange(1, 101) * runs)


class FFN:
    """A ReLU FFN with its norm, whose steps go one way or the other by the number of active neurons."""

    n_ff, limit, parts = 60, 28, 4

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.gate, self.up = rng.standard_normal((2, self.n_ff, K), np.float32)
        self.down = np.float32(0.003) * rng.standard_normal((K, self.n_ff), np.float32)
        self.x = rng.standard_normal((MOST, K), np.float32)

    def ops(self, x: Buffer, state: Buffer) -> list[Op]:
        n = self.n_ff
        normed, hidden = packed(K, MOST, False, True), packed(n, MOST, False, True)
        gate, up, picked = (Buffer.full((MOST, n)) for _ in range(3))
        sums, listed = Buffer.full((self.parts, TILE_MIN - 1, K)), Buffer.full(n, np.int32, -1)
        chosen = {"list": listed, "choice": state}
        into = {"bias": 0, "k": K, "n": n, "row_bytes": 4 * K, "out_stride": n, "count": Step.n_tok, "add": 0}
        into |= {"chunk": 8, "panels": 1, **_arrays(normed)}
        listed_rows = {"k": K, "row_bytes": 4 * K, "out_stride": n, "parts": 8, "ahead": 3}
        few = {"k": n, "stride": n, "count": Step.n_tok, "segment": 16, "second": up}
        norm = {"src": x, "weight": Buffer.full(K, value=1), **NORM, "count": Step.n_tok, **normed}
        rule = {"low": math.inf, "high": math.inf, "top": 1e-38, "limit": self.limit}
        select = {"src": gate, "n": n, "picked": picked, **rule, **chosen}
        up_rows = {"w": Buffer(self.up), "out": up, **listed_rows, **chosen, **_arrays(normed)}
        add = {"w": Buffer(np.ascontiguousarray(self.down.T)), "out": sums, "h": picked, "h_stride": n, "n": K}
        add |= {"row_bytes": 4 * K, "parts": self.parts, "ahead": 4, **chosen}
        back = {**into, "k": n, "n": K, "row_bytes": 4 * n, "out_stride": K, "add": 1, **_arrays(hidden)}

        def branch(sparse: int, kernel: str, layout: Any, fields: dict[str, Any], barrier: bool = True) -> Op:
            return Op(kernel, layout, fields, state, sparse, barrier)

        return [
            Op("norm:rms", Norm, norm),
            Op("matmul:F32", MatMul, {**into, "w": Buffer(self.gate), "out": gate}),
            Op("select:gates", Select, select),
            branch(1, "rows:F32", Rows, up_rows),
            branch(1, "activate:relu", Pack, {**few, "src": picked, "choice": state}),
            branch(1, "down:F32", Down, add),
            branch(1, "add_parts", AddParts, {"sums": sums, "out": x, "add": 1, "n": K, "parts": self.parts}, False),
            branch(0, "matmul:F32", MatMul, {**into, "w": Buffer(self.up), "out": up}),
            branch(0, "activate:relu", Pack, {**few, "src": gate, **hidden}),
            branch(0, "matmul:F32", MatMul, {**back, "w": Buffer(self.down), "out": x}),
        ]

    def run(self, level: str, n_threads: int, counts: list[int]) -> tuple[list[Array], list[int]]:
        """Steps of `counts` tokens: x float32 (MOST, K) before the first and after each; whether each was sparse."""
        x, state = Buffer(self.x), choice()
        results, sparse = [self.x], []
        with Tape(level, self.ops(x, state), n_threads) as tape:
            for count in counts:
                tape.walk(n_tok=count)
                results.append(np.array(x.array))
                sparse.append(int(state.array[Choice.sparse // 8]))
        return results, sparse

    def oracle(self, x: Array, count: int) -> tuple[Array, int]:
        """x after a dense step, in float64, and the number of neurons that are active."""
        after = x.astype(np.float64)
        normed = naive.rmsnorm(after[:count], np.ones(K), 1e-5)
        gate = normed @ self.gate.T
        after[:count] += naive.glu(gate, normed @ self.up.T, "relu") @ self.down.T
        return after, int((gate > 0).any(axis=0).sum())


@pytest.mark.parametrize("level", LEVELS)
def test_branches_by_turns(level: str) -> None:
    """The select of a step decides which rows of the same step run, for threads that come late too."""
    counts = [1, 1, 2, 1, 9, 1, 1, 1, 3, 1] * 12
    ffn = FFN()
    alone, sparse = ffn.run(level, 1, counts)
    for before, after, count, short in zip(alone, alone[1:], counts, sparse, strict=False):
        wanted, listed = ffn.oracle(before, count)
        np.testing.assert_allclose(after, wanted, rtol=1e-5, atol=1e-5)
        assert short == (count < TILE_MIN and listed <= ffn.limit)
    assert min(sparse.count(0), sparse.count(1)) > 20
    for n_threads in (2, 5):
        again, taken = ffn.run(level, n_threads, counts)
        assert taken == sparse
        for a, b in zip(alone, again, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("level", LEVELS)
def test_ticks_tell_where_time_goes(level: str) -> None:
    """They grow with every step where the processor has a counter that programs may read, and else stay zero."""
    ops, _ = copies(1000, [(0, 0), (0, 0)], [False, True])
    has_counter = platform.machine().lower() in ("x86_64", "amd64")
    with Tape(level, ops, 2) as tape:
        before = tape.ticks
        assert not before.any()
        for _ in range(5):
            tape.walk(n_tok=1)
            after = tape.ticks
            assert (after >= before).all() and (after.sum() > before.sum()) == has_counter
            before = after

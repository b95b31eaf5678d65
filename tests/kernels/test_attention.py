"""Attention over the paged KV cache against the NumPy oracle, block by block and sequence by sequence.

Keys and values are float16 in both, so float32 rounding is left: of a score (2**-24 times its magnitude of a few units,
times the few roundings that sum up) and of a mean of values near 1. Measured: below 2e-6; ATOL is 1e-5.
"""

from __future__ import annotations

from typing import NamedTuple

import naive
import numpy as np
import pytest
from kernel_harness import LEVELS, Array, Buffer, Op, run

from hotcold.runtime.cpu.layout import KV_BLOCK, QUERY_TILE, Attention

ATOL = 1e-5


class Heads(NamedTuple):
    n_head: int
    n_kv: int
    dim_k: int
    dim_v: int


class Case(NamedTuple):
    """A batch: of each sequence, its tokens in the cache (new ones among them) and the new tokens' queries."""

    keys: list[Array]  # float16 (n, n_kv, dim_k)
    values: list[Array]
    queries: list[Array]  # float32 (n_new, n_head, dim_k)


def make_case(lengths: list[tuple[int, int]], heads: Heads, rng: np.random.Generator) -> Case:
    """lengths: (tokens, new tokens) of each sequence."""
    case = Case([], [], [])
    for n, n_new in lengths:
        case.keys.append(rng.standard_normal((n, heads.n_kv, heads.dim_k)).astype(np.float16))
        case.values.append(rng.standard_normal((n, heads.n_kv, heads.dim_v)).astype(np.float16))
        case.queries.append(rng.standard_normal((n_new, heads.n_head, heads.dim_k), np.float32))
    return case


def attend(
    level: str,
    case: Case,
    heads: Heads,
    scale: float,
    window: int = 0,
    n_threads: int = 1,
    seed: int = 0,
    softcap: float = 0.0,
) -> list[Array]:
    """Each sequence's output, float32 (n_new, n_head, dim_v). Blocks lie in random order; unused slots hold NaNs."""
    needs = [-(-len(keys) // KV_BLOCK) for keys in case.keys]
    n_blocks = sum(needs) + 2
    free = list(np.random.default_rng(seed).permutation(n_blocks))
    keys = Buffer.full((n_blocks, heads.n_kv, heads.dim_k, KV_BLOCK), np.float16)
    values = Buffer.full((n_blocks, heads.n_kv, KV_BLOCK, heads.dim_v), np.float16)
    tables: list[Buffer] = []
    tiles: list[tuple[int, int, int]] = []
    positions: list[int] = []
    for index, need in enumerate(needs):
        blocks = np.array([free.pop() for _ in range(need)])
        tables.append(Buffer(blocks.astype(np.int32)))
        at = np.arange(len(case.keys[index]))
        keys.array[blocks[at // KV_BLOCK], :, :, at % KV_BLOCK] = case.keys[index]
        values.array[blocks[at // KV_BLOCK], :, at % KV_BLOCK] = case.values[index]
        n_new = len(case.queries[index])
        tiles += [
            (len(positions) + start, min(QUERY_TILE, n_new - start), index) for start in range(0, n_new, QUERY_TILE)
        ]
        positions += list(at[len(at) - n_new :])
    out = Buffer.full((len(positions), heads.n_head, heads.dim_v))
    fields = {"q": Buffer(np.concatenate(case.queries)), "out": out, "keys": keys, "values": values}
    numbers = {**heads._asdict(), "scale": scale, "window": window, "softcap": softcap}
    op = Op("attention:softcap" if softcap else "attention", Attention, {**fields, **numbers})
    step = {
        "tiles": Buffer(np.array(tiles, np.int32)),
        "n_tiles": len(tiles),
        "tables": Buffer(np.array([table.array.ctypes.data for table in tables], np.int64)),
        "positions": Buffer(np.array(positions, np.int32)),
    }
    run(level, op, n_threads=n_threads, n_tok=len(positions), **step)
    return np.split(out.array, np.cumsum([len(queries) for queries in case.queries])[:-1])


def check(
    level: str,
    lengths: list[tuple[int, int]],
    heads: Heads,
    window: int = 0,
    n_threads: int = 1,
    softcap: float = 0.0,
) -> None:
    case = make_case(lengths, heads, np.random.default_rng(len(lengths)))
    scale = heads.dim_k**-0.5
    for i, got in enumerate(attend(level, case, heads, scale, window, n_threads, 0, softcap)):
        q, k, v = (part[i].astype(np.float64) for part in (case.queries, case.keys, case.values))
        np.testing.assert_allclose(got, naive.attention(q, k, v, scale, window, softcap), rtol=0, atol=ATOL)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("n_head", "n_kv"), [(1, 1), (3, 3), (4, 2), (9, 3), (8, 1)])
@pytest.mark.parametrize("lengths", [[(1, 1)], [(75, 1)], [(130, 130)]])
def test_groups(level: str, n_head: int, n_kv: int, lengths: list[tuple[int, int]]) -> None:
    check(level, lengths, Heads(n_head, n_kv, 64, 64))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("dim_k", "dim_v"), [(8, 8), (16, 16), (80, 80), (100, 100), (24, 64), (64, 24), (1, 1)])
def test_head_dims(level: str, dim_k: int, dim_v: int) -> None:
    for lengths in ([(45, 1)], [(45, 20)]):
        check(level, lengths, Heads(4, 2, dim_k, dim_v))


@pytest.mark.parametrize("level", LEVELS)
def test_every_length_around_a_block(level: str) -> None:
    for n in (1, 31, 32, 33, 63, 64, 65):
        for n_new in {1, 2, 5, 8, 9, n}:
            check(level, [(max(n, n_new), n_new)], Heads(4, 2, 16, 16))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("window", [1, 7, 31, 32, 33, 64, 100, 1000])
def test_windows(level: str, window: int) -> None:
    for lengths in ([(130, 1)], [(130, 130)], [(20, 3), (97, 33)]):
        check(level, lengths, Heads(4, 2, 16, 16), window)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("softcap", [0.1, 1.0, 50.0])
def test_soft_caps(level: str, softcap: float) -> None:
    for lengths in ([(130, 1)], [(70, 70)], [(20, 3), (97, 33)]):
        check(level, lengths, Heads(4, 2, 16, 16), 40, softcap=softcap)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_several_sequences(level: str, n_threads: int) -> None:
    lengths = [(40, 1), (9, 9), (100, 17), (1, 1), (64, 8), (33, 1)]
    check(level, lengths, Heads(6, 2, 32, 32), n_threads=n_threads)


@pytest.mark.parametrize("level", LEVELS)
def test_threads_and_places_change_nothing(level: str) -> None:
    heads = Heads(9, 3, 64, 64)
    case = make_case([(100, 37), (50, 1)], heads, np.random.default_rng(1))
    alone = attend(level, case, heads, 0.125)
    for n_threads, seed in ((2, 0), (3, 7), (1, 8)):
        for a, b in zip(alone, attend(level, case, heads, 0.125, n_threads=n_threads, seed=seed), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("level", LEVELS)
def test_sharp_and_flat_scores(level: str) -> None:
    """Scores far beyond exp's range: all weight on one position, whether it comes first, last or in between."""
    heads = Heads(2, 1, 16, 16)
    case = make_case([(100, 4)], heads, np.random.default_rng(2))
    for best in (0, 40, 96):
        case.keys[0][:] = -1
        case.keys[0][best] = 30
        case.queries[0][:] = 30
        got = attend(level, case, heads, 1.0)[0]
        np.testing.assert_array_equal(got, np.broadcast_to(case.values[0][best].astype(np.float32), got.shape))
    case.queries[0][:] = 0
    wanted = [case.values[0][: 97 + i].astype(np.float64).mean(axis=(0, 1)) for i in range(4)]
    got = attend(level, case, heads, 1.0)[0]
    np.testing.assert_allclose(got, np.broadcast_to(np.array(wanted)[:, None], got.shape), rtol=0, atol=ATOL)

"""Attention over the paged KV cache against the NumPy oracle, block by block and sequence by sequence.

The oracle has keys and values as the cache keeps them, and queries that 8 bits hold where keys are quantised. What is
left is float32 rounding, measured below 2e-6 (ATOL is 1e-5), and with quantised values that of weights to 16 bits,
measured below 7e-5 (ATOL_QUANTISED is 2e-4).
"""

from __future__ import annotations

from typing import NamedTuple

import kv_pages
import naive
import numpy as np
import pytest
from kernel_harness import KV_PAIRS, LEVELS, Array, Buffer, Op, exact_activations, run

from hotcold.runtime.cpu.layout import KV_BLOCK, KV_SPAN, SPLIT_TILES, Attention, part_bytes, query_tile
from hotcold.runtime.kv_types import KV_TYPES

ATOL, ATOL_QUANTISED = 1e-5, 2e-4
SPAN = KV_BLOCK * KV_SPAN
F16 = ("f16", "f16")
PAIRS = [pair for pair in KV_PAIRS if pair != F16]


class Heads(NamedTuple):
    n_head: int
    n_kv: int
    dim_k: int
    dim_v: int


class Case(NamedTuple):
    """A batch: of each sequence, its tokens in the cache (new ones among them) and the new tokens' queries."""

    keys: list[Array]  # float32 (n, n_kv, dim_k)
    values: list[Array]
    queries: list[Array]  # float32 (n_new, n_head, dim_k)


def make_case(lengths: list[tuple[int, int]], heads: Heads, rng: np.random.Generator) -> Case:
    """lengths: (tokens, new tokens) of each sequence."""
    case = Case([], [], [])
    for n, n_new in lengths:
        case.keys.append(rng.standard_normal((n, heads.n_kv, heads.dim_k), np.float32))
        case.values.append(rng.standard_normal((n, heads.n_kv, heads.dim_v), np.float32))
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
    types: tuple[str, str] = F16,
    n_parts: int = 1 << 12,
) -> list[Array]:
    """Each sequence's output, float32 (n_new, n_head, dim_v). Blocks lie in random order; unused slots hold NaNs."""
    needs = [-(-len(keys) // KV_BLOCK) for keys in case.keys]
    n_blocks = sum(needs) + 2
    free = list(np.random.default_rng(seed).permutation(n_blocks))
    sizes = [KV_TYPES[kind].page_bytes(dim) for kind, dim in zip(types, heads[2:], strict=True)]
    keys, values = (Buffer.full((n_blocks, heads.n_kv, size), np.uint8, 0xFF) for size in sizes)
    tables: list[Buffer] = []
    tiles: list[tuple[int, int, int]] = []
    positions: list[int] = []
    tile = query_tile(heads.n_head // heads.n_kv)
    for index, need in enumerate(needs):
        blocks = np.array([free.pop() for _ in range(need)])
        tables.append(Buffer(blocks.astype(np.int32)))
        at = np.arange(len(case.keys[index]))
        for cache, given, kind, is_keys in (
            (keys, case.keys[index], types[0], True),
            (values, case.values[index], types[1], False),
        ):
            for b, block in enumerate(blocks):
                put(cache.array[block], given[b * KV_BLOCK : (b + 1) * KV_BLOCK], kind, is_keys)
        n_new = len(case.queries[index])
        tiles += [(len(positions) + start, min(tile, n_new - start), index) for start in range(0, n_new, tile)]
        positions += list(at[len(at) - n_new :])
    out = Buffer.full((len(positions), heads.n_head, heads.dim_v))
    fields = {"q": Buffer(np.concatenate(case.queries)), "out": out, "keys": keys, "values": values}
    regions = {"regions": n_threads, "claims": Buffer(np.zeros((n_threads, 8), np.int64))}
    counts = Buffer(np.zeros((SPLIT_TILES, heads.n_kv), np.int64))
    parts = Buffer.full((n_parts, part_bytes(heads.dim_v)), np.uint8, 0xFF)
    numbers = {**heads._asdict(), "scale": scale, "window": window, "softcap": softcap}
    numbers |= {"key_bytes": sizes[0], "value_bytes": sizes[1], "n_parts": n_parts}
    op = Op(
        f"attention:{'-'.join(types)}", Attention, {**fields, **numbers, "parts": parts, "counts": counts, **regions}
    )
    step = {
        "tiles": Buffer(np.array(tiles, np.int32)),
        "n_tiles": len(tiles),
        "tables": Buffer(np.array([table.array.ctypes.data for table in tables], np.int64)),
        "positions": Buffer(np.array(positions, np.int32)),
    }
    run(level, op, n_threads=n_threads, n_tok=len(positions), **step)
    assert not counts.array.any()
    return np.split(out.array, np.cumsum([len(queries) for queries in case.queries])[:-1])


def put(block: Array, x: Array, kind: str, keys: bool) -> None:
    """Lay out x (up to 32 positions, n_kv, dim) in a block, uint8 (n_kv, page); the other positions stay as NaNs."""
    n, n_kv, dim = x.shape
    whole = np.zeros((KV_BLOCK, n_kv, dim), np.float32)
    whole[:n] = x
    for h in range(n_kv):
        block[h] = kv_pages.page(whole[:, h], kind, keys)
        mark = np.full_like(block[h], 0xFF)
        KV_TYPES[kind].clear(mark, dim, n, keys)  # zeros are what is not there
        block[h][mark == 0] = 0xFF


def check(
    level: str,
    lengths: list[tuple[int, int]],
    heads: Heads,
    window: int = 0,
    n_threads: int = 1,
    softcap: float = 0.0,
    types: tuple[str, str] = F16,
) -> None:
    case = make_case(lengths, heads, np.random.default_rng(len(lengths)))
    if types[0] != "f16":
        for i, q in enumerate(case.queries):
            case.queries[i] = exact_activations(len(q) * heads.n_head, heads.dim_k, np.random.default_rng(i)).reshape(
                q.shape
            )
    scale = heads.dim_k**-0.5
    for i, got in enumerate(attend(level, case, heads, scale, window, n_threads, 0, softcap, types)):
        k, v = kv_pages.kept(case.keys[i], types[0], True), kv_pages.kept(case.values[i], types[1], False)
        q = case.queries[i].astype(np.float64)
        atol = ATOL if types[1] == "f16" and types[0] == "f16" else ATOL_QUANTISED
        np.testing.assert_allclose(got, naive.attention(q, k, v, scale, window, softcap), rtol=0, atol=atol)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("n_head", "n_kv"), [(1, 1), (3, 3), (4, 2), (9, 3), (8, 1)])
@pytest.mark.parametrize("lengths", [[(1, 1)], [(75, 1)], [(130, 130)]])
def test_groups(level: str, n_head: int, n_kv: int, lengths: list[tuple[int, int]]) -> None:
    check(level, lengths, Heads(n_head, n_kv, 64, 64))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("dim_k", "dim_v"),
    [(8, 8), (16, 16), (80, 80), (100, 100), (96, 96), (128, 128), (256, 256), (24, 64), (64, 24), (1, 1)],
)
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
@pytest.mark.parametrize("types", [F16, ("q8_0", "q4_0")])
@pytest.mark.parametrize(
    ("lengths", "heads", "window", "n_threads"),
    [
        ([(1025, 1)], Heads(6, 2, 32, 32), 0, 3),
        ([(2100, 5), (1500, 1), (40, 1)], Heads(8, 1, 32, 32), 0, 64),
        ([(2100, 70)], Heads(4, 2, 32, 64), 1500, 2),
        ([(1100, 1)] * 66, Heads(4, 2, 32, 32), 0, 3),
    ],
)
def test_parts(
    level: str, types: tuple[str, str], lengths: list[tuple[int, int]], heads: Heads, window: int, n_threads: int
) -> None:
    """Contexts of several parts, which several threads compute and the last one merges."""
    check(level, lengths, heads, window, n_threads, 20.0 if window else 0.0, types)


@pytest.mark.parametrize("level", LEVELS)
def test_threads_and_places_change_nothing(level: str) -> None:
    heads = Heads(9, 3, 64, 64)
    for types in (F16, ("q8_0", "q4_0")):
        case = make_case([(300, 37), (2100, 9), (1500, 1)], heads, np.random.default_rng(1))
        alone = attend(level, case, heads, 0.125, types=types)
        for n_threads, seed, n_parts in ((2, 0, 1 << 12), (3, 7, 1 << 12), (1, 8, 0), (2, 9, 0)):
            other = attend(level, case, heads, 0.125, 0, n_threads, seed, types=types, n_parts=n_parts)
            for a, b in zip(alone, other, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("types", [F16, *PAIRS])
@pytest.mark.parametrize("window", [0, 50])
def test_a_token_is_the_same_alone_and_among_others(level: str, types: tuple[str, str], window: int) -> None:
    """Every token of a prompt as if it had been decoded, and beside another sequence."""
    for n_head, n_kv in ((4, 4), (9, 3), (8, 1)):
        heads = Heads(n_head, n_kv, 32, 64)
        case = make_case([(550, 70)], heads, np.random.default_rng(n_head))
        whole = attend(level, case, heads, 0.2, window, 2, types=types)[0]
        for t in (0, 1, 31, 47, 69):
            n, new = 481 + t, case.queries[0][t : t + 1]
            keys, values = case.keys[0][:n], case.values[0][:n]
            alone = attend(level, Case([keys], [values], [new]), heads, 0.2, window, 2, seed=t, types=types)[0]
            np.testing.assert_array_equal(alone[0], whole[t])
            few = case.queries[0][max(0, t - 1) : t + 1]
            both = Case([case.keys[0], keys], [case.values[0], values], [case.queries[0][-3:], few])
            beside = attend(level, both, heads, 0.2, window, types=types)
            np.testing.assert_array_equal(beside[1][-1], whole[t])
            np.testing.assert_array_equal(beside[0], whole[-3:])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("types", PAIRS)
def test_types(level: str, types: tuple[str, str]) -> None:
    for n_head, n_kv, dim in ((1, 1, 64), (4, 2, 96), (9, 3, 64), (8, 2, 128), (5, 1, 32), (16, 2, 256)):
        for lengths in ([(1, 1)], [(75, 1)], [(300, 20), (33, 1)]):
            check(level, lengths, Heads(n_head, n_kv, dim, dim), types=types)
    check(level, [(130, 130)], Heads(4, 2, 64, 32), types=types)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("types", PAIRS)
def test_types_with_windows_and_caps(level: str, types: tuple[str, str]) -> None:
    for window in (1, 31, 40, 300):
        check(level, [(20, 3), (400, 33), (290, 1)], Heads(4, 2, 32, 32), window, softcap=20.0, types=types)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [SPAN - 1, SPAN, SPAN + 1, 3 * SPAN + 17])
def test_spans(level: str, n: int) -> None:
    for types in (F16, ("q8_0", "q8_0")):
        for n_new, n_threads in ((1, 3), (5, 2), (60, 2)):
            check(level, [(n, n_new), (40, 1)], Heads(6, 2, 32, 32), n_threads=n_threads, types=types)
            check(level, [(n, n_new)], Heads(3, 1, 32, 32), SPAN + 5, n_threads, types=types)


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_not_seen_rounds_nothing(level: str) -> None:
    """Large values at positions that a query does not see change none of its bits, though the block is the same."""
    heads, types = Heads(2, 1, 32, 32), ("q8_0", "q8_0")
    case = make_case([(64, 30)], heads, np.random.default_rng(5))
    small = attend(level, case, heads, 0.2, types=types)[0]
    case.values[0][40:] *= 1000
    large = attend(level, case, heads, 0.2, types=types)[0]
    np.testing.assert_array_equal(small[:6], large[:6])
    assert (small[6:] != large[6:]).any(axis=(1, 2)).all()


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
        best_value = case.values[0][best].astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(got, np.broadcast_to(best_value, got.shape))
    case.queries[0][:] = 0
    wanted = [case.values[0][: 97 + i].astype(np.float16).astype(np.float64).mean(axis=(0, 1)) for i in range(4)]
    got = attend(level, case, heads, 1.0)[0]
    np.testing.assert_allclose(got, np.broadcast_to(np.array(wanted)[:, None], got.shape), rtol=0, atol=ATOL)

"""Attention on the GPU over the paged KV cache against the NumPy oracle, split by split.

Keys and values are float16 in both, so float32 rounding is left: of a score, of exp (2 ulp on a device) and of a mean
of values near 1. Measured in the simulator: below 2e-6; ATOL is 1e-5.
"""

from __future__ import annotations

import math
from dataclasses import astuple, replace
from typing import NamedTuple

import naive
import numpy as np
import pytest
from cuda_launch import LANES, filled, launch

from hotcold.formats.errors import UnsupportedError
from hotcold.runtime.cpu.layout import KV_BLOCK
from hotcold.runtime.cuda.attention import VARIANTS
from hotcold.runtime.cuda.attention_launch import AttentionLaunch, Heads, attention_launch, part_floats

Array = np.ndarray
ATOL = 1e-5


class Case(NamedTuple):
    """A batch: of each sequence, its tokens in the cache (new ones among them) and the new tokens' queries."""

    keys: list[Array]  # float16 (n, n_kv, dim_k)
    values: list[Array]
    queries: list[Array]  # float32 (n_new, n_head, dim_k)


def make_case(lengths: list[tuple[int, int]], heads: Heads, seed: int = 0) -> Case:
    """lengths: (tokens, new tokens) of each sequence."""
    rng = np.random.default_rng(seed)
    case = Case([], [], [])
    for n, n_new in lengths:
        case.keys.append(rng.standard_normal((n, heads.n_kv, heads.dim_k)).astype(np.float16))
        case.values.append(rng.standard_normal((n, heads.n_kv, heads.dim_v)).astype(np.float16))
        case.queries.append(rng.standard_normal((n_new, heads.n_head, heads.dim_k), np.float32))
    return case


def plan(heads: Heads, n_tok: int, splits: int, queries: int = 0, n_seq: int = 1) -> AttentionLaunch:
    """A launch of so many splits; queries: of the kernel, 0 for the one that the rule chooses."""
    how = attention_launch(heads, n_tok, 1, 1, n_seq)
    if queries:
        size, group = how.name.split(":")[1].split("x")[0], heads.n_head // heads.n_kv
        tiles = heads.n_kv * -(-group // queries), -(-n_tok // max(1, queries // group))
        how = replace(how, name=f"attention:{size}x{queries}" + (":softcap" if heads.capped else ""), grid=(*tiles, 1))
    return replace(how, grid=(*how.grid[:2], splits), splits=splits)


def attend(
    case: Case,
    heads: Heads,
    splits: int = 1,
    window: int = 0,
    softcap: float = 0.0,
    lanes: int = 1,
    queries: int = 0,
    seed: int = 0,
) -> list[Array]:
    """Each sequence's output, float32 (n_new, n_head, dim_v). Blocks lie in random order; unused slots hold NaNs."""
    needs = [-(-len(keys) // KV_BLOCK) for keys in case.keys]
    n_blocks = sum(needs) + 2
    free = list(np.random.default_rng(seed).permutation(n_blocks))
    keys = filled((n_blocks, heads.n_kv, heads.dim_k, KV_BLOCK), np.float16)
    values = filled((n_blocks, heads.n_kv, KV_BLOCK, heads.dim_v), np.float16)
    tables = np.full((len(needs), max(needs) + 1), 1 << 30, np.int32)
    positions: list[int] = []
    sequences: list[int] = []
    for index, need in enumerate(needs):
        blocks = np.array([free.pop() for _ in range(need)])
        tables[index, :need] = blocks
        at = np.arange(len(case.keys[index]))
        keys[blocks[at // KV_BLOCK], :, :, at % KV_BLOCK] = case.keys[index]
        values[blocks[at // KV_BLOCK], :, at % KV_BLOCK] = case.values[index]
        n_new = len(case.queries[index])
        positions += list(at[len(at) - n_new :])
        sequences += [index] * n_new
    n_tok, spare = len(positions), 3  # rows behind the last token, which nobody may touch
    how = plan(heads, n_tok, splits, queries, len(needs))
    q = np.concatenate([*case.queries, filled((spare, heads.n_head, heads.dim_k))]).reshape(n_tok + spare, -1)
    out = filled((n_tok + spare, heads.n_head * heads.dim_v))
    parts = filled((n_tok, splits, heads.n_head, heads.dim_v + 2) if splits > 1 else (1, 1, 1, 1))
    scale = np.float32(heads.dim_k**-0.5)
    per_token = (np.array(numbers + [1 << 30] * spare, np.int32) for numbers in (sequences, positions))
    cache = keys.reshape(-1), values.reshape(-1)
    numbers = *astuple(heads)[:4], scale, np.float32(softcap), window, n_tok
    given = (q, *cache, tables, *per_token, out, parts, *numbers)
    *_, out, parts = launch(how.name, lanes, how.grid, *given)
    if splits > 1:
        assert np.isnan(out).all() and np.isfinite(parts).all()
        _, out = launch("attention_merge", lanes, how.merge_grid, parts, out, n_tok)
    assert np.isnan(out[n_tok:]).all()
    result = out[:n_tok].reshape(n_tok, heads.n_head, heads.dim_v)
    return np.split(result, np.cumsum([len(new) for new in case.queries])[:-1])


def check(
    lengths: list[tuple[int, int]], heads: Heads, splits: int = 1, window: int = 0, softcap: float = 0.0, **options: int
) -> None:
    case = make_case(lengths, heads, len(lengths))
    for i, got in enumerate(attend(case, heads, splits, window, softcap, **options)):
        q, k, v = (part[i].astype(np.float64) for part in (case.queries, case.keys, case.values))
        np.testing.assert_allclose(got, naive.attention(q, k, v, None, window, softcap), rtol=0, atol=ATOL)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize(("n_head", "n_kv"), [(1, 1), (6, 2), (7, 1), (12, 1)])
def test_groups(lanes: int, n_head: int, n_kv: int) -> None:
    heads = Heads(n_head, n_kv, 4, 4)
    check([(70, 1)], heads, 3, lanes=lanes)
    check([(34, 3)], heads, lanes=lanes)


@pytest.mark.parametrize("queries", [1, 4, 8])
def test_every_tile_takes_every_group(queries: int) -> None:
    """Tiles that hold several tokens, one, and a part of one token's heads."""
    for n_head, n_kv in ((1, 1), (6, 2), (10, 1)):
        check([(3, 3), (34, 1)], Heads(n_head, n_kv, 2, 2), 2, queries=queries)


@pytest.mark.parametrize(
    ("dim_k", "dim_v"),
    [(1, 1), (8, 8), (24, 64), (64, 24), (7, 13), (64, 64), (80, 80), (96, 96), (100, 100), (128, 128), (256, 256)],
)
def test_head_dims(dim_k: int, dim_v: int) -> None:
    heads = Heads(2, 1, dim_k, dim_v)
    check([(35, 1)], heads, 2, lanes=LANES[-1])
    check([(4, 3)], heads)


def test_every_length_around_a_block() -> None:
    for n in (1, 2, 31, 32, 33, 64, 65):
        check([(n, 1)], Heads(1, 1, 2, 2), 2)
        check([(n, min(n, 3))], Heads(1, 1, 2, 2))


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 40])
def test_splits(splits: int) -> None:
    """More splits than blocks too: those that are left empty change nothing."""
    check([(130, 2), (20, 1)], Heads(1, 1, 5, 6), splits)


@pytest.mark.parametrize("window", [1, 7, 32, 33, 64, 1000])
def test_windows(window: int) -> None:
    check([(100, 1)], Heads(1, 1, 2, 2), 3, window)
    check([(40, 12), (70, 2)], Heads(1, 1, 2, 2), 1, window)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("softcap", [0.3, 2.0, 50.0])
def test_capped_scores(softcap: float, lanes: int) -> None:
    heads = Heads(4, 2, 6, 5, capped=True)
    check([(70, 1)], heads, 3, 40, softcap, lanes=lanes)
    check([(20, 3), (3, 3)], heads, 1, 0, softcap, lanes=lanes)


def test_scores_far_beyond_the_cap() -> None:
    """All as large as the cap, or its opposite: as if there were two kinds of keys."""
    heads = Heads(1, 1, 4, 4, capped=True)
    case = make_case([(40, 1)], heads)
    case.queries[0][:], case.keys[0][:], case.keys[0][::2] = 300, -300, 300
    weights = np.where(np.arange(40) % 2, math.exp(-1.0), math.exp(1.0))
    wanted = weights / weights.sum() @ case.values[0][:, 0].astype(np.float64)
    np.testing.assert_allclose(attend(case, heads, softcap=1.0)[0][0, 0], wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize("lanes", LANES)
def test_several_sequences_in_a_tile(lanes: int) -> None:
    lengths = [(40, 1), (3, 3), (65, 2), (1, 1), (33, 1)]
    for queries in (0, 8):
        check(lengths, Heads(1, 1, 2, 3), 2, lanes=lanes, queries=queries)


def test_places_change_nothing() -> None:
    heads = Heads(3, 1, 6, 5)
    case = make_case([(70, 4), (50, 1)], heads)
    for splits in (1, 3):
        alone = attend(case, heads, splits, lanes=LANES[0], seed=1)
        for a, b in zip(alone, attend(case, heads, splits, lanes=LANES[0], seed=2), strict=True):
            np.testing.assert_array_equal(a, b)


def test_sharp_and_flat_scores() -> None:
    """Scores far beyond exp's range: all weight on one position, whether it comes first, last or in between."""
    heads = Heads(2, 1, 4, 4)
    case = make_case([(100, 2)], heads)
    for best in (0, 40, 98):
        case.keys[0][:] = -30
        case.keys[0][best] = 60
        case.queries[0][:] = 30
        for splits in (1, 4):
            got = attend(case, heads, splits)[0]
            np.testing.assert_array_equal(got, np.broadcast_to(case.values[0][best].astype(np.float32), got.shape))
    case.queries[0][:] = 0
    wanted = np.array([case.values[0][: 99 + i].astype(np.float64).mean(axis=(0, 1)) for i in range(2)])
    for splits in (1, 4):
        got = attend(case, heads, splits)[0]
        np.testing.assert_allclose(got, np.broadcast_to(wanted[:, None], got.shape), rtol=0, atol=ATOL)


def test_empty_splits_are_neutral() -> None:
    """A split without blocks leaves no sum, a maximum below every score, and zeros."""
    heads = Heads(1, 1, 2, 3)
    how = plan(heads, 1, 4)
    q, cache = np.ones((1, 2), np.float32), (np.ones(64, np.float16), np.ones(96, np.float16))
    zero = np.zeros(1, np.int32)
    parts, out = filled((1, 4, 1, 5)), filled((1, 3))
    given = (q, *cache, zero[:, None], zero, zero, out, parts, *astuple(heads)[:4], np.float32(1), np.float32(0), 0, 1)
    *_, parts = launch(how.name, LANES[0], how.grid, *given)
    wanted = [[0, 0, 0, -1e30, 0]] * 3 + [[1, 1, 1, 2, 1]]
    np.testing.assert_allclose(parts[0, :, 0], np.array(wanted, np.float32), rtol=1e-6)


HEADS = [Heads(32, 8, 128, 128), Heads(9, 3, 64, 64), Heads(32, 32, 80, 80), Heads(71, 1, 64, 64)]
HEADS.append(Heads(4, 1, 192, 99, capped=True))


@pytest.mark.parametrize("heads", HEADS)
def test_launches_cover_every_query(heads: Heads) -> None:
    group = heads.n_head // heads.n_kv
    room = part_floats(heads, 64, 4096, 132)
    for n_tok in (1, 2, 7, 8, 63, 64):
        for n_seq in (1, n_tok):
            how = attention_launch(heads, n_tok, 4096, 132, n_seq)
            variant = how.name.partition(":")[2]
            assert variant in VARIANTS["attention"] and variant.endswith(":softcap") == heads.capped
            size, queries = map(int, variant.partition(":")[0].split("x"))
            assert size >= max(heads.dim_k, heads.dim_v)
            x, y, z = how.grid
            assert x * queries >= heads.n_kv * min(group, x // heads.n_kv * queries) and x % heads.n_kv == 0
            assert x // heads.n_kv * queries >= group and y * max(1, queries // group) >= n_tok
            assert z == how.splits and how.floats <= room
            assert how.merge_grid == (heads.n_head, n_tok)


def test_one_token_of_a_long_context_fills_a_large_gpu() -> None:
    for heads in HEADS:
        how = attention_launch(heads, 1, 32768, 132)
        assert np.prod(how.grid) >= 132 * 4 or how.splits == 256
        assert attention_launch(heads, 1, 40, 132).splits == 1
    assert attention_launch(HEADS[0], 512, 32768, 132).splits == 1
    assert part_floats(HEADS[0], 512, 64, 132) == 1


def test_heads_that_no_kernel_takes() -> None:
    with pytest.raises(UnsupportedError, match="got heads of size 320, wanted at most 256"):
        attention_launch(Heads(8, 8, 320, 64), 1, 100, 1)

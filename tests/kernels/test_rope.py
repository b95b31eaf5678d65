"""Rotary embedding of queries and keys, and what it leaves in the KV cache."""

from __future__ import annotations

from typing import NamedTuple

import kv_pages
import naive
import numpy as np
import pytest
from kernel_harness import LEVELS, Array, Buffer, Op, run

from hotcold.runtime.cpu.layout import KV_BLOCK, Rope
from hotcold.runtime.kv_types import KV_TYPES

N_CTX = 200
N_BLOCKS = 5
UNTOUCHED = np.float16(np.nan)


class Roped(NamedTuple):
    """What the kernel left: q, k, v float32 (n_tok, heads, dim), and the cache float16."""

    q: Array
    k: Array
    v: Array
    keys: Array  # (block, n_kv, dim_k, KV_BLOCK)
    values: Array  # (block, n_kv, KV_BLOCK, dim_v)


def rope(
    level: str,
    style: str,
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    slots: Array,
    params: naive.Rope,
    n_threads: int = 1,
) -> Roped:
    angles, factor = params.angles(np.arange(N_CTX))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * factor
    keys = Buffer.full((N_BLOCKS, k.shape[1], k.shape[2], KV_BLOCK), np.float16)
    values = Buffer.full((N_BLOCKS, v.shape[1], KV_BLOCK, v.shape[2]), np.float16)
    fields = {
        **{"q": Buffer(q), "k": Buffer(k), "v": Buffer(v), "n_head": q.shape[1], "n_kv": k.shape[1]},
        **{"dim_k": q.shape[2], "dim_v": v.shape[2], "rope_dim": params.n_dims},
        **{"table": Buffer(table.astype(np.float32)), "keys": keys, "values": values},
        **{"key_bytes": 2 * KV_BLOCK * k.shape[2], "value_bytes": 2 * KV_BLOCK * v.shape[2]},
    }
    step = {"positions": Buffer(positions.astype(np.int32)), "slots": Buffer(slots.astype(np.int32))}
    run(level, Op(f"rope:{style}", Rope, fields), n_threads=n_threads, n_tok=len(q), **step)
    return Roped(fields["q"].array, fields["k"].array, fields["v"].array, keys.array, values.array)


def random_heads(n_tok: int, n_head: int, n_kv: int, dim: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    shapes = ((n_tok, n_head, dim), (n_tok, n_kv, dim), (n_tok, n_kv, dim))
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return q, k, v


def places(n_tok: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Positions, and as many different slots in no order."""
    return rng.integers(0, N_CTX, n_tok), rng.permutation(N_BLOCKS * KV_BLOCK)[:n_tok]


@pytest.mark.parametrize("style", ["norm", "neox"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("n_head", "n_kv"), [(1, 1), (4, 2), (9, 3), (8, 1)])
def test_rotation(level: str, style: str, n_head: int, n_kv: int) -> None:
    rng = np.random.default_rng(n_head)
    for n_tok, dim, rope_dim in ((1, 8, 8), (5, 64, 64), (40, 80, 32), (9, 100, 100), (3, 16, 2)):
        q, k, v = random_heads(n_tok, n_head, n_kv, dim, rng)
        positions, slots = places(n_tok, rng)
        params = naive.Rope(rope_dim, style=style, attn_factor=1.25)
        got = rope(level, style, q, k, v, positions, slots, params)
        np.testing.assert_allclose(got.q, naive.rope(q.astype(np.float64), positions, params), atol=2e-6)
        np.testing.assert_allclose(got.k, naive.rope(k.astype(np.float64), positions, params), atol=2e-6)
        np.testing.assert_array_equal(got.v, v)


@pytest.mark.parametrize("style", ["norm", "neox"])
@pytest.mark.parametrize("level", LEVELS)
def test_cache(level: str, style: str) -> None:
    """Each token's keys and values are in its slot, rounded to float16; all other slots are as before."""
    rng = np.random.default_rng(1)
    q, k, v = random_heads(45, 6, 3, 20, rng)
    positions, slots = places(45, rng)
    for n_threads in (1, 3):
        got = rope(level, style, q, k, v, positions, slots, naive.Rope(12, style=style), n_threads)
        keys = got.keys.transpose(0, 3, 1, 2).reshape(-1, 3, 20)
        values = got.values.transpose(0, 2, 1, 3).reshape(-1, 3, 20)
        np.testing.assert_array_equal(keys[slots], got.k.astype(np.float16))
        np.testing.assert_array_equal(values[slots], v.astype(np.float16))
        others = np.setdiff1d(np.arange(N_BLOCKS * KV_BLOCK), slots)
        assert np.isnan(keys[others]).all() and np.isnan(values[others]).all()


@pytest.mark.parametrize("level", LEVELS)
def test_rounding_to_float16(level: str) -> None:
    """To nearest, ties to even, down to subnormals and zeros: every half, its neighbours and the ties between."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + halves[1:]) / 2
    around = [ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9)), halves]
    v = np.concatenate([*around, [1e-9, 1e-30, 1e-45, 0.0]]).astype(np.float32)
    v = np.resize(np.concatenate([v, -v]), (128, 2, 1000))
    q, k, _ = random_heads(128, 2, 2, 8, np.random.default_rng(2))
    slots = np.arange(128)
    got = rope(level, "norm", q, k, v, slots, slots, naive.Rope(8))
    stored = got.values.transpose(0, 2, 1, 3).reshape(-1, 2, 1000)[:128]
    np.testing.assert_array_equal(stored.view(np.uint16), v.astype(np.float16).view(np.uint16))


@pytest.mark.parametrize("level", LEVELS)
def test_threads_change_nothing(level: str) -> None:
    rng = np.random.default_rng(3)
    q, k, v = random_heads(33, 4, 2, 64, rng)
    positions, slots = places(33, rng)
    alone = rope(level, "neox", q, k, v, positions, slots, naive.Rope(64, style="neox"))
    for n_threads in (2, 3):
        several = rope(level, "neox", q, k, v, positions, slots, naive.Rope(64, style="neox"), n_threads)
        for a, b in zip(alone, several, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantised_pages(level: str, kind: str) -> None:
    """Whole blocks of keys and values as the oracle lays them out, and nothing in other blocks or positions."""
    rng = np.random.default_rng(4)
    for n_tok, dim_k, dim_v in ((64, 64, 32), (33, 32, 96), (7, 128, 128)):
        q, k, v = (
            rng.standard_normal((n_tok, heads, dim), np.float32) for heads, dim in ((4, dim_k), (2, dim_k), (2, dim_v))
        )
        k[0, 0, :32], v[0, 1, :32] = 0, 0  # no scale at all
        sizes = [KV_TYPES[kind].page_bytes(dim) for dim in (dim_k, dim_v)]
        keys, values = (Buffer.full((4, 2, size), np.uint8, 0xFF) for size in sizes)
        slots = KV_BLOCK + np.arange(n_tok)
        fields = {"q": Buffer(q), "k": Buffer(k), "v": Buffer(v), "keys": keys, "values": values}
        numbers = {"n_head": 4, "n_kv": 2, "dim_k": dim_k, "dim_v": dim_v, "rope_dim": 0}
        numbers |= {"key_bytes": sizes[0], "value_bytes": sizes[1], "table": 0}
        number = KV_TYPES[kind].number
        op = Op("rope:norm", Rope, {**fields, **numbers, "key_type": number, "value_type": number})
        step = {"positions": Buffer(slots.astype(np.int32)), "slots": Buffer(slots.astype(np.int32))}
        run(level, op, n_threads=2, n_tok=n_tok, **step)
        assert (keys.array[0] == 0xFF).all() and (keys.array[3] == 0xFF).all()
        for cache, given, is_keys in ((keys.array, k, True), (values.array, v, False)):
            for block in range(-(-n_tok // KV_BLOCK)):
                part = np.zeros((KV_BLOCK, *given.shape[1:]), np.float32)
                here = given[block * KV_BLOCK : (block + 1) * KV_BLOCK]
                part[: len(here)] = here
                for h in range(2):
                    wanted = kv_pages.page(part[:, h], kind, is_keys)
                    got = cache[1 + block, h].copy()
                    KV_TYPES[kind].clear(wanted, given.shape[2], len(here), is_keys)
                    KV_TYPES[kind].clear(got, given.shape[2], len(here), is_keys)
                    apart = np.abs(wanted.astype(int) - got.astype(int))
                    assert (apart != 0).mean() < 0.01  # ties and the last bit of a scale

"""Rotary embedding on the GPU, and what it leaves in the KV cache."""

from __future__ import annotations

from typing import NamedTuple

import naive
import numpy as np
import pytest
from cuda_launch import LANES, filled, launch

from hotcold.runtime.cpu.layout import KV_BLOCK

Array = np.ndarray
N_CTX, N_BLOCKS, SPARE = 100, 3, 2


class Roped(NamedTuple):
    """What the kernel left: q, k, v (n_tok, heads, dim), and each slot's keys and values (slot, n_kv, dim)."""

    q: Array
    k: Array
    v: Array
    keys: Array
    values: Array


def rope(lanes: int, q: Array, k: Array, v: Array, positions: Array, slots: Array, params: naive.Rope) -> Roped:
    angles, factor = params.angles(np.arange(N_CTX))
    table = (np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * factor).astype(np.float32)
    (n_tok, n_head, dim_k), (_, n_kv, dim_v) = q.shape, v.shape
    cache = (filled((N_BLOCKS * n_kv * dim * KV_BLOCK,), np.float16) for dim in (dim_k, dim_v))
    rows = (np.concatenate([a.reshape(n_tok, -1), filled((SPARE, a[0].size))]) for a in (q, k, v))
    where = (np.concatenate([a, [1 << 30] * SPARE]).astype(np.int32) for a in (positions, slots))
    sizes = n_head, n_kv, dim_k, dim_v, params.n_dims, n_tok
    grid = (n_tok + SPARE, n_kv)  # tokens behind the last do nothing
    done = launch(f"rope:{params.style}", lanes, grid, *rows, *where, table, *cache, *sizes)
    assert all(np.isnan(a[n_tok:]).all() for a in done[:3])
    q, k, v = (a[:n_tok].reshape(b.shape) for a, b in zip(done[:3], (q, k, v), strict=True))
    keys = done[-2].reshape(N_BLOCKS, n_kv, dim_k, KV_BLOCK).transpose(0, 3, 1, 2).reshape(-1, n_kv, dim_k)
    values = done[-1].reshape(N_BLOCKS, n_kv, KV_BLOCK, dim_v).transpose(0, 2, 1, 3).reshape(-1, n_kv, dim_v)
    return Roped(q, k, v, keys, values)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("style", ["norm", "neox"])
@pytest.mark.parametrize(("n_head", "n_kv"), [(1, 1), (4, 2), (3, 1)])
def test_rotation_and_cache(lanes: int, style: str, n_head: int, n_kv: int) -> None:
    """Queries are rotated, keys and values are in their slots, rounded once, and nothing else has changed."""
    rng = np.random.default_rng(n_head)
    for n_tok, dim_k, dim_v, rope_dim in ((1, 8, 8, 8), (3, 10, 7, 6), (2, 64, 5, 64), (5, 3, 2, 2)):
        params = naive.Rope(rope_dim, style=style, attn_factor=1.25)
        q, k = (rng.standard_normal((n_tok, heads, dim_k), np.float32) for heads in (n_head, n_kv))
        v = rng.standard_normal((n_tok, n_kv, dim_v), np.float32)
        positions, slots = rng.integers(0, N_CTX, n_tok), rng.permutation(N_BLOCKS * KV_BLOCK)[:n_tok]
        got = rope(lanes, q, k, v, positions, slots, params)
        np.testing.assert_allclose(got.q, naive.rope(q.astype(np.float64), positions, params), atol=2e-6)
        np.testing.assert_array_equal(got.k, k)
        np.testing.assert_array_equal(got.v, v)
        wanted = naive.rope(k.astype(np.float64), positions, params)
        np.testing.assert_allclose(got.keys[slots], wanted, rtol=2**-11, atol=3e-6)
        np.testing.assert_array_equal(got.values[slots], v.astype(np.float16))
        others = np.setdiff1d(np.arange(N_BLOCKS * KV_BLOCK), slots)
        assert np.isnan(got.keys[others]).all() and np.isnan(got.values[others]).all()


def test_rounding_to_float16() -> None:
    """To nearest, ties to even, down to subnormals and zeros."""
    rng = np.random.default_rng(0)
    halves = rng.integers(0, 0x7BFF, 60).astype(np.uint16)
    low, high = (bits.view(np.float16).astype(np.float32) for bits in (halves, halves + np.uint16(1)))
    ties = (low + high) / 2
    v = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9)), [1e-9, 0, 1e-30]])
    v = np.stack([v, -v]).astype(np.float32)[:, None]
    slots, zeros = np.array([40, 7]), np.zeros((2, 1, 2), np.float32)
    got = rope(LANES[-1], zeros, zeros, v, slots, slots, naive.Rope(2))
    np.testing.assert_array_equal(got.values[slots].view(np.uint16), v.astype(np.float16).view(np.uint16))

"""Products of listed rows, of every weight type: near float64's, and the same bits whatever rows are beside them."""

from __future__ import annotations

from typing import Any

import naive
import numpy as np
import pytest
from kernel_harness import (
    FLOATS,
    LEVELS,
    QUANTS,
    TYPES,
    Array,
    Buffer,
    Op,
    assert_product,
    choice,
    inputs,
    pack_op,
    packed,
    run,
    some,
    weights,
    widths,
)

from hotcold.runtime.cpu.layout import ARRAYS, Rows

N = 70  # rows there are


def listed_rows(
    level: str, kind: str, raw: Array, x: Array, rows: Array, n_threads: int = 1, name: str = "", **options: Any
) -> Array:
    """float32 (n_tok, len(rows)). name: an activation. Options: parts, ahead; gates and threshold of an activation."""
    n_tok, k = x.shape
    n, count = len(raw), len(rows)
    fields = packed(k, n_tok, kind in QUANTS, kind in FLOATS)
    out = Buffer.full((n_tok, n))
    own: dict[str, Any] = {"parts": 8, "ahead": 3, **options}
    own |= {"w": Buffer(raw), "out": out, "k": k, "row_bytes": raw.shape[1], "out_stride": n}
    own |= {"list": Buffer(rows.astype(np.int32)), "choice": choice(count)}
    own |= {name: buffer for name, buffer in fields.items() if name in ARRAYS}
    run(level, pack_op(Buffer(x), fields), Op(f"rows:{kind}{name}", Rows, own), n_threads=n_threads, n_tok=n_tok)
    assert np.isnan(out.array[:, count:]).all()
    return np.array(out.array[:, :count])


def all_rows(level: str, kind: str, raw: Array, x: Array) -> Array:
    """The products of all rows, listed in order, float32 (n_tok, n)."""
    return listed_rows(level, kind, raw, x, np.arange(len(raw)))


def lists(rng: np.random.Generator) -> list[Array]:
    """Empty, of one, two neighbours, some, all."""
    few = [np.array(rows, int) for rows in ([], [0], [N - 1], [N - 2, N - 1])]
    return [*few, some(N, 5, rng), some(N, 33, rng), np.arange(N)]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_listed_rows(level: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    for k in widths(kind):
        raw = weights(kind, N, k, rng)
        for n_tok in range(1, 8):
            x = inputs(kind, n_tok, k, rng)
            everything = all_rows(level, kind, raw, x)
            assert_product(kind, raw, x, everything)
            for rows in lists(rng)[n_tok % 2 :: 2]:
                got = listed_rows(level, kind, raw, x, rows)
                np.testing.assert_array_equal(got, everything[:, rows])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_a_token_alone_is_the_same_as_among_others(level: str, kind: str) -> None:
    rng = np.random.default_rng(4)
    k = widths(kind)[-1]
    raw, x, rows = weights(kind, N, k, rng), inputs(kind, 7, k, rng), some(N, 33, rng)
    together = listed_rows(level, kind, raw, x, rows)
    for t in range(7):
        np.testing.assert_array_equal(listed_rows(level, kind, raw, x[t : t + 1], rows)[0], together[t])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_threads_and_chunks_change_nothing(level: str, kind: str) -> None:
    rng = np.random.default_rng(2)
    k = widths(kind)[-1]
    raw, x = weights(kind, N, k, rng), inputs(kind, 3, k, rng)
    for rows in lists(rng):
        alone = listed_rows(level, kind, raw, x, rows)
        for n_threads, parts, ahead in ((1, 1, 0), (2, 16, 1), (3, 24, 1000), (5, 2, 9)):
            got = listed_rows(level, kind, raw, x, rows, n_threads, parts=parts, ahead=ahead)
            np.testing.assert_array_equal(got, alone)


@pytest.mark.parametrize("level", LEVELS)
def test_long_rows_are_fetched_in_two_steps(level: str) -> None:
    """Rows of more than 1 KiB are looked up further ahead, near the list's end too."""
    rng = np.random.default_rng(3)
    for kind, k in (("F32", 1031), ("Q4_0", 2048)):
        raw, x = weights(kind, N, k, rng), inputs(kind, 2, k, rng)
        everything = all_rows(level, kind, raw, x)
        assert_product(kind, raw, x, everything)
        for rows in lists(rng):
            for ahead in (1, 9, 40):
                got = listed_rows(level, kind, raw, x, rows, ahead=ahead)
                np.testing.assert_array_equal(got, everything[:, rows])


@pytest.mark.parametrize("level", LEVELS)
def test_biases_are_those_of_the_neurons(level: str) -> None:
    rng = np.random.default_rng(8)
    raw, x = weights("Q8_0", N, 64, rng), inputs("Q8_0", 3, 64, rng)
    bias = rng.standard_normal(N, np.float32)
    for rows in lists(rng):
        got = listed_rows(level, "Q8_0", raw, x, rows, bias=Buffer(bias))
        np.testing.assert_array_equal(got, listed_rows(level, "Q8_0", raw, x, rows) + bias[rows])


@pytest.mark.parametrize("name", naive.ACTIVATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_activated_rows(level: str, name: str) -> None:
    """act(gate) * row . x, and 0 where |act(gate)| is below the threshold; as the activation's own op gives it."""
    rng = np.random.default_rng(7)
    raw, x = weights("F32", N, 32, rng), rng.standard_normal((3, 32), np.float32)
    for rows in lists(rng):
        count = len(rows)
        gates = rng.standard_normal((3, N), np.float32)
        up = listed_rows(level, "F32", raw, x, rows)
        for threshold, n_threads in ((0.0, 1), (0.3, 2)):
            given = {"gates": Buffer(gates), "threshold": threshold}
            got = listed_rows(level, "F32", raw, x, rows, n_threads, f":{name}", **given)
            wanted = naive.glu(gates[:, :count].astype(np.float64), up.astype(np.float64), name)
            act = naive.ACTIVATIONS[name](gates[:, :count].astype(np.float64))
            np.testing.assert_allclose(got, np.where(np.abs(act) >= threshold, wanted, 0), rtol=3e-6, atol=1e-14)

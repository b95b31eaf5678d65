"""The down projection of listed neurons: parts and their sum, for every weight type, against float64.

Rounding: a sum of `count` products and what was there takes, in some order, less than 2 count + 20 float32 additions
(types with minima add two terms a neuron), each off by 2**-24 of the terms' magnitudes at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_harness import (
    FLOATS,
    LEVELS,
    PLAIN,
    TYPES,
    Array,
    Buffer,
    Op,
    choice,
    dequantize,
    magnitude,
    run,
    some,
    weights,
    widths,
)

from hotcold.runtime.cpu.layout import AddParts, Down

N_FF = 90
COUNTS = (0, 1, 3, 4, 5, 41, N_FF)


def down(
    level: str, kind: str, raw: Array, rows: Array, h: Array, x: Array, n_threads: int = 1, **options: Any
) -> Array:
    """x + h times the listed rows, float32 (n_tok, n); h float32 (n_tok, len(rows)). Options: parts, ahead."""
    n_tok, n = x.shape
    parts = options.get("parts", 4)
    wide = np.full((n_tok, N_FF), np.nan, np.float32)  # what is beyond the list is of older steps
    wide[:, : len(rows)] = h
    out, sums = Buffer(x), Buffer.full((parts, n_tok, n))
    own = {"w": Buffer(raw), "out": sums, "h": Buffer(wide), "h_stride": N_FF, "n": n, "row_bytes": raw.shape[1]}
    own |= {"list": Buffer(rows.astype(np.int32)), "choice": choice(len(rows)), "parts": parts}
    own["ahead"] = options.get("ahead", 6)
    add = Op("add_parts", AddParts, {"sums": sums, "out": out, "add": 1, "n": n, "parts": parts})
    run(level, Op(f"down:{kind}", Down, own), add, n_threads=n_threads, n_tok=n_tok)
    return np.array(out.array)


def hidden(n_tok: int, count: int, rng: np.random.Generator) -> Array:
    """Products of gate and up, float32 (n_tok, count); a third is zero, as where other tokens need the neuron."""
    h = rng.standard_normal((n_tok, count), np.float32)
    return np.where(rng.random(h.shape) < 0.33, np.float32(0), h)


def assert_sum(kind: str, raw: Array, rows: Array, h: Array, x: Array, got: Array) -> None:
    wide = h.astype(np.float64)
    wanted = x + wide @ dequantize(kind, raw)[rows]
    terms = np.abs(x) + np.abs(wide) @ magnitude(kind, raw)[rows]
    assert np.isfinite(got).all()
    assert (np.abs(got - wanted) <= (2 * len(rows) + 20) * 2.0**-24 * terms).all()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_sum_of_the_listed_rows(level: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    for n in widths(kind):
        raw = weights(kind, N_FF, n, rng)
        for n_tok in range(1, 8):
            x = rng.standard_normal((n_tok, n), np.float32)
            for count in COUNTS:
                rows, h = some(N_FF, count, rng), hidden(n_tok, count, rng)
                parts = (4, 16)[n_tok % 2]
                assert_sum(kind, raw, rows, h, x, down(level, kind, raw, rows, h, x, parts=parts))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_threads_change_nothing(level: str, kind: str) -> None:
    rng = np.random.default_rng(2)
    n = widths(kind)[-1]
    raw = weights(kind, N_FF, n, rng)
    for n_tok, count, parts in ((1, N_FF, 4), (1, 41, 16), (3, 33, 4), (7, 5, 16), (2, 0, 4)):
        rows, h, x = some(N_FF, count, rng), hidden(n_tok, count, rng), rng.standard_normal((n_tok, n), np.float32)
        alone = down(level, kind, raw, rows, h, x, parts=parts)
        for n_threads, ahead in ((2, 0), (3, 4), (5, 1000)):
            again = down(level, kind, raw, rows, h, x, n_threads, parts=parts, ahead=ahead)
            np.testing.assert_array_equal(again, alone)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_a_token_alone_is_the_same_as_among_others(level: str, kind: str) -> None:
    """As long as the list is the same: rows are added in its order, whoever else needs them."""
    rng = np.random.default_rng(3)
    n = widths(kind)[-1]
    raw, rows = weights(kind, N_FF, n, rng), some(N_FF, 41, rng)
    h, x = hidden(7, 41, rng), rng.standard_normal((7, n), np.float32)
    together = down(level, kind, raw, rows, h, x)
    for t in range(7):
        np.testing.assert_array_equal(down(level, kind, raw, rows, h[t : t + 1], x[t : t + 1])[0], together[t])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_zeros_add_nothing(level: str, kind: str) -> None:
    """A token that needs none of the neurons keeps its x, whatever the others need."""
    rng = np.random.default_rng(4)
    n = widths(kind)[-1]
    raw, rows = weights(kind, N_FF, n, rng), some(N_FF, 38, rng)
    h, x = hidden(3, 38, rng), rng.standard_normal((3, n), np.float32)
    h[1] = 0
    got = down(level, kind, raw, rows, h, x)
    np.testing.assert_array_equal(got[1], x[1])
    assert_sum(kind, raw, rows, h, x, got)
    np.testing.assert_array_equal(down(level, kind, raw, rows, h * 0, x), x)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_one_neuron_is_its_row(level: str, kind: str) -> None:
    """h = 1 and nothing there: the row as it is stored, but for the rounding of scale * quant + minimum."""
    rng = np.random.default_rng(5)
    for n in widths(kind):
        raw = weights(kind, N_FF, n, rng)
        for row in (0, 17, N_FF - 1):
            got = down(level, kind, raw, np.array([row]), np.ones((1, 1), np.float32), np.zeros((1, n), np.float32))
            wanted = dequantize(kind, raw[row : row + 1])
            if kind in FLOATS:
                np.testing.assert_array_equal(got, wanted)
            else:
                assert (np.abs(got - wanted) <= 2.0**-22 * magnitude(kind, raw[row : row + 1])).all()


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("level", LEVELS)
def test_four_rows_at_a_time_are_four_rows(level: str, kind: str) -> None:
    """A part of less than four takes another path through the kernel; both agree to rounding, each row in its place."""
    rng = np.random.default_rng(6)
    raw, x = weights(kind, N_FF, 96, rng), np.zeros((1, 96), np.float32)
    for count in range(1, 9):
        rows = some(N_FF, count, rng)
        for place in range(count):
            h = np.zeros((1, count), np.float32)
            h[0, place] = 1.5
            for parts in (1, 2):
                got = down(level, kind, raw, rows, h, x, parts=parts)
                assert_sum(kind, raw, rows[place : place + 1], h[:, place : place + 1], x, got)


@pytest.mark.parametrize("level", LEVELS)
def test_parts_are_added_in_order(level: str) -> None:
    """Over spans and lanes that do not divide the size; what each part holds is an integer, so no order shows."""
    rng = np.random.default_rng(7)
    for n_tok, n in ((1, 1), (1, 300), (3, 85), (7, 100)):
        for parts in (1, 4, 16):
            sums = rng.integers(-1000, 1000, (parts, n_tok, n)).astype(np.float32)
            x = rng.integers(-1000, 1000, (n_tok, n)).astype(np.float32)
            bias = rng.integers(-1000, 1000, n).astype(np.float32)
            for add, biased in ((1, False), (0, False), (1, True), (0, True)):
                out = Buffer(x)
                fields = {"sums": Buffer(sums), "out": out, "add": add, "n": n, "parts": parts}
                fields["bias"] = Buffer(bias) if biased else 0
                run(level, Op("add_parts", AddParts, fields), n_threads=2, n_tok=n_tok)
                np.testing.assert_array_equal(out.array, add * x + sums.sum(axis=0) + biased * bias)

"""Matmul kernels of every weight type, for rows as files have them and for bands, against float64 products.

The weights are those that gguf.quants decodes. Activations are exact in 8 bits here, so only float32 rounding is left:
each output may be off by TOLERANCE of the sum of its terms' magnitudes. A lane adds at most k terms (2**-24 each, 6e-6
for k = 100 floats); measured: below 5e-7.
"""

from __future__ import annotations

from typing import Any

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
    dequantize,
    exact_activations,
    inputs,
    magnitude,
    pack_op,
    packed,
    packed_blocks,
    run,
    weights,
    widths,
    with_quants,
    woven,
)

from hotcold.runtime.cpu import isa
from hotcold.runtime.cpu.layout import ARRAYS, Bands, MatMul, Step

COUNTS = (1, 2, 7, 8, 9, 33)  # by rows up to 7; bands by 32 at a time
N_ROWS = (1, 5, 16, 37)
FORMS = [(kind, "rows") for kind in TYPES] + [(kind, "bands") for kind in QUANTS]
QUANTISED = [(kind, form) for kind, form in FORMS if kind in QUANTS]


def multiply(
    level: str, kind: str, raw: Array, x: Array, n_threads: int = 1, form: str = "rows", **options: Any
) -> Array:
    """Pack x and multiply: float32 (n_tok, n). form: of the weights.

    Options: bias, add (what the output holds before), chunk, panels (of rows), large, regions (of bands), step (fields
    of its record).
    """
    n_tok, k = x.shape
    n = len(raw)
    stride = n + 3
    out = Buffer.full((n_tok, stride))
    if "add" in options:
        out.array[:, :n] = options["add"]
    shared = {
        "out": out,
        "bias": Buffer(options["bias"]) if "bias" in options else 0,
        "k": k,
        "n": n,
        "out_stride": stride,
        "count": Step.n_tok,
        "add": int("add" in options),
        "chunk": options.get("chunk", 8),
    }
    if form == "bands":
        fields, regions = packed_blocks(k, n_tok), options.get("regions", n_threads)
        shared |= {
            "w": Buffer(woven(level, kind, raw)),
            "band_bytes": raw.shape[1] * isa.LEVELS[level].lanes,
            "xb": fields["xb"],
            "large": options.get("large", 2),
            "regions": regions,
            "claims": Buffer(np.zeros(8 * regions, np.int64)),
        }
        product = Op(f"bands:{kind}", Bands, shared)
    else:
        fields = packed(k, n_tok, kind in QUANTS, kind in FLOATS)
        shared |= {"w": Buffer(raw), "row_bytes": raw.shape[1], "panels": options.get("panels", 1)}
        arrays = {name: buffer for name, buffer in fields.items() if name in ARRAYS}
        product = Op(f"matmul:{kind}", MatMul, shared | arrays)
    run(level, pack_op(Buffer(x), fields), product, n_threads=n_threads, n_tok=n_tok, **options.get("step", {}))
    assert np.isnan(out.array[:, n:]).all()
    return np.array(out.array[:, :n])


@pytest.mark.parametrize("kind, form", FORMS)
@pytest.mark.parametrize("level", LEVELS)
def test_product(level: str, kind: str, form: str) -> None:
    rng = np.random.default_rng(1)
    for k in widths(kind):
        raw = weights(kind, max(N_ROWS), k, rng)
        for n_tok in COUNTS:
            for n in N_ROWS:
                x = inputs(kind, n_tok, k, rng)
                assert_product(kind, raw[:n], x, multiply(level, kind, raw[:n], x, form=form))


BY_ROWS, BY_TILES = {"tile_min": 99}, {"tile_min": 0}


@pytest.mark.parametrize("kind, form", FORMS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_token_gets_the_same_alone_and_among_others(level: str, kind: str, form: str) -> None:
    rng = np.random.default_rng(4)
    for k in widths(kind):
        raw = weights(kind, 37, k, rng)
        x = rng.standard_normal((9, k), np.float32)
        for step in (BY_ROWS, BY_TILES):
            together = multiply(level, kind, raw, x, form=form, step=step)
            for first, last in ((0, 1), (8, 9), (1, 5), (3, 9)):
                np.testing.assert_array_equal(
                    together[first:last], multiply(level, kind, raw, x[first:last], form=form, step=step)
                )


@pytest.mark.parametrize("kind, form", FORMS)
@pytest.mark.parametrize("level", LEVELS)
def test_bias_and_add(level: str, kind: str, form: str) -> None:
    rng = np.random.default_rng(2)
    k = widths(kind)[-1]
    raw = weights(kind, 37, k, rng)
    bias = rng.standard_normal(37, np.float32)
    for n_tok in (2, 9):
        x = inputs(kind, n_tok, k, rng)
        there = rng.standard_normal((n_tok, 37), np.float32)
        assert_product(kind, raw, x, multiply(level, kind, raw, x, form=form, bias=bias), bias)
        assert_product(kind, raw, x, multiply(level, kind, raw, x, form=form, add=there), there)
        assert_product(kind, raw, x, multiply(level, kind, raw, x, form=form, bias=bias, add=there), there + bias)


@pytest.mark.parametrize("kind, form", FORMS)
@pytest.mark.parametrize("level", LEVELS)
def test_threads_and_chunks_change_nothing(level: str, kind: str, form: str) -> None:
    rng = np.random.default_rng(3)
    k = widths(kind)[-1]
    raw = weights(kind, 75, k, rng)
    for n_tok in (3, 20):
        x = inputs(kind, n_tok, k, rng)
        alone = multiply(level, kind, raw, x, form=form)
        for n_threads, chunk, panels in ((1, 1, 2), (1, 100, 9), (2, 8, 1), (3, 5, 3)):
            options = {"chunk": chunk, "panels": panels} if form == "rows" else {"chunk": panels, "large": panels}
            np.testing.assert_array_equal(alone, multiply(level, kind, raw, x, n_threads, form, **options))


@pytest.mark.parametrize("kind, form", FORMS)
@pytest.mark.parametrize("level", LEVELS)
def test_the_last_panels_tokens_change_nothing(level: str, kind: str, form: str) -> None:
    """However few tokens the last panel has, each gets what it gets among many."""
    rng = np.random.default_rng(7)
    k = widths(kind)[-1]
    raw, x = weights(kind, 21, k, rng), inputs(kind, 16, k, rng)
    many = multiply(level, kind, raw, x, form=form)
    for n_tok in range(8, 16):
        np.testing.assert_array_equal(multiply(level, kind, raw, x[:n_tok], form=form), many[:n_tok])


@pytest.mark.parametrize("kind, form", QUANTISED)
@pytest.mark.parametrize("level", LEVELS)
def test_extreme_quants(level: str, kind: str, form: str) -> None:
    rng = np.random.default_rng(4)
    k = widths(kind)[-1]
    raw = weights(kind, 17, k, rng)
    for byte in (0x00, 0xFF, 0x80, 0x7F):
        extreme = with_quants(kind, raw, byte)
        for n_tok in (1, 9):
            for sign in (1, -1):
                x = np.full((n_tok, k), sign * 127.0, np.float32)
                assert_product(kind, extreme, x, multiply(level, kind, extreme, x, form=form))
    nothing = np.zeros((9, k), np.float32)
    for n_tok in (1, 9):
        assert not multiply(level, kind, raw, nothing[:n_tok], form=form).any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("form", ["rows", "bands"])
@pytest.mark.parametrize("n_tok", [1, 9])
def test_q8_0_sums_are_exact(level: str, form: str, n_tok: int) -> None:
    """Scales of one and sums below 2**24: nothing may round, and 16-bit pair sums may not saturate."""
    k, one = 288, np.frombuffer(np.float16(1).tobytes(), np.uint8)
    for weight in (-128, 127):
        for activation in (-127, 127):
            blocks = np.empty((5, k // 32, 34), np.uint8)
            blocks[:, :, :2] = one
            blocks[:, :, 2:] = np.int8(weight).view(np.uint8)
            x = np.full((n_tok, k), activation, np.float32)
            got = multiply(level, "Q8_0", blocks.reshape(5, -1), x, form=form)
            np.testing.assert_array_equal(got, np.float32(k * weight * activation))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("form", ["rows", "bands"])
def test_float16_scales_below_the_normal_range(level: str, form: str) -> None:
    rng = np.random.default_rng(5)
    blocks = weights("Q4_0", 5, 96, rng).reshape(5, 3, 18)
    blocks[:, :, :2] = np.array([1, 700, 0x8001], np.uint16).view(np.uint8).reshape(3, 2)
    raw = blocks.reshape(5, -1)
    for n_tok in (1, 9):
        x = exact_activations(n_tok, 96, rng)
        assert_product("Q4_0", raw, x, multiply(level, "Q4_0", raw, x, form=form))


@pytest.mark.parametrize("kind, form", QUANTISED)
@pytest.mark.parametrize("level", LEVELS)
def test_any_activations(level: str, kind: str, form: str) -> None:
    """Not exact in 8 bits: half a step of rounding each, a step being 1/127 of the block's largest activation."""
    rng = np.random.default_rng(6)
    k = widths(kind)[-1]
    raw = weights(kind, 37, k, rng)
    for n_tok in (2, 9):
        x = rng.standard_normal((n_tok, k), np.float32) * np.exp2(rng.integers(-20, 20, (n_tok, 1))).astype(np.float32)
        wanted = x.astype(np.float64) @ dequantize(kind, raw).T
        step = np.repeat(np.abs(x).reshape(n_tok, -1, 32).max(axis=2) / 127.0, 32, axis=1)
        bound = (step * 0.5001 + np.abs(x) * 4e-6) @ magnitude(kind, raw).T
        assert (np.abs(multiply(level, kind, raw, x, form=form) - wanted) < bound).all()


@pytest.mark.parametrize("kind", QUANTS)
@pytest.mark.parametrize("level", LEVELS)
def test_bands_give_a_token_what_a_prompt_gives_it(level: str, kind: str) -> None:
    """The same bits for any number of tokens, in one band or two at a time, whoever takes which chunk."""
    rng = np.random.default_rng(8)
    for k in widths(kind):
        for n in (5, 16, 53, 100):
            raw, x = weights(kind, n, k, rng), rng.standard_normal((70, k), np.float32)
            many = multiply(level, kind, raw, x, form="bands", large=3)
            for first, last in ((0, 1), (69, 70), (3, 5), (30, 63), (0, 33)):
                few = multiply(level, kind, raw, x[first:last], 2, "bands", chunk=1, large=1, regions=3)
                np.testing.assert_array_equal(few, many[first:last])


@pytest.mark.parametrize("level", LEVELS)
def test_bands_take_the_bytes_of_their_rows(level: str) -> None:
    """Interleaving moves bits and loses none: as many ones before and after, in whole bands."""
    rng = np.random.default_rng(9)
    lanes = isa.LEVELS[level].lanes
    for kind in QUANTS:
        if kind == "Q8_0":
            continue  # its quants change their top bit
        raw = weights(kind, 2 * lanes, widths(kind)[-1], rng)
        bands = woven(level, kind, raw)
        assert bands.nbytes == raw.nbytes
        assert np.unpackbits(bands).sum() == np.unpackbits(raw).sum()

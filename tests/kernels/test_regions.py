"""Work that threads take region by region (take_near): over steps of changing size, and by a thread that is late."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from kernel_harness import LEVELS, Array, Buffer, Op, Tape, isa, kernel, pack_op, packed_blocks, weights, woven

from hotcold.runtime.cpu.layout import KV_BLOCK, Attention, Bands, Step, part_bytes

K, N, MOST = 96, 400, 70


def product(level: str, x: Buffer, out: Buffer, regions: int) -> list[Op]:
    """Pack x and multiply it with bands of Q8_0, in chunks that differ for few and many tokens."""
    raw = weights("Q8_0", N, K, np.random.default_rng(0))
    blocks = packed_blocks(K, MOST)
    fields = {"w": Buffer(woven(level, "Q8_0", raw)), "xb": blocks["xb"], "out": out, "k": K, "n": N, "out_stride": N}
    fields |= {"band_bytes": raw.shape[1] * isa.LEVELS[level].lanes, "count": Step.n_tok, "bias": 0, "add": 0}
    fields |= {"chunk": 3, "large": 1, "regions": regions, "claims": Buffer(np.zeros((regions, 8), np.int64))}
    return [pack_op(x, blocks), Op("bands:Q8_0", Bands, fields)]


def late(level: str, tape: Tape, op: int, name: str, step: dict[str, Any]) -> None:
    """Let a thread of the first turn, which is over, enter an op when the record is that of the next step."""
    record = np.zeros(len(Step), np.int64)
    for field, value in step.items():
        record[getattr(Step, field) // 8] = value.array.ctypes.data if isinstance(value, Buffer) else value
    call = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)(kernel(level, name))
    call(tape._records[op].ctypes.data, record.ctypes.data, 0, 0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_steps_of_changing_size(level: str, n_threads: int) -> None:
    rng = np.random.default_rng(2)
    x, out = Buffer(np.zeros((MOST, K), np.float32)), Buffer.full((MOST, N))
    wanted: dict[int, Array] = {}
    values = rng.standard_normal((MOST, K), np.float32)
    with Tape(level, product(level, Buffer(values), alone := Buffer.full((MOST, N)), 1)) as tape:
        for n_tok in (1, 2, 33, MOST):
            tape.walk(n_tok=n_tok)
            wanted[n_tok] = alone.array[:n_tok].copy()
    with Tape(level, product(level, x, out, n_threads), n_threads) as tape:
        for turn in range(40):
            n_tok = (1, 2, 33, MOST)[turn * 7 % 4]
            x.array[:], out.array[:] = values, np.nan
            tape.walk(n_tok=n_tok)
            np.testing.assert_array_equal(out.array[:n_tok], wanted[n_tok])
            assert np.isnan(out.array[n_tok:]).all()


@pytest.mark.parametrize("level", LEVELS)
def test_a_late_thread_takes_nothing_of_the_next_step(level: str) -> None:
    x, out = Buffer(np.ones((MOST, K), np.float32)), Buffer.full((MOST, N))
    with Tape(level, product(level, x, out, 1)) as tape:
        tape.walk(n_tok=1)
        done = tape._done.copy()
        out.array[:] = np.nan
        late(level, tape, 1, "bands:Q8_0", {"n_tok": MOST})  # it would have more chunks
        assert np.isnan(out.array).all() and (tape._done == done).all()


@pytest.mark.parametrize("level", LEVELS)
def test_a_late_thread_counts_no_part_of_attention(level: str) -> None:
    n_kv, dim, n_blocks = 2, 32, 80
    page = KV_BLOCK * dim * 2
    keys, values = (Buffer(np.zeros((n_blocks, n_kv, page), np.uint8)) for _ in range(2))
    table = Buffer(np.arange(n_blocks, dtype=np.int32))
    position, counts = Buffer(np.array([2047], np.int32)), Buffer(np.zeros((64, n_kv), np.int64))
    fields = {"q": Buffer(np.ones((1, 4, dim), np.float32)), "out": Buffer.full((1, 4, dim)), "n_head": 4, "n_kv": n_kv}
    fields |= {"dim_k": dim, "dim_v": dim, "keys": keys, "values": values, "key_bytes": page, "value_bytes": page}
    fields |= {"scale": 1.0, "softcap": 0.0, "window": 0, "counts": counts, "n_parts": 4096, "regions": 1}
    fields |= {"parts": Buffer.full((4096, part_bytes(dim)), np.uint8, 255), "claims": Buffer(np.zeros(8, np.int64))}
    step = {"n_tok": 1, "tiles": Buffer(np.array([[0, 1, 0]], np.int32)), "n_tiles": 1, "positions": position}
    step["tables"] = Buffer(np.array([table.array.ctypes.data], np.int64))
    with Tape(level, [Op("attention:f16-f16", Attention, fields)]) as tape:
        tape.walk(**step)
        position.array[0] = 2048  # the next token begins another part
        late(level, tape, 0, "attention:f16-f16", step)
        assert not counts.array.any()
        tape.walk(**step)
        assert not counts.array.any()

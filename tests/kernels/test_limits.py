"""Reading memory and multiplying bytes, and nothing else: that all of it happens, and what a step reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kernel_harness import LEVELS, Buffer, Op, run

from hotcold import Engine
from hotcold.runtime import limits
from hotcold.runtime.cpu.isa import LEVELS as LEVELS_BY_NAME
from hotcold.runtime.cpu.layout import PEAK_BYTES, PEAK_TILE, Read


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_sums_are_those_of_all_bytes(level: str, n_threads: int) -> None:
    for size in (64, 256, 64 * 9, 64 * 1001):
        data = np.random.default_rng(size).integers(-(2**31), 2**31, size // 4).astype(np.int32)
        sums = Buffer.full(5, np.int32, 0)
        fields = {"src": Buffer(data), "size": size, "parts": 5, "sums": sums}
        run(level, Op("read", Read, fields), n_threads=n_threads)
        assert sums.array.sum(dtype=np.int32) == data.sum(dtype=np.int32)


def test_nothing_past_the_end_is_read_into_the_sum() -> None:
    for size in (0, 4, 60, 100, 700):
        data = np.ones(256, np.int32)
        data[size // 64 * 16 :] = 1000
        sums = Buffer.full(2, np.int32, 0)
        run(LEVELS[0], Op("read", Read, {"src": Buffer(data), "size": size, "parts": 2, "sums": sums}))
        assert sums.array.sum() == size // 64 * 16


def test_a_reader_reads_all_its_regions_again_and_again() -> None:
    data = [np.ones(n, np.uint8) for n in (64, 128 * 1024, 1000)]
    reader = limits.Reader([(array.ctypes.data, array.nbytes) for array in data], 2)
    try:
        assert reader.nbytes == 64 + 128 * 1024 + 1000
        assert reader.seconds() > 0 and reader.rate(1e-4) > 0
        done = reader._records[:, Read.done // 8]
        assert len(set(done.tolist())) == 1 and reader._rows[:, 2].tolist() == [0, 0, 1]  # one segment, one barrier
    finally:
        reader.close()


def test_memory_is_read_at_some_speed() -> None:
    assert 1e6 < limits.read_rate(2, 1 << 20, 2) < 1e13


def test_what_a_step_reads(tiny_model: Callable[..., Path]) -> None:
    with Engine(tiny_model(), n_ctx=32, n_threads=1) as engine:
        tensors = engine.file.tensors
        matrices = {name: info.nbytes for name, info in tensors.items() if len(info.shape) == 2}
        if not engine.config.tied_output:
            del matrices["token_embd.weight"]
        found = limits.weights(engine)
        assert {name: nbytes for name, (_, nbytes) in found.items() if name in matrices} == matrices
        assert all(len(tensors[name].shape) == 1 for name in set(found) - set(matrices))
        engine.eval(engine.new_sequence(), [1])
        norms = sum(nbytes for name, (_, nbytes) in found.items() if "norm" in name and ".ffn_" not in name)
        total = limits.bytes_outside_ffn(engine) + engine.usage.step_bytes
        assert total == sum(matrices.values()) + norms
        reader = limits.reader_of(engine)
        assert reader.nbytes == sum(nbytes for _, nbytes in found.values()) and reader.seconds() > 0
        reader.close()


@pytest.mark.parametrize("level", LEVELS)
def test_the_peak_kernel_multiplies_all_that_it_says(level: str) -> None:
    wide = LEVELS_BY_NAME[level].vector_bytes
    data = np.random.default_rng(3).integers(0, 100, PEAK_BYTES).astype(np.uint8)
    steps = 150
    sums = Buffer.full(2, np.int32, 0)
    fields = {"src": Buffer(data), "size": steps, "parts": 2, "sums": sums}
    run(level, Op("peak", Read, fields), n_threads=2)
    weights = data[:wide].reshape(-1, 4).astype(np.int64)
    starts = [(n & (PEAK_BYTES // wide - 2)) * wide + 4 * j for n in range(steps) for j in range(PEAK_TILE[wide])]
    wanted = sum(int((weights * data[at : at + 4]).sum()) for at in starts)
    assert sums.array.tolist() == [wanted, wanted]


def test_products_are_made_at_some_rate() -> None:
    assert 1e8 < limits.product_rate(2, 1e-3) < 1e15

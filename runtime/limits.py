"""What the machine can do at most, beside which a step's speed is judged: reading memory, multiplying bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import numpy as np

from .cpu import isa, jit
from .cpu.layout import PEAK_BYTES, PEAK_TILE, Read, Row, Step
from .cpu.threads import ThreadPool
from .memory import ALIGNMENT, aligned, large_pages

if TYPE_CHECKING:
    from .engine import Engine

_SLOTS = 2 * ALIGNMENT // 8  # int64 slots of a record
_PEAK_STEPS = 1 << 18  # some milliseconds


class _Work:
    """A tape of one kernel over regions (address, size), one part of each a thread, without barriers between."""

    def __init__(
        self, kernel: str, regions: Seq[tuple[int, int]], n_threads: int, progress: jit.Progress | None = None
    ) -> None:
        kernels = jit.load(["walk", kernel], progress=progress)
        self._records = aligned(len(regions) * _SLOTS * 8, zero=True).view(np.int64).reshape(-1, _SLOTS)
        self._rows = np.zeros((len(regions), len(Row)), np.int64)
        self._step = np.zeros(len(Step), np.int64)
        self._sums = np.zeros(n_threads, np.int32)
        self._done = aligned(ALIGNMENT, zero=True)
        common = {"done": self._done.ctypes.data, "parts": n_threads, "sums": self._sums.ctypes.data}
        for i, (address, size) in enumerate(regions):
            for name, value in {**common, "src": address, "size": size}.items():
                self._records[i, getattr(Read, name) // 8] = value
            self._rows[i] = kernels[kernel], self._records[i].ctypes.data, i == len(regions) - 1, 0, 0, 0
        self._pool = ThreadPool(kernels["walk"], n_threads)

    def seconds(self) -> float:
        """Do it once; the time it took."""
        start = time.perf_counter()
        self._pool.run(self._rows.ctypes.data, len(self._rows), self._step.ctypes.data)
        return max(1e-9, time.perf_counter() - start)

    def typical(self, least_s: float) -> float:
        """Seconds of a pass: the median of as many as take least_s together, after one that wakes the threads."""
        self.seconds()
        times: list[float] = []
        while sum(times) < least_s:
            times.append(self.seconds())
        return statistics.median(times)

    def close(self) -> None:
        """End the threads."""
        self._pool.close()


class Reader(_Work):
    """Threads that read regions of memory, given as (address, bytes); of each, every thread reads one contiguous part.

    nbytes: what a pass reads. The regions must stay where they are until close().
    """

    def __init__(self, regions: Seq[tuple[int, int]], n_threads: int, progress: jit.Progress | None = None) -> None:
        super().__init__("read", regions, n_threads, progress)
        self.nbytes = sum(nbytes for _, nbytes in regions)

    def rate(self, least_s: float) -> float:
        """Bytes a second, in passes that take least_s seconds together."""
        return self.nbytes / self.typical(least_s)


def read_rate(n_threads: int, nbytes: int, rounds: int, progress: jit.Progress | None = None) -> float:
    """Bytes a second that threads read of memory in large pages, where there are any: the best of a few rounds."""
    array = large_pages(nbytes)
    array[:] = 1
    reader = Reader([(array.ctypes.data, nbytes)], n_threads, progress)
    try:
        return nbytes / min(reader.seconds() for _ in range(rounds))
    finally:
        reader.close()


def product_rate(n_threads: int, least_s: float, progress: jit.Progress | None = None) -> float:
    """Products of bytes a second, added to 32-bit sums: the inner step of a prompt's product, without anything else."""
    data = aligned(PEAK_BYTES, zero=True)
    work = _Work("peak", [(data.ctypes.data, _PEAK_STEPS)], n_threads, progress)
    width = isa.LEVELS[isa.choose()].vector_bytes
    try:
        return n_threads * _PEAK_STEPS * PEAK_TILE[width] * width / work.typical(least_s)
    finally:
        work.close()


def weights(engine: Engine) -> dict[str, tuple[int, int]]:
    """(address, bytes) of the tensors that a step on the CPU multiplies with, by name."""
    tensors, found = engine._tensors, {}
    for node in engine._executor.tape.nodes:
        if node.weight and node.op not in ("embed", "positions"):
            at = tensors.bands(node.weight) or tensors.address(node.weight)
            found[node.weight] = at, tensors.info(node.weight).nbytes
    return found


def reader_of(engine: Engine, progress: jit.Progress | None = None) -> Reader:
    """A reader of the engine's weights, with as many threads; to be closed before the engine."""
    return Reader(list(weights(engine).values()), engine.n_threads, progress)


def bytes_outside_ffn(engine: Engine) -> int:
    """Bytes of weights that every step on the CPU reads; engine.usage counts those of the FFNs."""
    return sum(nbytes for name, (_, nbytes) in weights(engine).items() if ".ffn_" not in name)

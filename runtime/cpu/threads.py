"""The thread pool: N-1 threads of ours, parked between steps, and the caller walk the tape together."""

from __future__ import annotations

import ctypes
import os
import threading

import numpy as np

from .layout import Sync

_WALK = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)


def _yield_function() -> int:
    """Address of a C function that offers the core to other threads, 0 where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):  # Windows
        return 0


class ThreadPool:
    """Runs the walker on n threads; ctypes releases the GIL for the length of a walk."""

    def __init__(self, walker: int, n_threads: int) -> None:
        self.n_threads = n_threads
        self._walk = _WALK(walker)
        self._shared = np.zeros(64, np.int64)
        self._shared[Sync.yield_function // 8] = _yield_function()
        self._job: tuple[int, int, int] | None = None
        self._gates = [threading.Lock() for _ in range(n_threads - 1)]
        for gate in self._gates:
            gate.acquire()
        self._threads = [
            threading.Thread(target=self._serve, args=(i,), name=f"hotcold-{i}", daemon=True) for i in range(1, n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def _serve(self, ith: int) -> None:
        gate = self._gates[ith - 1]
        walk, shared, nth = self._walk, self._shared.ctypes.data, self.n_threads
        while True:
            gate.acquire()
            if self._job is None:
                return
            tape, rows, step = self._job
            walk(tape, rows, step, ith, nth, shared)

    def run(self, tape: int, rows: int, step: int) -> None:
        """Walk a tape once; returns when every thread has finished its last row (which must have a barrier)."""
        self._job = (tape, rows, step)
        for gate in self._gates:
            gate.release()
        self._walk(tape, rows, step, 0, self.n_threads, self._shared.ctypes.data)

    def close(self) -> None:
        """End the threads."""
        self._job = None
        for gate in self._gates:
            gate.release()
        for thread in self._threads:
            thread.join()
        self._gates, self._threads = [], []


def default_threads() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1

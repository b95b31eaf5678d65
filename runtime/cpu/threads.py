"""The thread pool: N-1 threads of ours, parked between steps, and the caller walk the tape together."""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress

from .layout import Row

_WALK = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 6)


def _yield_function() -> int:
    """Address of a C function that offers the core to other threads, 0 where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):  # Windows
        return 0


def _int_at(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


class ThreadPool:
    """Runs the walker on n threads; ctypes releases the GIL for the length of a walk."""

    def __init__(self, walker: int, n_threads: int) -> None:
        self.n_threads = n_threads
        self._walk = _WALK(walker)
        self._yield = _yield_function()
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._ended = False
        self._job = (0, 0, 0, 0)
        self._gates = [threading.Lock() for _ in range(self.n_threads - 1)]
        for gate in self._gates:
            gate.acquire()
        self._threads = [
            threading.Thread(target=self._serve, args=(gate, i), name=f"hotcold-{i}", daemon=True)
            for i, gate in enumerate(self._gates, 1)
        ]
        for thread in self._threads:
            thread.start()

    def _serve(self, gate: threading.Lock, ith: int) -> None:
        while True:
            gate.acquire()
            if self._ended:
                return
            tape, rows, step, turn = self._job
            self._walk(tape, rows, step, ith, turn, self._yield)

    def run(self, tape: int, rows: int, step: int) -> None:
        """Walk a tape once; returns when its work is done (the last row must have a barrier)."""
        turn = _int_at(_int_at(tape + Row.args)) >> 32  # that of the first row's counter; all hold the same
        if self._pid != os.getpid():  # threads do not follow into a forked child
            self._start()
        try:
            self._job = (tape, rows, step, turn)
            self._open_gates()
        finally:
            # Ctrl-C may strike between any two lines here, but a walk that others have begun must come to its end
            self._walk(tape, rows, step, 0, turn, self._yield)

    def _open_gates(self) -> None:
        for gate in self._gates:
            with suppress(RuntimeError):  # open still: its thread has not come back yet, and will see the new job
                gate.release()

    def close(self) -> None:
        """End the threads; a walk in another thread goes on alone."""
        self._ended = True
        self._open_gates()
        for thread in self._threads:
            if thread is not threading.current_thread():  # the garbage collector may call from any
                thread.join()
        self._gates, self._threads = [], []


def default_threads() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1

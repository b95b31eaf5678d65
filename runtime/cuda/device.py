"""One GPU: opening it, its memory, and one kind of error for all that can go wrong on it.

numba.cuda and pynvml are imported when a device is opened. In Numba's simulator a device has a made-up memory,
HOTCOLD_SIM_VRAM bytes (default 1 GiB), of which it counts what it hands out.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ...formats.errors import GPUError
from . import jit
from .nvml import INSTALL, Memory, Monitor

OLDEST = (7, 5)  # compute capability: Turing; what the CUDA 13 compiler still knows
_OPEN: dict[int, int] = {}  # devices by index: how many Device objects use it


def open_device(index: int | None = None) -> Device:
    """The GPU of that CUDA index, by default HOTCOLD_DEVICE or 0; GPUError says in one line why it cannot be used."""
    if index is None:
        text = os.environ.get("HOTCOLD_DEVICE", "0")
        if not text.strip().isdecimal():
            raise GPUError(f"HOTCOLD_DEVICE: got {text!r}, wanted the number of a GPU, from 0")
        index = int(text)
    return Device(_Simulated(index) if jit.simulated() else _Card(index))


class Device:
    """An open GPU.

    name, capability (major, minor), driver (version), processors (streaming multiprocessors). stream: where kernels and
    copies of its users go. After a failure on the GPU every use raises that error again.
    """

    def __init__(self, card: _Card | _Simulated) -> None:
        self._card = card
        self.index, self.name, self.capability = card.index, card.name, card.capability
        self.driver, self.processors = card.driver, card.processors
        self._broken: str | None = None
        self._closed = False
        _OPEN[self.index] = _OPEN.get(self.index, 0) + 1
        try:
            with self.check("opening it"):
                self.stream: Any = card.cuda.stream()
        except BaseException:
            self.close()
            raise

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name})"

    def memory(self) -> Memory:
        """Its memory now, in bytes."""
        return self._card.memory()

    def check_budget(self, budget: int) -> None:
        """GPUError if this process has more of its memory than `budget` bytes."""
        used = self.memory().used_by_us
        if used > budget:
            raise GPUError(f"{self}: {used} bytes are in use, more than the budget of {budget}; wanted a larger budget")

    def upload(self, array: np.ndarray) -> Any:
        """A copy of a host array in the GPU's memory; GPUError when that is exhausted."""
        host = np.ascontiguousarray(array)
        with self._taking(host.nbytes):
            return self._card.taken(self._card.cuda.to_device(host))

    def allocate(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
        """An array in the GPU's memory, of undefined contents; GPUError when that is exhausted."""
        with self._taking(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize):
            return self._card.taken(self._card.cuda.device_array(shape, dtype))

    def pinned(self, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        """A host array that is never paged out, so that copies of it run beside kernels."""
        with self.check("pinning host memory"):
            array: np.ndarray = self._card.cuda.pinned_array(shape, dtype)
        return array

    def mapped(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
        """A pinned host array that kernels can read in place, over the bus: a device array; host_view() writes it."""
        with self.check("mapping host memory"):
            return self._card.cuda.mapped_array(shape, dtype)

    def host_view(self, mapped: Any) -> np.ndarray:
        """The host's side of a mapped array."""
        return self._card.host_view(mapped)

    def event(self) -> Any:
        """A point in a stream: record(stream), query() whether it is reached, synchronize()."""
        with self.check("making an event"):
            return self._card.event()

    def seconds_between(self, start: Any, end: Any) -> float:
        """Seconds between two recorded events that have been reached."""
        with self.check("reading a clock"):
            return self._card.seconds_between(start, end)

    def synchronize(self) -> None:
        """Wait for all its work."""
        with self.check("waiting for it"):
            self._card.cuda.synchronize()

    @contextmanager
    def check(self, doing: str) -> Iterator[None]:
        """What fails on the GPU in this block becomes one GPUError, and marks the device as broken.

        doing: what the message says failed. Memory that runs out breaks nothing.
        """
        if self._closed:
            raise GPUError(f"{self}: used after close()")
        if self._broken:
            raise GPUError(self._broken)
        try:
            with self._card.current():
                yield
        except Exception as error:
            if not _of_the_driver(error):
                raise
            message = f"{self}: {doing}: {_explain(error, self.driver)}"
            if "OUT_OF_MEMORY" not in str(error):
                self._broken = message
            raise GPUError(message) from error

    def current(self) -> Any:
        """A block in which the GPU is the calling thread's own: arrays must be dropped in one."""
        return self._card.current()

    def close(self) -> None:
        """Free what is no longer referred to, and leave the GPU; never raises, and again is no error."""
        if self._closed:
            return
        try:
            if not self._broken:
                self.synchronize()
        except Exception:  # it fails because it has failed already
            pass
        self._closed = True
        self.stream = None
        _OPEN[self.index] -= 1
        reset = _OPEN[self.index] == 0 and self._broken is not None
        try:
            if reset:
                jit.load.cache_clear()
            with self._card.current():  # memory can only be freed where its context is the thread's own
                gc.collect()  # arrays in cycles
            self._card.close(reset)
        except Exception:  # nothing is left that could be done about it
            pass

    @contextmanager
    def _taking(self, nbytes: int) -> Iterator[None]:
        """Running out of memory names what was wanted and what is free."""
        try:
            with self.check("copying to it"):
                self._card.before_taking(nbytes)
                yield
        except GPUError as error:
            if error.__cause__ is None or "OUT_OF_MEMORY" not in str(error.__cause__):
                raise
            free = self.memory().free
            raise GPUError(f"{self}: out of memory: wanted {nbytes} bytes, {free} are free") from error.__cause__


class _Card:
    """A real GPU through numba.cuda and NVML."""

    def __init__(self, index: int) -> None:
        if importlib.util.find_spec("numba_cuda") is None:  # Numba's own, older numba.cuda does not count
            raise GPUError(f"no GPU: the package numba-cuda is missing; {INSTALL}")
        self._monitor = Monitor()
        try:
            self._start(index)
        except BaseException as error:
            self._monitor.close()
            if isinstance(error, Exception) and _of_the_driver(error):
                raise GPUError(f"GPU {index}: {_explain(error, self._monitor.driver)}") from error
            raise

    def _start(self, index: int) -> None:
        from numba import cuda

        self.cuda: Any = cuda
        self.index, self.driver = index, self._monitor.driver
        toolkit = tuple(cuda.runtime.get_version())
        if self._monitor.cuda[0] < toolkit[0]:
            have, want = (".".join(map(str, version)) for version in (self._monitor.cuda, toolkit))
            raise GPUError(f"GPU {index}: driver {self.driver} is too old: it supports CUDA {have}, wanted {want}")
        count = len(cuda.gpus)
        if index >= count:
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
            why = f" (CUDA_VISIBLE_DEVICES is {hidden!r})" if hidden is not None else ""
            wanted = f"wanted 0 to {count - 1}" if count else "but no GPU is visible"
            raise GPUError(f"GPU: got number {index}, {wanted}{why}")
        self._gpu = cuda.gpus[index]
        name = self._gpu.name
        self.name = name.decode() if isinstance(name, bytes) else str(name)
        self.capability: tuple[int, int] = tuple(self._gpu.compute_capability)[:2]
        if self.capability < OLDEST:
            have, want = (".".join(map(str, version)) for version in (self.capability, OLDEST))
            raise GPUError(f"GPU {index} ({self.name}): compute capability {have}, wanted {want} or later")
        self._monitor.select(index, str(self._gpu.uuid))
        with self._gpu:  # makes the context
            self.processors = int(self._gpu.MULTIPROCESSOR_COUNT)

    def current(self) -> Any:
        """A block in which this GPU is the thread's own."""
        return self._gpu

    def memory(self) -> Memory:
        return self._monitor.memory()

    def before_taking(self, nbytes: int) -> None:
        """The driver says itself when there is not enough."""

    def taken(self, array: Any) -> Any:
        return array

    def host_view(self, mapped: Any) -> np.ndarray:
        return np.asarray(mapped)

    def event(self) -> Any:
        return self.cuda.event()

    def seconds_between(self, start: Any, end: Any) -> float:
        return float(self.cuda.event_elapsed_time(start, end)) * 1e-3

    def close(self, reset: bool) -> None:
        try:
            if reset:  # after a fault its context is of no use to anybody
                self._gpu.reset()
            else:
                with self._gpu:
                    context = self.cuda.current_context()
                    context.memory_manager.deallocations.clear()  # arrays
                    context.deallocations.clear()  # streams and events
        finally:
            self._monitor.close()


class _OutOfMemory(RuntimeError):
    """What the made-up memory raises, in the driver's words."""


class _Event:
    """The simulator's own events have no time."""

    def record(self, stream: Any = 0) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        return True  # nothing runs behind one's back in the simulator

    def synchronize(self) -> None:
        """Nor is there anything to wait for."""


class _Simulated:
    """Numba's simulator, with a made-up memory."""

    name, capability, driver, processors = "CUDA simulator", OLDEST, "none", 2

    def __init__(self, index: int) -> None:
        from numba import cuda

        if index:
            raise GPUError(f"GPU: got number {index}, wanted 0 (the simulator has one)")
        self.cuda: Any = cuda
        self.index = index
        self._total, self._used = int(os.environ.get("HOTCOLD_SIM_VRAM", 1 << 30)), 0

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def memory(self) -> Memory:
        return Memory(self._total, self._total - self._used, self._used)

    def before_taking(self, nbytes: int) -> None:
        if nbytes > self._total - self._used:
            gc.collect()
        if nbytes > self._total - self._used:
            raise _OutOfMemory("CUDA_ERROR_OUT_OF_MEMORY")

    def taken(self, array: Any) -> Any:
        """Count an array until it and all views of it are gone."""
        memory = array._ary
        while isinstance(memory.base, np.ndarray):
            memory = memory.base
        self._used += array.nbytes
        weakref.finalize(memory, self._give_back, array.nbytes)
        return array

    def _give_back(self, nbytes: int) -> None:
        self._used -= nbytes

    def host_view(self, mapped: Any) -> np.ndarray:
        view: np.ndarray = mapped._ary
        return view

    def event(self) -> Any:
        return _Event()

    def seconds_between(self, start: Any, end: Any) -> float:
        return float(end.seconds - start.seconds)

    def close(self, reset: bool) -> None:
        """The memory is Python's."""


def _of_the_driver(error: Exception) -> bool:
    """Whether an exception is one of CUDA's, of the many classes that numba.cuda lets through."""
    module = type(error).__module__
    return isinstance(error, _OutOfMemory) or ".cudadrv" in module or module.partition(".")[0] == "cuda"


def _explain(error: Exception, driver: str) -> str:
    text = " ".join(str(error).split())
    if "OUT_OF_MEMORY" in text:
        return "out of memory"
    if "UNSUPPORTED_PTX_VERSION" in text or "INSUFFICIENT_DRIVER" in text or "SYSTEM_DRIVER_MISMATCH" in text:
        return f"driver {driver} is too old for the installed CUDA toolkit: update it ({text})"
    if "CUDA driver library cannot be found" in text:
        return "no NVIDIA driver is installed (its library libcuda is not found)"
    return f"{text}; the GPU cannot be used any more"

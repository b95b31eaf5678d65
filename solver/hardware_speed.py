"""Measuring a machine: memory bandwidth of the CPU, and of the GPU, its link and hand-overs. About two seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.limits import read_rate
from ..runtime.memory import available_bytes
from .hardware import Hardware

if TYPE_CHECKING:
    from ..runtime.cuda.device import Device

CPU_BYTES = 256 << 20  # more than any cache of today's desktops
GPU_BYTES = 256 << 20
SMALL = 16 << 10  # bytes of a residual
ROUNDS = 6
REPEATS = 100


def cpu_read(threads: int, nbytes: int = CPU_BYTES) -> dict[int, float]:
    """Bytes a second read by 1, 2, 4, ... and `threads` threads: the best of a few rounds."""
    available = available_bytes()
    if available is not None:
        nbytes = max(1 << 20, min(nbytes, available // 8))
    counts = sorted({1 << power for power in range(threads.bit_length()) if 1 << power <= threads} | {threads})
    return {count: read_rate(count, nbytes, ROUNDS) for count in counts}


def gpu(device: Device, base: Hardware, nbytes: int = GPU_BYTES, repeats: int = REPEATS) -> Hardware:
    """`base` with the GPU's figures: reading, its link, the cost of a hand-over and of a launch. GPUError."""
    with device.check("measuring it"):
        return _gpu(device, base, nbytes, repeats)


def _gpu(device: Device, base: Hardware, nbytes: int, repeats: int) -> Hardware:
    nbytes = max(1 << 10, min(nbytes, device.memory().free // 8))
    host = device.pinned((nbytes,), np.uint8)
    host[:] = 1
    one, two = device.upload(host), device.allocate((nbytes,), np.uint8)
    small, small_host = device.allocate((min(SMALL, nbytes),), np.uint8), device.pinned((min(SMALL, nbytes),), np.uint8)

    def timed(work: Callable[[], object], times: int) -> float:
        def run() -> None:
            for _ in range(times):
                work()
            device.synchronize()

        run()  # what is loaded or compiled at first use
        return _best(run) / times

    stream = device.stream
    # a copy within the GPU's memory reads and writes as much
    read = 2 * nbytes / timed(lambda: two.copy_to_device(one, stream=stream), max(1, repeats // 10))
    whole = timed(lambda: one.copy_to_device(host, stream=stream), max(1, repeats // 10))

    def round_trip() -> None:
        small.copy_to_device(small_host, stream=stream)
        small.copy_to_host(small_host, stream=stream)
        stream.synchronize()

    latency = timed(lambda: small.copy_to_device(small_host, stream=stream), repeats)
    there_and_back = timed(round_trip, repeats)
    return replace(
        base,
        name=device.name,
        gpu_read=read,
        link_latency=latency,
        link_bandwidth=nbytes / max(whole - latency, whole / 2),
        sync=max(0.0, there_and_back / 2 - latency) + _wake(repeats),
        launch=timed(_launcher(device), repeats),
        gpu_total=device.memory().total,
        processors=device.processors,
    )


def _launcher(device: Device) -> Callable[[], None]:
    """Launches a kernel that does nothing."""
    from numba import cuda

    target = device.allocate((1,), np.int32)

    def nothing(x):  # type: ignore[no-untyped-def]
        if x.shape[0] > 1:
            x[0] = 0

    kernel = cuda.jit(nothing)
    return lambda: kernel[1, 1, device.stream](target)


def _wake(repeats: int) -> float:
    """Seconds until a waiting thread runs when another wakes it: the engine's two sides are threads."""
    there, back = threading.Semaphore(0), threading.Semaphore(0)

    def answer() -> None:
        for _ in range(repeats):
            there.acquire()
            back.release()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    times = []
    for _ in range(repeats):
        began = perf_counter()
        there.release()
        back.acquire()
        times.append(perf_counter() - began)
    thread.join()
    return float(np.median(times)) / 2


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few rounds: others use the machine too."""
    times = []
    for _ in range(ROUNDS):
        began = perf_counter()
        work()
        times.append(perf_counter() - began)
    return max(min(times), 1e-9)

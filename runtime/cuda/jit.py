"""CUDA kernels by name: written as Python in numba.cuda's language, compiled for the device when first asked for.

A module here builds one or more families: `build(family, variant, lanes) -> Program`. Names are as on the CPU: "norm",
"matmul:Q4_0". With NUMBA_ENABLE_CUDASIM=1 the same functions run as Python threads in Numba's simulator, which is how
they are tested where there is no GPU; `lanes` threads share a row, 32 (a warp) on a device and few in the simulator.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

WARP = 32
# Kernel family -> the module here that builds it. A module lists the variants of its families in VARIANTS.
FAMILIES = {
    "norm": "norm",
    "pack": "norm",
    "matmul": "matmul",
    "matmul_tile": "matmul",
    "ffn": "ffn",
    "ffn_tile": "ffn",
    "down": "down",
    "down_tile": "down",
    "merge": "down",
    "rope": "rope",
    "route": "route",
    "attention": "attention",
    "attention_merge": "attention",
    "argmax": "sample",
    "topk": "sample",
}


@dataclass(frozen=True)
class Program:
    """A kernel before compilation: the function, Numba's types of its arguments, and the threads of a block."""

    function: Callable[..., None]
    signature: tuple[Any, ...]
    threads: int


def simulated() -> bool:
    """Whether Numba runs kernels in its simulator; fixed when Numba is first imported."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


def names() -> list[str]:
    """Every kernel that can be asked for."""
    modules = {family: importlib.import_module(f".{module}", __package__) for family, module in FAMILIES.items()}
    return [f"{family}:{v}" if v else family for family, module in modules.items() for v in module.VARIANTS[family]]


def program(name: str, lanes: int | None = None) -> Program:
    """The program of a kernel; lanes: threads that share a row, a power of two (default: a warp; simulated, 1)."""
    family, _, variant = name.partition(":")
    module = importlib.import_module(f".{FAMILIES[family]}", __package__)
    result: Program = module.build(family, variant, lanes or (1 if simulated() else WARP))
    return result


class Kernel:
    """A compiled kernel: `kernel(grid, stream, *args)` launches it; grid is a number of blocks or a tuple of them."""

    def __init__(self, source: Program) -> None:
        from numba import cuda, types

        self.threads = source.threads
        if simulated():
            self._dispatcher = cuda.jit(source.function)
        else:
            from numba.cuda.core import config

            config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # small grids are no mistake here
            # Not linked at load: so it is the code that tests/cuda_ptx.py compiles and assembles.
            options: dict[str, Any] = {"fastmath": True, "lto": False, "launch_bounds": source.threads}
            self._dispatcher = cuda.jit(types.void(*source.signature), **options)(source.function)
        self._configured: dict[tuple[int | tuple[int, ...], int], Any] = {}

    def __call__(self, grid: int | tuple[int, ...], stream: Any, *args: Any) -> None:
        if simulated():
            self._dispatcher[grid, self.threads, stream](*args)
            return
        key = grid, id(stream)
        if key not in self._configured:  # Numba keeps 128 of them for all kernels, fewer than a deep model has
            self._configured[key] = self._dispatcher[grid, self.threads, stream]
        self._configured[key](*args)


@cache
def load(name: str, lanes: int | None = None) -> Kernel:
    """The compiled kernel of that name, for the current device."""
    return Kernel(program(name, lanes))

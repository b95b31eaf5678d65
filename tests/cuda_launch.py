"""Launching single CUDA kernels on NumPy arrays: in the simulator, or with HOTCOLD_TEST_GPU=1 on a GPU."""

from __future__ import annotations

from typing import Any

import cuda_simulator  # noqa: F401
import numpy as np

from hotcold.runtime.cuda import jit

# Threads that share a row: a warp on a GPU, few in the simulator.
LANES = [1, 2, 4] if jit.simulated() else [jit.WARP]


def filled(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """NaNs (or the lowest integer), for whoever reads what it should not or leaves what it should write."""
    return np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).min, dtype)


def launch(name: str, lanes: int, grid: int | tuple[int, ...], *args: Any) -> list[np.ndarray]:
    """Run a kernel once; all array arguments, copied back, in order. The arguments stay as they are."""
    from numba import cuda

    arrays = [cuda.to_device(arg) if isinstance(arg, np.ndarray) else None for arg in args]
    given = [arg if array is None else array for arg, array in zip(args, arrays, strict=True)]
    jit.load(name, lanes)(grid, 0, *given)
    cuda.synchronize()
    return [array.copy_to_host() for array in arrays if array is not None]

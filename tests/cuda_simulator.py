"""Makes Numba's CUDA simulator fast and safe enough for a test suite; importing this is enough.

It polls its threads, so that a barrier costs a few thread switches, of 5 ms each by default; and two threads that reach
a shared array at the same time may get one each.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np

from hotcold.runtime.cuda import jit

_LOCK = threading.Lock()


def _array(self: Any, shape: Any, dtype: Any, alignment: int | None = None) -> np.ndarray:
    """Stands in for FakeCUDAShared.array: one array a block and line, also when threads meet there."""
    from numba.cuda.np import numpy_support

    caller = sys._getframe(1)
    key = caller.f_code, caller.f_lineno
    with _LOCK:
        if key not in self._allocations:
            dtype = dtype if isinstance(dtype, type) else numpy_support.as_dtype(dtype)
            self._allocations[key] = np.empty(shape, dtype)
        return self._allocations[key]


if jit.simulated():
    from numba.cuda.simulator import kernelapi

    kernelapi.FakeCUDAShared.array = _array
    sys.setswitchinterval(1e-5)

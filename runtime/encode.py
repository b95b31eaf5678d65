"""Weights into GGUF blocks, with the kernels of cpu/encode.py: for whoever writes a file."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import ParameterError
from ..formats.types import GGMLType
from .cpu import jit
from .cpu.encode_layout import DECODE_WORST, ENCODE_SCRATCH, Decode, Encode
from .cpu.layout import Row
from .cpu.threads import ThreadPool, default_threads
from .memory import aligned

ENCODED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_CHUNK = 1 << 20  # weights decoded, then encoded, at a time: they stay in the cache
_LARGEST = {"F16": np.float32(65520.0), "BF16": np.float32(3.3961776e38)}  # what rounds to infinity


class NotFiniteError(ParameterError):
    """Weights that are NaN or infinite, or that the wanted type cannot hold; whoever knows the tensor names it."""


class Encoder:
    """Threads that turn weights of one type into another's blocks; use with `with`.

    progress gets a line while kernels are compiled.
    """

    def __init__(self, n_threads: int | None = None, progress: Callable[[str], None] | None = None) -> None:
        self.n_threads = n_threads or default_threads()
        self._progress = progress
        self._pool = ThreadPool(jit.load(["walk"], progress=progress)["walk"], self.n_threads)
        self._scratch = aligned(self.n_threads * ENCODE_SCRATCH)
        self._worst = aligned(self.n_threads * DECODE_WORST)
        self._floats = aligned(0)
        self._records = aligned(2 * 256, zero=True).view(np.int64).reshape(2, -1)
        self._done = aligned(128, zero=True)
        self._rows = np.zeros((2, len(Row)), np.int64)
        for i, record in enumerate(self._records):
            record[Decode.done // 8] = self._done.ctypes.data + 64 * i

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads."""
        self._pool.close()

    def encode(
        self, kind: str, values: NDArray[np.float32], importance: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """float32 [rows, k] as blocks, uint8 [rows, row_bytes]; see `encode`."""
        values = np.ascontiguousarray(values, np.float32)
        if values.ndim != 2:
            raise ParameterError(f"values to encode: got {values.ndim} dimensions, wanted [rows, k]")
        rows, k = values.shape
        out = np.empty((rows, row_bytes(kind, k)), np.uint8)
        self.convert("F32", values.ctypes.data, kind, out.ctypes.data, rows, k, importance)
        return out

    def convert(
        self,
        source: str,
        address: int,
        kind: str,
        out: int,
        rows: int,
        k: int,
        importance: NDArray[np.float32] | None = None,
    ) -> None:
        """Turn `rows` rows of k weights, of type `source` at an address, into type `kind` at another; see `encode`."""
        if importance is not None:
            importance = np.ascontiguousarray(importance, np.float32)
            if importance.shape != (k,) or not np.isfinite(importance).all() or (importance < 0).any():
                raise ParameterError(f"importance: got {importance.shape}, wanted {k} numbers, none below 0")
        names = [f"decode:{source}"] + ([] if kind == "F32" else [f"encode:{kind}"])
        self._run(names, source, address, rows, k, out, row_bytes(kind, k), importance)
        top = self._top()
        if top >= _LARGEST.get(kind, np.inf):
            raise NotFiniteError(f"weights of up to {top:.4g}, beyond the range of {kind}")

    def check(self, source: str, address: int, rows: int, k: int) -> None:
        """NotFiniteError if there is NaN or infinity among rows of k weights."""
        self._run([f"decode:{source}"], source, address, rows, k, None, 0, None)
        self._top()

    def _run(
        self,
        names: list[str],
        source: str,
        address: int,
        rows: int,
        k: int,
        out: int | None,
        out_bytes: int,
        importance: NDArray[np.float32] | None,
    ) -> None:
        """Decode, then encode, a few rows at a time; names: of the kernels. out None: decode into scratch alone."""
        kernels = jit.load(names, progress=self._progress)
        step = min(rows, max(1, _CHUNK // max(k, 1)))
        source_bytes = row_bytes(source, k)
        scratch = out is None or len(names) == 2
        if scratch and self._floats.nbytes < step * k * 4:
            self._floats = aligned(step * k * 4)
        self._worst[:] = 0
        for first in range(0, rows, max(step, 1)):
            to = 0 if out is None else out + first * out_bytes
            fields = {
                "k": k,
                "rows": min(step, rows - first),
                "w": address + first * source_bytes,
                "row_bytes": source_bytes,
                "worst": self._worst.ctypes.data,
                "x": self._floats.ctypes.data,
                "importance": 0 if importance is None else importance.ctypes.data,
                "scratch": self._scratch.ctypes.data,
                "scratch_bytes": ENCODE_SCRATCH,
            }
            self._set(0, Decode, kernels[names[0]], {**fields, "out": fields["x"] if scratch else to})
            if len(names) == 2:
                self._set(1, Encode, kernels[names[1]], {**fields, "out": to})
            self._pool.run(self._rows.ctypes.data, len(names), 0)

    def _set(self, i: int, layout: Any, kernel: int, fields: dict[str, int]) -> None:
        # A thread that is late may still walk the last tape and look at counts: they are at one place all the time.
        record = self._records[i]
        for name in layout._fields[2:]:
            record[getattr(layout, name) // 8] = fields.get(name, 0)
        record[layout.counter // 8] = self._records[0, 0]  # of the turn that begins
        self._rows[i, :3] = kernel, record.ctypes.data, 1

    def _top(self) -> float:
        """The largest |weight| of the last run; NotFiniteError where that is no number."""
        bits = self._worst.view(np.int32).reshape(self.n_threads, -1)[:, 0]
        top = float(bits.max(keepdims=True).view(np.float32)[0])
        if not np.isfinite(top):
            raise NotFiniteError("weights that are NaN or infinite")
        return top


def row_bytes(kind: str, k: int) -> int:
    """Bytes of a row of k weights; ParameterError where blocks do not divide it."""
    form = GGMLType[kind]
    if k % form.block_size:
        raise ParameterError(f"{kind}: got rows of {k} weights, wanted a multiple of {form.block_size}")
    return k // form.block_size * form.type_size


def encode(
    kind: str,
    values: NDArray[np.float32],
    importance: NDArray[np.float32] | None = None,
    n_threads: int | None = None,
) -> NDArray[np.uint8]:
    """float32 [rows, k] as rows of blocks of the type named `kind` (one of ENCODED), uint8 [rows, row_bytes].

    importance: float32 [k], none negative: what the squared error of a column counts. ParameterError: k is no multiple
    of the type's blocks; NotFiniteError (one of those): NaN, infinity, or a weight beyond the type's range.
    """
    if kind not in ENCODED:
        raise ParameterError(f"type to encode: got {kind!r:.20}, wanted one of {', '.join(ENCODED)}")
    with Encoder(n_threads) as encoder:
        return encoder.encode(kind, values, importance)

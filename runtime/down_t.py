"""ffn_down by neurons (`ffn_down_t`), made at load for a model whose section does not bring it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from ..formats.errors import UnsupportedError
from ..formats.types import GGMLType
from .cpu import jit
from .cpu.buffers import GROUPS
from .cpu.layout import Row, Transpose
from .cpu.threads import ThreadPool
from .memory import aligned
from .tensors import Tensors

_FLOATS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


def add_down_t(
    tensors: Tensors, layers: Iterable[int], n_threads: int, progress: Callable[[str], None] | None = None
) -> None:
    """Add `blk.N.ffn_down_t.weight` [n_embd, n_ff] of the layers: float types as they are, quantised ones as Q8_0.

    Of a mixture of experts, `blk.N.ffn_down_exps_t.weight` [n_embd, n_ff of one, n_expert]. F16 stands in for Q8_0
    where n_embd is no multiple of its blocks. UnsupportedError names a tensor whose type no kernel computes.
    """
    names = [f"blk.{layer}.ffn_down" for layer in layers]
    names = [f"{name}_exps" if f"{name}_exps.weight" in tensors else name for name in names]
    kinds = {_kind(tensors, f"{name}.weight") for name in names} - set(_FLOATS)
    kernels = jit.load(["walk", *(f"transpose:{kind}" for kind in sorted(kinds))], progress=progress) if kinds else {}
    for name in names:
        info = tensors.info(f"{name}.weight")
        n_ff, n_embd, *experts = info.shape
        n, kind = math.prod(experts), info.type
        if kind.name in _FLOATS:
            data = tensors.data(f"{name}.weight").view(_FLOATS[kind.name]).reshape(n, n_embd, n_ff)
            made = np.ascontiguousarray(data.swapaxes(1, 2)).view(np.uint8).reshape(-1)
        elif n_embd % GGMLType.Q8_0.block_size:
            data = tensors.dequantized(f"{name}.weight").swapaxes(-1, -2)
            made = data.astype(np.float16, order="C").view(np.uint8).reshape(-1)
            kind = GGMLType.F16
        else:
            made = aligned(n * n_ff * n_embd // 32 * 34)
            fields = {"k": n_ff, "n": n_embd, "row_bytes": info.row_size}
            first, turned = tensors.address(f"{name}.weight"), made.ctypes.data
            places = [(first + i * info.nbytes // n, turned + i * len(made) // n) for i in range(n)]
            _run(kernels["walk"], kernels[f"transpose:{kind.name}"], fields, places, n_threads)
            kind = GGMLType.Q8_0
        tensors.add(f"{name}_t.weight", (n_embd, n_ff, *experts), kind, made)


def _kind(tensors: Tensors, name: str) -> str:
    kind = tensors.info(name).type.name
    if kind not in GROUPS:
        raise UnsupportedError(
            f"{tensors.source(name)}: tensor {name} has type {kind}, which hotcold does not compute; "
            f"supported: {', '.join(GROUPS)}"
        )
    return kind


def _run(walker: int, kernel: int, fields: dict[str, int], places: list[tuple[int, int]], n_threads: int) -> None:
    """Walk a tape of a row for each matrix. fields: of all; places: addresses of each, and of its transpose."""
    need = 32 * fields["k"] * 4 + 64
    scratch, done = aligned(n_threads * need), aligned(64, zero=True)
    fields |= {"scratch": scratch.ctypes.data, "scratch_bytes": need, "done": done.ctypes.data}
    size = -(-len(Transpose) // 8) * 8  # whole cache lines
    records = aligned(len(places) * size * 8, zero=True).view(np.int64).reshape(-1, size)
    rows = np.zeros((len(places), len(Row)), np.int64)
    for record, row, (w, out) in zip(records, rows, places, strict=True):
        for name, value in (fields | {"w": w, "out": out}).items():
            record[getattr(Transpose, name) // 8] = value
        row[:2] = kernel, record.ctypes.data
    rows[-1, Row.barrier // 8] = 1
    pool = ThreadPool(walker, n_threads)
    try:
        pool.run(rows.ctypes.data, len(rows), 0)
    finally:
        pool.close()

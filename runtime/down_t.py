"""ffn_down by neurons (`ffn_down_t`), made at load for a model whose section does not bring it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from ..formats.errors import UnsupportedError
from ..formats.types import GGMLType
from .cpu import jit
from .cpu.buffers import GROUPS
from .cpu.layout import Transpose
from .cpu.once import run_once
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
            places = [{"w": first + i * info.nbytes // n, "out": turned + i * len(made) // n} for i in range(n)]
            ops = [(kernels[f"transpose:{kind.name}"], Transpose, fields | place) for place in places]
            run_once(kernels["walk"], ops, n_threads, 32 * n_ff * 4 + 64)
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

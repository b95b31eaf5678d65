"""Loading weights: as they are in the mapped file, or copied into bands, the form that dense products like best.

A copy costs memory, as much as the matrices take in the file (whose own pages the system may then drop), and the time
to read them at load. It is read in order, in pages of 2 MiB, by kernels with the same sums for a token and a prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from ..formats.errors import ParameterError
from .cpu import isa, jit
from .cpu.buffers import GROUPS
from .cpu.layout import Weave
from .cpu.once import run_once
from .graph import Graph
from .memory import available_bytes, large_pages
from .tensors import Tensors

LOADS = ("auto", "mmap", "copy")
_SHARE = 0.75  # of the free memory, the most that a copy not asked for may take
_LINE = 64
_BATCH = 256 << 20  # bytes
_SCRATCH = 16 << 10  # bytes a thread, for 256 columns of a band


def check_load(load: str) -> str:
    """`load` as it is; ParameterError if it is none of LOADS."""
    if load not in LOADS:
        raise ParameterError(f"load: got {load!r:.60}, wanted {', '.join(LOADS[:-1])} or {LOADS[-1]}")
    return load


def wanted_bands(graph: Graph, tensors: Tensors) -> list[str]:
    """Matrices of a graph's CPU part that can be in bands: quantised, in a file, and never read by single rows."""
    readers: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.weight and node.unit == "cpu":
            readers.setdefault(node.weight, set()).add(node.op)
    return [
        name
        for name, ops in readers.items()
        if ops <= {"matmul", "embed"}
        and "matmul" in ops
        and not tensors.made(name)
        and GROUPS.get(tensors.info(name).type.name, 0)
    ]


def add_bands(
    graph: Graph,
    tensors: Tensors,
    load: str,
    n_threads: int,
    other_bytes: int,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Copy a graph's matrices into bands, unless `load` is "mmap", or it is "auto" and memory is short.

    other_bytes: that the engine will need beside them. ParameterError where a copy that was asked for cannot fit.
    """
    if load == "mmap":
        return
    names, lanes = wanted_bands(graph, tensors), isa.LEVELS[isa.choose()].lanes
    sizes = {name: _band_bytes(tensors, name, lanes) for name in names}
    total, free = sum(sizes.values()), available_bytes()
    if not total:
        return
    needs = f"a copy of the weights takes {total / 2**30:.1f} GiB"
    try:
        if free is not None and total > (free if load == "copy" else max(0.0, _SHARE * (free - other_bytes))):
            raise MemoryError(f"{free / 2**30:.1f} GiB are free")
        memory = large_pages(total)
    except (MemoryError, OSError) as error:
        if load == "copy":
            raise ParameterError(f"load: got copy, but {needs} and {error}; use mmap") from None
        warnings.warn(f"weights are read from the mapped file, which is slower: {needs} and {error}", stacklevel=2)
        return
    kinds = {name: tensors.info(name).type.name for name in names}
    kernels = jit.load(["walk", *sorted({f"weave:{kind}" for kind in kinds.values()})], progress=progress)
    at, begun = 0, 0
    batch: list[str] = []  # woven at a time, so that not all of the file has to be in memory too
    for name in names:
        tensors.add_bands(name, memory[at : at + sizes[name]])
        at += sizes[name]
        batch.append(name)
        if at - begun < _BATCH and at < total:
            continue
        ops = [(kernels[f"weave:{kinds[each]}"], Weave, _fields(tensors, each)) for each in batch]
        run_once(kernels["walk"], ops, n_threads, _SCRATCH)
        for each in batch:
            tensors.release(each)
        batch, begun = [], at
        if progress and total > _BATCH:
            progress(f"loading weights {100 * at // total}%")


def _fields(tensors: Tensors, name: str) -> dict[str, int]:
    info, to = tensors.info(name), tensors.bands(name)
    assert to is not None
    return {"w": tensors.address(name), "out": to, "k": info.shape[0], "n": info.n_rows}


def _band_bytes(tensors: Tensors, name: str, lanes: int) -> int:
    info = tensors.info(name)
    whole = -(-info.n_rows // lanes) * lanes * info.row_size
    return -(-whole // _LINE) * _LINE

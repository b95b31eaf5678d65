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
_LARGE = 2**30  # bytes of weights that take long enough to say how far it is
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
        if ops <= {"matmul", "embed"} and "matmul" in ops and GROUPS.get(tensors.info(name).type.name, 0)
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
    if free is not None and total > (free if load == "copy" else max(0.0, _SHARE * (free - other_bytes))):
        needs = f"a copy of the weights takes {total / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
        if load == "copy":
            raise ParameterError(f"load: got copy, but {needs}; use mmap")
        warnings.warn(f"weights are read from the mapped file, which is slower: {needs}", stacklevel=2)
        return
    kinds = {name: tensors.info(name).type.name for name in names}
    kernels = jit.load(["walk", *sorted({f"weave:{kind}" for kind in kinds.values()})], progress=progress)
    memory, at, told = large_pages(total), 0, 0
    for name in names:
        if progress and total >= _LARGE and (tenth := 10 * at // total) > told:
            told = tenth
            progress(f"loading weights {10 * told}%")
        info, place = tensors.info(name), memory[at : at + sizes[name]]
        at += sizes[name]
        fields = {"w": tensors.address(name), "out": place.ctypes.data, "k": info.shape[0], "n": info.n_rows}
        run_once(kernels["walk"], [(kernels[f"weave:{kinds[name]}"], Weave, fields)], n_threads, _SCRATCH)
        tensors.release(name)
        tensors.add_bands(name, place)


def _band_bytes(tensors: Tensors, name: str, lanes: int) -> int:
    info = tensors.info(name)
    whole = -(-info.n_rows // lanes) * lanes * info.row_size
    return -(-whole // _LINE) * _LINE

"""LoRA adapters at work: beside a matmul with an adapted matrix, two thin ones whose product is added to its result."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import ParameterError, UnsupportedError
from ..formats.gguf import GGUFFile
from ..formats.gguf_header import show
from ..formats.lora import Adapter, Factors
from ..formats.types import GGMLType
from .graph import Graph, Node
from .tensors import Tensors

Wanted = Iterable["str | os.PathLike[str] | tuple[str | os.PathLike[str], float]"]


def check(lora: Wanted) -> list[tuple[Path, float]]:
    """Adapters as paths and scales, 1 where none is given; ParameterError for anything else."""
    found = []
    if isinstance(lora, (str, bytes, os.PathLike)):
        raise ParameterError(f"lora: got {lora!r:.60}, wanted a list of paths or of pairs (path, scale)")
    for item in lora:
        path, scale = item if isinstance(item, tuple) and len(item) == 2 else (item, 1.0)
        if not isinstance(path, (str, os.PathLike)):
            raise ParameterError(f"lora: got {item!r:.60}, wanted a path or a pair (path, scale)")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < math.inf:
            raise ParameterError(f"lora: got a scale of {scale!r:.40} for {path}, wanted a finite number")
        found.append((Path(path), float(scale)))
    return found


@dataclass(frozen=True)
class Change:
    """What adapters together add to a matrix, b @ a, the scales in b; path: the last of them, for messages."""

    factors: Factors
    path: Path


def relufied(lora: Sequence[tuple[Path, float]]) -> Path | None:
    """The adapter among some that changes the activation, which cannot run beside the matrices; None if none does.

    Raises UnsupportedError for two such, ParameterError where its scale is not 1, and Adapter's errors.
    """
    found = None
    for path, scale in lora:
        with Adapter(path) as adapter:
            if adapter.activation is None:
                continue
        if scale != 1:
            raise ParameterError(f"lora: got a scale of {scale:g} for {path}, wanted 1, as it changes the activation")
        if found is not None:
            raise UnsupportedError(f"lora: {found} and {path} both change the activation; wanted one of them")
        found = path
    return found


def changes(model: GGUFFile, lora: Sequence[tuple[Path, float]]) -> dict[str, Change]:
    """What adapters add to the matrices of a model, by the names that the decoder knows; their ranks add up.

    FormatError or UnsupportedError where one of them is not for this model, or changes the activation.
    """
    if lora and (path := relufied(lora)):
        raise UnsupportedError(
            f"{path}: changes the activation, so it has to be merged first (`hotcold convert --lora`)"
        )
    return {
        own: Change(Factors(change.factors.a, change.factors.b[rows]), change.path)
        for name, change in collect(model, lora).items()
        for own, rows in _rows(model, name)
    }


def collect(model: GGUFFile, lora: Sequence[tuple[Path, float]]) -> dict[str, Change]:
    """What adapters of any kind add to a model's matrices, by the names of its tensors; errors as of Adapter.check."""
    found: dict[str, Change] = {}
    with ExitStack() as stack:
        for path, scale in lora:
            adapter = stack.enter_context(Adapter(path))
            adapter.check(model)
            for name in adapter.ranks:
                if name == "token_embd.weight" or (name in model.tensors and len(model.tensors[name].shape) > 2):
                    what = "experts" if name.endswith("_exps.weight") else "embeddings"
                    raise UnsupportedError(f"{path}: tensor {show(name)}: adapters of {what} are not supported")
                factors, by = adapter.factors(name), adapter.scale(scale, name)
                a, b = factors.a, _scaled(path, factors.b, by)
                if before := found.get(name):
                    a = np.concatenate([before.factors.a, a])
                    b = np.concatenate([before.factors.b, b], axis=1)
                found[name] = Change(Factors(a, b), path)
    return found


def _scaled(path: Path, b: NDArray[np.float32], by: float) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (b * np.float64(by)).astype(np.float32)
    if not np.isfinite(scaled).all():
        raise ParameterError(f"lora: got a scale for {path} that makes its weights infinite; wanted a smaller one")
    return scaled


def _rows(model: GGUFFile, name: str) -> Iterator[tuple[str, slice]]:
    """The matrices that the decoder knows as rows of one, or itself."""
    whole = model.tensors[name]
    parts = [info for info in model.rows.values() if 0 <= info.offset - whole.offset < whole.nbytes]
    if not parts:
        yield name, slice(None)
    for info in parts:
        first = (info.offset - whole.offset) // whole.row_size
        yield info.name, slice(first, first + info.n_rows)


def adapt(graph: Graph, tensors: Tensors, changed: dict[str, Change]) -> Graph:
    """A graph with the adapters' matmuls, whose weights (float32) are added to the tensors.

    What is multiplied by a matrix [n_out, n_in] is first by a [rank, n_in], then by b [n_out, rank]. Neighbouring
    matmuls of one value have theirs together, so that threads meet twice for all of them. UnsupportedError for a
    matrix that the graph uses otherwise than in a matmul on the CPU.
    """
    for name, change in changed.items():
        users = [node for node in graph.nodes if node.weight == name or node.up == name]
        if not users or any(node.op != "matmul" or node.branch or node.unit != "cpu" for node in users):
            raise UnsupportedError(
                f"{change.path}: {show(name)} is adapted, which a sparse mode or a GPU cannot compute; "
                f"wanted a dense model on the CPU (sparsity dense, no VRAM budget)"
            )
        _add(tensors, f"{name}.lora_a", change.factors.a)
        _add(tensors, f"{name}.lora_b", change.factors.b)
    adapted, group = Graph(widths=dict(graph.widths)), list[Node]()
    for node in graph.nodes:
        if group and (node.op != "matmul" or node.reads[0] != group[0].reads[0]):
            _append(adapted, group, changed)
            group = []
        adapted.add(node)
        if node.op == "matmul" and node.weight in changed:
            group.append(node)
    _append(adapted, group, changed)
    return adapted


def _append(graph: Graph, group: list[Node], changed: dict[str, Change]) -> None:
    """The thin matmuls of some nodes that read one value: all first halves, what packs their results, the others."""
    halves: list[list[Node]] = [[], [], []]
    for i, node in enumerate(group):
        rank, to = len(changed[node.weight].factors.a), node.writes[0]
        thin, packed = f"lora{i}:{rank}", f"lora{i}.packed:{rank}"
        graph.widths |= {thin: rank, packed: rank}
        first = Node("matmul", node.reads[:1], (thin,), f"{node.weight}.lora_a", layer=node.layer, rows=node.rows)
        halves[0].append(first)
        halves[1].append(replace(first, op="pack", reads=(thin,), writes=(packed,), weight=""))
        halves[2].append(replace(first, reads=(packed, to), writes=(to,), weight=f"{node.weight}.lora_b"))
    for nodes in halves:
        for node in nodes:
            graph.add(node)


def _add(tensors: Tensors, name: str, values: NDArray[np.float32]) -> None:
    tensors.add(name, values.shape[::-1], GGMLType.F32, np.ascontiguousarray(values).view(np.uint8).reshape(-1))

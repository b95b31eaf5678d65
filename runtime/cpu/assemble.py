"""Assembling a tape: ops in order become rows and argument records, with barriers where one op waits for another."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from ..graph import Node, memory_of
from ..memory import ALIGNMENT as CACHE_LINE
from ..memory import aligned
from . import jit
from .buffers import Buffers
from .layout import Choice, Row

_SLOTS = 32  # int64 slots of a record


class Tape:
    """rows int64 [n, len(Row)] and records int64 [n, _SLOTS], with the buffers that they point into.

    nodes: that each row was lowered from. activations: by layer, the row that begins its FFN's activation; all before
    it is done when it is reached.
    """

    def __init__(
        self,
        rows: np.ndarray,
        records: np.ndarray,
        counts: np.ndarray,
        buffers: dict[str, np.ndarray],
        nodes: list[Node],
        activations: list[int],
    ) -> None:
        self.rows, self.records, self.counts, self.buffers = rows, records, counts, buffers
        self.nodes, self.activations = nodes, activations


class Assembly:
    """Ops as they are emitted, and what they touch, from which the barriers follow."""

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = buffers
        self.ops: list[tuple[str, dict[str, Any], Any, Node]] = []
        self.barriers: list[bool] = []
        self.dirty: set[str] = set()  # written since the last barrier
        self.busy: set[str] = set()  # read since the last barrier

    def emit(
        self, kernel: str, layout: Any, node: Node, reads: tuple[str, ...], writes: tuple[str, ...], **fields: Any
    ) -> None:
        """Append an op, after a barrier if it touches what ops since the last one wrote, or writes what they read."""
        touched, changed = {memory_of(name) for name in reads}, {memory_of(name) for name in writes}
        if self.dirty & (touched | changed) or self.busy & changed:
            self.barrier()
        self.dirty.update(changed)
        self.busy.update(touched)
        self.ops.append((kernel, fields, layout, node))
        self.barriers.append(False)

    def barrier(self) -> None:
        """Whatever comes next begins when all ops so far are done."""
        if self.barriers:
            self.barriers[-1] = True
        self.dirty.clear()
        self.busy.clear()

    def tape(self, activations: list[int], progress: jit.Progress | None) -> tuple[Tape, int]:
        """The tape, and the walker's address."""
        kernels = jit.load(["walk", *(kernel for kernel, _, _, _ in self.ops)], progress=progress)
        self.barriers[-1] = True
        records = aligned(len(self.ops) * _SLOTS * 8, zero=True).view(np.int64).reshape(-1, _SLOTS)
        rows = np.zeros((len(self.ops), len(Row)), np.int64)
        counts = aligned(len(self.ops) * CACHE_LINE, zero=True)  # of finished chunks, one a segment
        segment = 0
        for i, (kernel, fields, layout, node) in enumerate(self.ops):
            fields["done"] = counts.ctypes.data + segment * CACHE_LINE
            for name, value in fields.items():
                if isinstance(value, float):
                    value = struct.unpack("q", struct.pack("d", value))[0]
                records[i, getattr(layout, name) // 8] = value
            when = self.buffers.choice(node.layer) + Choice.sparse if node.branch else 0
            rows[i] = kernels[kernel], records[i].ctypes.data, self.barriers[i], when, node.branch == "sparse", 0
            segment += self.barriers[i]
        nodes = [node for *_, node in self.ops]
        return Tape(rows, records, counts, self.buffers.arrays, nodes, activations), kernels["walk"]

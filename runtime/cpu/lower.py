"""Lowering: the CPU nodes of a graph become a tape, its argument records and its buffers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from ...formats.config import ModelConfig
from ...formats.errors import UnsupportedError
from ...formats.gguf import GGUFFile
from ..graph import Graph, Node
from ..kv_cache import KVCache
from ..memory import ALIGNMENT as CACHE_LINE
from ..memory import aligned
from . import jit
from .layout import (
    KV_BLOCK,
    PANEL_ROWS,
    Attention,
    Embed,
    MatMul,
    Norm,
    Pack,
    Rope,
    Row,
    Step,
    packed_bytes,
    panel_bytes,
)

FLOATS = ("F32", "F16", "BF16")
GROUPS = dict.fromkeys(FLOATS, 0) | dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K"), 32)
GROUPS |= dict.fromkeys(("Q2_K", "Q3_K", "Q6_K"), 16)
_SLOTS = 24  # int64 slots of a record
_PANEL_CACHE = 512 << 10  # bytes of unpacked weights that a thread keeps at hand (half of a common L2 cache)
_CHUNK_BYTES = 48 << 10  # of weight rows that a thread takes at a time, at least: a few microseconds' reading
_SEGMENT = 512  # activations that a thread packs at a time


class Tape:
    """rows int64 [n, len(Row)] and records int64 [n, _SLOTS], with the buffers that they point into.

    activations: by layer, the row that begins its FFN's activation; all before it is done when it is reached.
    """

    def __init__(
        self,
        rows: np.ndarray,
        records: np.ndarray,
        counts: np.ndarray,
        buffers: dict[str, np.ndarray],
        activations: list[int],
    ) -> None:
        self.rows, self.records, self.counts, self.buffers = rows, records, counts, buffers
        self.activations = activations


class _Lowering:
    def __init__(
        self,
        graph: Graph,
        file: GGUFFile,
        config: ModelConfig,
        cache: KVCache,
        rope_table: int,
        n_threads: int,
        sizes: dict[str, int],
    ) -> None:
        self.graph, self.file, self.config, self.cache = graph, file, config, cache
        self.rope_table, self.n_threads, self.sizes = rope_table, n_threads, sizes
        self.ops: list[tuple[str, dict[str, Any], Any]] = []
        self.activations: list[int] = []
        self.barriers: list[bool] = []
        self.buffers: dict[str, np.ndarray] = {}
        self.dirty: set[str] = set()  # written since the last barrier
        self.busy: set[str] = set()  # read since the last barrier
        # Of each value: types of the weights that it meets, and whether the node that makes it packs it.
        self.kinds: dict[str, set[str]] = {}
        self.prepacked: set[str] = set()
        for node in graph.nodes:
            if node.op == "matmul":
                self.kinds.setdefault(node.reads[0], set()).add(self.kind(node.weight))
            elif node.op in ("norm", "activate"):
                self.prepacked.update(node.writes)
        self.scratch_bytes = self._scratch()
        self.buffers["scratch"] = aligned(n_threads * self.scratch_bytes)
        lowerings: dict[str, Callable[[Node], None]] = {
            "embed": self.embed,
            "norm": self.norm,
            "matmul": self.matmul,
            "rope": self.rope,
            "attention": self.attention,
            "activate": self.activate,
        }
        for node in graph.nodes:
            lowerings[node.op](node)

    # --- buffers ---

    def kind(self, tensor: str) -> str:
        """Type name of a weight, refused if no kernel computes it."""
        name = self.file.tensors[tensor].type.name
        if name not in GROUPS:
            raise UnsupportedError(
                f"{self.file.path}: tensor {tensor} has type {name}, which hotcold does not compute; "
                f"supported: {', '.join(GROUPS)}"
            )
        return name

    def floats(self, value: str) -> int:
        """Address of a float32 value [tokens, width]."""
        if value not in self.buffers:
            n_rows = self.sizes["outputs" if value == "logits" else "tokens"]
            self.buffers[value] = aligned(n_rows * self.graph.widths[value] * 4)
        return self.buffers[value].ctypes.data

    def packed(self, value: str) -> dict[str, int]:
        """Addresses of a packed value's arrays, and which of them its readers need."""
        kinds = self.kinds.get(value, set())
        out = {"quantised": int(any(k not in FLOATS for k in kinds)), "floats": int(any(k in FLOATS for k in kinds))}
        for want, quantised in (("quantised", True), ("floats", False)):
            if out[want]:
                for name, nbytes in packed_bytes(self.graph.widths[value], self.sizes["tokens"], quantised).items():
                    key = f"{value}.{name}"
                    if key not in self.buffers:
                        self.buffers[key] = aligned(nbytes, zero=True)
                    out[name] = self.buffers[key].ctypes.data
        return out

    def vector(self, tensor: str) -> int:
        """Address of a float32 vector (norm weights, biases); other float types are converted once."""
        info = self.file.tensors[tensor]
        if info.type.name == "F32":
            return self.file.address(tensor)
        key = f"vector.{tensor}"
        if key not in self.buffers:
            self.buffers[key] = np.ascontiguousarray(self.file.dequantized(tensor), np.float32)
        return self.buffers[key].ctypes.data

    def _scratch(self) -> int:
        """Scratch bytes a thread: the largest of what any op needs."""
        c, need = self.config, 0
        for node in self.graph.nodes:
            if node.op == "matmul":
                info = self.file.tensors[node.weight]
                need = max(need, _PANEL_CACHE, panel_bytes(info.shape[0], GROUPS[self.kind(node.weight)]))
        need = max(need, max(self.graph.widths.values()) * 4)
        attention = 128 + 4 * KV_BLOCK * 4 * 2 + 4 * (c.head_dim_v + PANEL_ROWS) * 4 + 4 * c.head_dim_k * 4
        return -(-(max(need, attention) + 4096) // 4096) * 4096

    def scratch(self) -> dict[str, int]:
        return {"scratch": self.buffers["scratch"].ctypes.data, "scratch_bytes": self.scratch_bytes}

    # --- rows ---

    def emit(self, kernel: str, layout: Any, reads: tuple[str, ...], writes: tuple[str, ...], **fields: Any) -> None:
        """Append an op, after a barrier if it touches what ops since the last one wrote, or writes what they read."""
        if self.dirty & {*reads, *writes} or self.busy & set(writes):
            self.barriers[-1] = True
            self.dirty.clear()
            self.busy.clear()
        self.dirty.update(writes)
        self.busy.update(reads)
        self.ops.append((kernel, fields, layout))
        self.barriers.append(False)

    def count(self, node: Node) -> int:
        return Step.n_out if node.rows == "outputs" else Step.n_tok

    def embed(self, node: Node) -> None:
        info = self.file.tensors[node.weight]
        self.emit(
            f"embed:{self.kind(node.weight)}",
            Embed,
            node.reads,
            node.writes,
            w=self.file.address(node.weight),
            out=self.floats(node.writes[0]),
            k=info.shape[0],
            row_bytes=info.row_size,
        )

    def norm(self, node: Node) -> None:
        self.emit(
            "norm",
            Norm,
            node.reads,
            node.writes,
            src=self.floats(node.reads[0]),
            weight=self.vector(node.weight),
            k=self.graph.widths[node.reads[0]],
            eps=float(self.config.norm_eps),
            rows=Step.out_rows if node.rows == "outputs" else 0,
            count=self.count(node),
            **self.scratch(),
            **self.packed(node.writes[0]),
        )

    def pack(self, value: str, node: Node, kernel: str = "pack", second: int = 0, src: str = "") -> None:
        width = self.graph.widths[value]
        reads = node.reads if src else (value,)
        writes = node.writes if src else (f"{value}.packed",)
        self.emit(
            kernel,
            Pack,
            reads,
            writes,
            src=self.floats(src or value),
            second=second,
            k=width,
            stride=width,
            count=self.count(node),
            segment=_SEGMENT,
            **self.packed(value),
        )

    def activate(self, node: Node) -> None:
        gate, up = node.reads
        self.activations.append(len(self.ops))
        self.pack(node.writes[-1], node, f"activate:{self.config.activation}", self.floats(up), gate)

    def matmul(self, node: Node) -> None:
        value, kind = node.reads[0], self.kind(node.weight)
        info = self.file.tensors[node.weight]
        k, n = info.shape[0], info.n_rows
        source = value
        if value not in self.prepacked:
            source = f"{value}.packed"
            self.pack(value, node)
        packed = {key: at for key, at in self.packed(value).items() if key.startswith("x")}
        per_chunk = max(_CHUNK_BYTES // info.row_size, -(-n // (self.n_threads * 8)))
        panels = max(1, min(_PANEL_CACHE // panel_bytes(k, GROUPS[kind]), -(-n // (PANEL_ROWS * self.n_threads * 4))))
        self.emit(
            f"matmul:{kind}",
            MatMul,
            (source, *node.reads[1:]),
            node.writes,
            w=self.file.address(node.weight),
            out=self.floats(node.writes[0]),
            bias=self.vector(node.bias) if node.bias else 0,
            k=k,
            n=n,
            row_bytes=info.row_size,
            out_stride=n,
            count=self.count(node),
            add=int(node.adds),
            chunk=min(per_chunk, -(-n // self.n_threads)),
            panels=panels,
            **self.scratch(),
            **packed,
        )

    def heads(self, layer: int) -> dict[str, int]:
        c = self.config
        keys, values = self.cache.layer(layer)
        return {
            "n_head": c.n_head,
            "n_kv": c.n_head_kv,
            "dim_k": c.head_dim_k,
            "dim_v": c.head_dim_v,
            "keys": keys,
            "values": values,
        }

    def rope(self, node: Node) -> None:
        q, k, v = (self.floats(name) for name in node.reads)
        self.emit(
            f"rope:{self.config.rope_style}",
            Rope,
            node.reads,
            node.writes,
            q=q,
            k=k,
            v=v,
            rope_dim=self.config.rope_dim,
            table=self.rope_table,
            **self.heads(node.layer),
        )

    def attention(self, node: Node) -> None:
        self.emit(
            "attention",
            Attention,
            node.reads,
            node.writes,
            q=self.floats("q"),
            out=self.floats(node.writes[0]),
            scale=float(self.config.attn_scale),
            window=self.config.sliding_window,
            **self.scratch(),
            **self.heads(node.layer),
        )

    # --- the tape ---

    def tape(self, progress: jit.Progress | None) -> tuple[Tape, int]:
        kernels = jit.load(["walk", *(kernel for kernel, _, _ in self.ops)], progress=progress)
        self.barriers[-1] = True
        records = aligned(len(self.ops) * _SLOTS * 8, zero=True).view(np.int64).reshape(-1, _SLOTS)
        rows = np.zeros((len(self.ops), len(Row)), np.int64)
        counts = aligned(len(self.ops) * CACHE_LINE, zero=True)  # of finished chunks, one a segment
        segment = 0
        for i, (kernel, fields, layout) in enumerate(self.ops):
            fields["done"] = counts.ctypes.data + segment * CACHE_LINE
            for name, value in fields.items():
                if isinstance(value, float):
                    value = struct.unpack("q", struct.pack("d", value))[0]
                records[i, getattr(layout, name) // 8] = value
            rows[i] = kernels[kernel], records[i].ctypes.data, self.barriers[i]
            segment += self.barriers[i]
        return Tape(rows, records, counts, self.buffers, self.activations), kernels["walk"]


def lower(
    graph: Graph,
    file: GGUFFile,
    config: ModelConfig,
    cache: KVCache,
    rope_table: int,
    n_threads: int,
    sizes: dict[str, int],
    progress: jit.Progress | None = None,
) -> tuple[Tape, int]:
    """The tape of a graph and the walker's address.

    rope_table: address of a RopeTable's array. sizes: the most "tokens" and "outputs" of one step.
    UnsupportedError names a tensor whose type no kernel computes.
    """
    return _Lowering(graph, file, config, cache, rope_table, n_threads, sizes).tape(progress)

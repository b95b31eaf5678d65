"""Lowering: each CPU node of a graph becomes an op or two of a tape, with the arguments that its kernel wants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...formats.config import ModelConfig
from ..graph import Graph, Node, memory_of
from ..kv_cache import KVCache
from ..sparsity import gate_range
from ..tensors import Tensors
from . import isa, jit
from .assemble import Assembly, Tape
from .buffers import CHUNK_BYTES, GROUPS, PANEL_CACHE, SEGMENT, Buffers, t_panels
from .layout import (
    ARRAYS,
    PANEL_ROWS,
    REGION_CHUNKS,
    AddParts,
    Attention,
    Bands,
    Down,
    Embed,
    MatMul,
    Norm,
    Pack,
    Rope,
    Rows,
    Select,
    Step,
    panel_bytes,
)
from .lower_experts import Mixture, routing


def rows_ahead(row_bytes: int) -> int:
    """How many listed rows ahead to fetch: enough to wait for memory, and few enough to stay in the thread's chunk."""
    return max(min(8, (16 << 10) // row_bytes), (4 << 10) // row_bytes, 1)


class _Lowering:
    def __init__(
        self,
        graph: Graph,
        tensors: Tensors,
        config: ModelConfig,
        cache: KVCache,
        rope_tables: tuple[int, int],
        n_threads: int,
        sizes: dict[str, int],
    ) -> None:
        self.tensors, self.config, self.cache = tensors, config, cache
        self.rope_tables, self.n_threads = rope_tables, n_threads
        self.buffers = Buffers(graph, tensors, config, n_threads, sizes)
        self.widths = graph.widths
        self.assembly = Assembly(self.buffers)
        self.emit = self.assembly.emit
        self.activations: list[int] = []
        nodes = self.buffers.nodes
        packing = (node for node in nodes if node.op in ("norm", "activate", "pack") and node.writes[0] != "x")
        self.prepacked = {name for node in packing for name in node.writes}
        mixture = Mixture(self.buffers, self.emit, tensors, config, n_threads)
        lowerings: dict[str, Callable[[Node], None]] = {
            "embed": self.embed,
            "positions": self.embed,
            "pack": self.pack,
            "norm": self.norm,
            "matmul": self.matmul,
            "matmul_t": self.matmul_t,
            "rope": self.rope,
            "attention": self.attention,
            "activate": self.activate,
            "select": self.select,
            "rows": self.rows,
            "down": self.down,
            "route": mixture.route,
            "experts": mixture.experts,
            "combine": mixture.combine,
        }
        for node in graph.nodes:
            if node.unit == "cpu":
                lowerings[node.op](node)
            else:
                self.assembly.barrier()  # the threads stop here, until what the GPU does in between is done

    def count(self, node: Node) -> int:
        return Step.n_out if node.rows == "outputs" else Step.n_tok

    def embed(self, node: Node) -> None:
        info = self.tensors.info(node.weight)
        self.emit(
            f"embed:{self.buffers.kind(node.weight)}",
            Embed,
            node,
            node.reads,
            node.writes,
            w=self.tensors.address(node.weight),
            out=self.buffers.floats(node.writes[0]),
            k=info.shape[0],
            row_bytes=info.row_size,
            gain=float(node.gain),
            at=Step.positions if node.op == "positions" else Step.ids,
            add=int(node.adds),
            **self.buffers.scratch(),
        )

    def norm(self, node: Node) -> None:
        """Packed for its readers; as floats where it is in place, added, or of an FFN, whose observer looks at it."""
        k, to = self.widths[node.reads[0]], node.writes[0]
        floats = to in node.reads or to == "f"
        self.emit(
            f"norm:{node.function}",
            Norm,
            node,
            node.reads,
            node.writes,
            src=self.buffers.floats(node.reads[0]),
            weight=self.buffers.vector(node.weight),
            bias=self.buffers.vector(node.bias) if node.bias else 0,
            n_weight=math.prod(self.tensors.info(node.weight).shape),
            k=k,
            group=node.group or k,
            eps=float(node.eps),
            gain=float(node.gain),
            rows=Step.out_rows if node.rows == "outputs" else 0,
            count=self.count(node),
            out=self.buffers.floats(to) if floats else 0,
            add=int(node.adds),
            **self.buffers.scratch(),
            **({} if to in node.reads else self.buffers.packed(to)),
        )

    def pack(self, node: Node) -> None:
        """Pack a value as it is, for readers that know it by another name."""
        self.emit_pack("pack", node, node.reads, node.writes, **self.buffers.packed(node.writes[0]))

    def emit_pack(
        self, kernel: str, node: Node, reads: tuple[str, ...], writes: tuple[str, ...], **fields: Any
    ) -> None:
        """An op of the pack family over the first value that it reads."""
        width = self.widths[reads[0]]
        sizes = {"k": width, "stride": width, "count": self.count(node), "segment": SEGMENT}
        self.emit(kernel, Pack, node, reads, writes, src=self.buffers.floats(reads[0]), **sizes, **fields)

    def packed(self, node: Node) -> tuple[str, dict[str, int]]:
        """The packed form of a matmul's input: what to wait for, and its arrays; packs it if no op has done so."""
        value = node.reads[0]
        source = value
        if value not in self.prepacked:
            source = f"{value}.packed"
            self.emit_pack("pack", node, (value,), (source,), **self.buffers.packed(value))
        return source, {key: at for key, at in self.buffers.packed(value).items() if key in ARRAYS}

    def activate(self, node: Node) -> None:
        """act(first read) * up, if it is read too, over the first; 0 where a predictor's scores, if read, are low."""
        source, *others = (name for name in node.reads if not name.startswith(("active.", "routed")))
        fields: dict[str, Any] = routing(self.buffers, node, "routing pairs") if node.rows == "pairs" else {}
        if memory_of(node.writes[-1]) == "h":
            self.activations.append(len(self.assembly.ops))
        for other in others:
            if memory_of(other) == "up":
                fields["second"] = self.buffers.floats(other)
                continue
            fields["scores"] = self.buffers.floats(other)
            fields["cut"] = self.buffers.vector(node.cut) if node.cut else self.buffers.zeros(self.widths[source])
        if node.branch == "sparse":
            fields["choice"] = self.buffers.choice(node.layer)
        else:
            fields |= self.buffers.packed(node.writes[-1])
        fields["threshold"] = float(node.threshold)
        self.emit_pack(f"activate:{node.function}", node, node.reads, node.writes, **fields)

    def matmul(self, node: Node) -> None:
        if (bands := self.tensors.bands(node.weight)) is not None:
            return self.bands(node, bands)
        kind, info = self.buffers.kind(node.weight), self.tensors.info(node.weight)
        k, n = info.shape[0], info.n_rows
        source, packed = self.packed(node)
        per_chunk = max(CHUNK_BYTES // info.row_size, -(-n // (self.n_threads * 8)))
        panels = max(1, min(PANEL_CACHE // panel_bytes(k, GROUPS[kind]), -(-n // (PANEL_ROWS * self.n_threads * 4))))
        self.emit(
            f"matmul:{kind}",
            MatMul,
            node,
            (source, *node.reads[1:]),
            node.writes,
            w=self.tensors.address(node.weight),
            out=self.buffers.floats(node.writes[0]),
            bias=self.buffers.vector(node.bias) if node.bias else 0,
            k=k,
            n=n,
            row_bytes=info.row_size,
            out_stride=n,
            count=self.count(node),
            add=int(node.adds),
            chunk=min(per_chunk, -(-n // self.n_threads)),
            panels=panels,
            **self.buffers.scratch(),
            **packed,
        )

    def bands(self, node: Node, address: int) -> None:
        """A matmul whose weights are in bands."""
        kind, info = self.buffers.kind(node.weight), self.tensors.info(node.weight)
        source, _ = self.packed(node)
        lanes = isa.LEVELS[isa.choose()].lanes
        band_bytes, n_bands = lanes * info.row_size, -(-info.n_rows // lanes)
        chunk = min(-(-CHUNK_BYTES // band_bytes), n_bands // (self.n_threads * 8))
        self.emit(
            f"bands:{kind}",
            Bands,
            node,
            (source, *node.reads[1:]),
            node.writes,
            w=address,
            out=self.buffers.floats(node.writes[0]),
            bias=self.buffers.vector(node.bias) if node.bias else 0,
            k=info.shape[0],
            n=info.n_rows,
            band_bytes=band_bytes,
            out_stride=info.n_rows,
            count=self.count(node),
            add=int(node.adds),
            xb=self.buffers.packed(node.reads[0])["xb"],
            chunk=max(chunk, 1, -(-n_bands // REGION_CHUNKS)),
            large=max(1, min(8, n_bands // (self.n_threads * 8))),
            regions=self.n_threads,
            claims=self.buffers.claims(len(self.assembly.ops), self.n_threads),
            **self.buffers.scratch(),
        )

    def matmul_t(self, node: Node) -> None:
        """A matmul of many tokens with a matrix stored by columns: row j is what activation j adds to each output."""
        kind, info = self.buffers.kind(node.weight), self.tensors.info(node.weight)
        source, packed = self.packed(node)
        self.emit(
            f"matmul_t:{kind}",
            MatMul,
            node,
            (source, *node.reads[1:]),
            node.writes,
            w=self.tensors.address(node.weight),
            out=self.buffers.floats(node.writes[0]),
            bias=self.buffers.vector(node.bias) if node.bias else 0,
            k=info.n_rows,
            n=info.shape[0],
            row_bytes=info.row_size,
            out_stride=info.shape[0],
            count=self.count(node),
            add=int(node.adds),
            panels=t_panels(kind),
            **self.buffers.scratch(),
            **packed,
        )

    # --- sparse FFN ---

    def select(self, node: Node) -> None:
        low, high, top = gate_range(self.config.activation, node.threshold)
        self.emit(
            "select:scores" if node.cut else "select:gates",
            Select,
            node,
            node.reads,
            node.writes,
            src=self.buffers.floats(node.reads[0]),
            n=self.widths[node.reads[0]],
            low=low,
            high=high,
            top=top,
            cut=self.buffers.vector(node.cut) if node.cut else 0,
            picked=self.buffers.floats("picked"),
            limit=node.limit,
            **self.listed(node),
        )

    def listed(self, node: Node) -> dict[str, int]:
        return {"list": self.buffers.list(), "choice": self.buffers.choice(node.layer)}

    def rows(self, node: Node) -> None:
        """Rows of the list; with gates among the reads they become act(gate) * row . x in the same op."""
        info, kind = self.tensors.info(node.weight), self.buffers.kind(node.weight)
        source, packed = self.packed(node)
        if node.function:
            packed |= {"gates": self.buffers.floats(node.reads[1])}
        self.emit(
            f"rows:{kind}:{node.function}" if node.function else f"rows:{kind}",
            Rows,
            node,
            (source, *node.reads[1:]),
            node.writes,
            threshold=float(node.threshold),
            w=self.tensors.address(node.weight),
            out=self.buffers.floats(node.writes[0]),
            bias=self.buffers.vector(node.bias) if node.bias else 0,
            k=info.shape[0],
            row_bytes=info.row_size,
            out_stride=info.n_rows,
            parts=self.n_threads * 2,
            ahead=rows_ahead(info.row_size),
            **self.listed(node),
            **packed,
        )

    def down(self, node: Node) -> None:
        kind, info = self.buffers.kind(node.weight), self.tensors.info(node.weight)
        # By the model's size alone, so that the sums do not depend on the number of threads.
        parts = min(8, max(4, info.nbytes >> 19))
        sums = self.buffers.parts(parts)
        self.emit(
            f"down:{kind}",
            Down,
            node,
            node.reads,
            ("parts",),
            w=self.tensors.address(node.weight),
            out=sums,
            h=self.buffers.floats(node.reads[0]),
            h_stride=self.widths[node.reads[0]],
            n=info.shape[0],
            row_bytes=info.row_size,
            parts=parts,
            ahead=max(4, rows_ahead(info.row_size)),
            **self.buffers.scratch(),
            **self.listed(node),
        )
        self.emit(
            "add_parts",
            AddParts,
            node,
            ("parts", *node.writes),
            node.writes,
            sums=sums,
            out=self.buffers.floats(node.writes[0]),
            bias=self.buffers.vector(node.bias) if node.bias else 0,
            add=int(node.adds),
            n=info.shape[0],
            parts=parts,
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
            "key_bytes": self.cache.types.keys.page_bytes(c.head_dim_k),
            "value_bytes": self.cache.types.values.page_bytes(c.head_dim_v),
        }

    def rope(self, node: Node) -> None:
        q, k, v = (self.buffers.floats(name) for name in node.reads)
        self.emit(
            f"rope:{self.config.rope_style}",
            Rope,
            node,
            node.reads,
            node.writes,
            q=q,
            k=k,
            v=v,
            rope_dim=self.config.rope_dim,
            table=self.rope_tables[self.config.windows[node.layer] > 0],
            key_type=self.cache.types.keys.number,
            value_type=self.cache.types.values.number,
            **self.heads(node.layer),
        )

    def attention(self, node: Node) -> None:
        types = self.cache.types
        self.emit(
            f"attention:{types.keys.name}-{types.values.name}",
            Attention,
            node,
            node.reads,
            node.writes,
            q=self.buffers.floats("q"),
            out=self.buffers.floats(node.writes[0]),
            scale=float(self.config.attn_scale),
            softcap=float(self.config.attn_softcap),
            window=self.config.windows[node.layer],
            **self.buffers.attention_parts(self.cache.n_blocks),
            regions=self.n_threads,
            claims=self.buffers.claims(len(self.assembly.ops), self.n_threads),
            **self.buffers.scratch(),
            **self.heads(node.layer),
        )


def lower(
    graph: Graph,
    tensors: Tensors,
    config: ModelConfig,
    cache: KVCache,
    rope_tables: tuple[int, int],
    n_threads: int,
    sizes: dict[str, int],
    progress: jit.Progress | None = None,
) -> tuple[Tape, int]:
    """The tape of a graph and the walker's address.

    rope_tables: addresses of the arrays of two RopeTables, for layers without and with a window. sizes: the most
    "tokens" and "outputs" of one step.
    UnsupportedError names a tensor whose type no kernel computes.
    """
    lowering = _Lowering(graph, tensors, config, cache, rope_tables, n_threads, sizes)
    return lowering.assembly.tape(lowering.activations, progress)

"""Lowering of a mixture of experts: routing, products of pairs of a token and an expert, and their weighted sums."""

from __future__ import annotations

from collections.abc import Callable

from ...formats.config import ModelConfig
from ..graph import Node
from ..tensors import Tensors
from .buffers import CHUNK_BYTES, GROUPS, PANEL_CACHE, SEGMENT, Buffers
from .layout import ARRAYS, PANEL_ROWS, Combine, MatMul, Pack, Route, Step, panel_bytes


def routing(buffers: Buffers, node: Node, names: str) -> dict[str, int]:
    """Some of the arrays of a layer's routing, by name."""
    found = buffers.routing(node.layer)
    return {name: found[name] for name in names.split()}


class Mixture:
    """Lowers the nodes route, experts and combine; emit: as Assembly's."""

    def __init__(
        self, buffers: Buffers, emit: Callable[..., None], tensors: Tensors, config: ModelConfig, n_threads: int
    ) -> None:
        self.buffers, self.emit, self.tensors, self.config = buffers, emit, tensors, config
        self.n_threads = n_threads
        self.packed = ""  # of the layer at hand, the value that is packed for pairs

    def route(self, node: Node) -> None:
        self.packed = ""
        self.emit(
            "route",
            Route,
            node,
            node.reads,
            node.writes,
            src=self.buffers.floats(node.reads[0]),
            n=self.config.n_expert,
            n_used=self.config.n_expert_used,
            weights_norm=int(self.config.weights_norm),
            here=self.tensors.address(node.weight) if node.weight else 0,
            **self.buffers.routing(node.layer),
        )

    def experts(self, node: Node) -> None:
        """A matmul of pairs; the tokens' values are packed anew for them, once for all nodes that read them."""
        kind, info = self.buffers.kind(node.weight), self.tensors.info(node.weight)
        value, (k, n, *_) = node.reads[0], info.shape
        packed = self.buffers.packed(value, pairs=True)
        of_tokens = value not in self.buffers.by_pair
        if of_tokens and self.packed != value:
            self.packed = value
            self.emit(
                "pack",
                Pack,
                node,
                node.reads,
                (value,),
                src=self.buffers.floats(value),
                k=k,
                stride=k,
                count=Step.n_tok,
                segment=SEGMENT,
                **routing(self.buffers, node, "routing pairs"),
                **packed,
            )
        per_chunk = max(CHUNK_BYTES // info.row_size, -(-n * self.config.n_expert_used // (self.n_threads * 8)))
        self.emit(
            f"experts:{kind}",
            MatMul,
            node,
            node.reads,
            node.writes,
            w=self.tensors.address(node.weight),
            out=self.buffers.floats(node.writes[0]),
            k=k,
            n=n,
            row_bytes=info.row_size,
            out_stride=n,
            chunk=min(per_chunk, n),
            panels=max(1, min(PANEL_CACHE // panel_bytes(k, GROUPS[kind]), -(-n // (PANEL_ROWS * 4)))),
            **self.buffers.scratch(),
            **routing(self.buffers, node, "routing items pairs" if of_tokens else "routing items"),
            **{key: at for key, at in packed.items() if key in ARRAYS},
        )

    def combine(self, node: Node) -> None:
        self.emit(
            "combine",
            Combine,
            node,
            node.reads,
            node.writes,
            src=self.buffers.floats(node.reads[0]),
            out=self.buffers.floats(node.writes[0]),
            n=self.config.n_embd,
            n_used=self.config.n_expert_used,
            segment=SEGMENT,
            add=int(node.adds),
            **routing(self.buffers, node, "slots weights"),
        )

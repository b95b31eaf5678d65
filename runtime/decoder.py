"""The one generic decoder: a ModelConfig becomes a Graph."""

from __future__ import annotations

from ..formats.config import ModelConfig
from .graph import Graph, Node


def build(config: ModelConfig) -> Graph:
    """The graph of a pre-norm decoder with rotary positions and a gated FFN.

    Values: x (residual), a (normed), q k v att, f (normed), gate up h, y (normed output rows), logits.
    """
    graph = Graph(
        widths={
            "x": config.n_embd,
            "a": config.n_embd,
            "q": config.n_head * config.head_dim_k,
            "k": config.n_head_kv * config.head_dim_k,
            "v": config.n_head_kv * config.head_dim_v,
            "att": config.n_head * config.head_dim_v,
            "f": config.n_embd,
            "gate": config.n_ff,
            "up": config.n_ff,
            "h": config.n_ff,
            "y": config.n_embd,
            "logits": config.n_vocab,
        }
    )
    graph.add(Node("embed", (), ("x",), "token_embd.weight"))
    for layer in range(config.n_layer):
        _block(graph, config, layer)
    graph.add(Node("norm", ("x",), ("y",), "output_norm.weight", rows="outputs"))
    head = "token_embd.weight" if config.tied_output else "output.weight"
    graph.add(Node("matmul", ("y",), ("logits",), head, rows="outputs"))
    return graph


def _block(graph: Graph, config: ModelConfig, layer: int) -> None:
    def add(op: str, reads: str, writes: str, weight: str = "", bias: bool = False) -> None:
        name = f"blk.{layer}.{weight}"
        graph.add(
            Node(
                op,
                tuple(reads.split()),
                tuple(writes.split()),
                f"{name}.weight" if weight else "",
                f"{name}.bias" if bias else "",
                layer,
            )
        )

    cache = f"kv.{layer}"
    add("norm", "x", "a", "attn_norm")
    add("matmul", "a", "q", "attn_q", config.qkv_bias)
    add("matmul", "a", "k", "attn_k", config.qkv_bias)
    add("matmul", "a", "v", "attn_v", config.qkv_bias)
    add("rope", "q k v", f"q k {cache}")
    add("attention", f"q {cache}", "att")
    add("matmul", "att x", "x", "attn_output", config.output_bias)
    add("norm", "x", "f", "ffn_norm")
    add("matmul", "f", "gate", "ffn_gate")
    add("matmul", "f", "up", "ffn_up")
    add("activate", "gate up", "gate h")
    add("matmul", "h x", "x", "ffn_down")

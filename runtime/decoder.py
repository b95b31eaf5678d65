"""The one generic decoder: a ModelConfig, and how sparse its FFNs shall be, become a Graph."""

from __future__ import annotations

from ..formats.config import ModelConfig
from .graph import Graph, Node
from .sparsity import Plan


def build(config: ModelConfig, plan: Plan | None = None, ranks: tuple[int, ...] = ()) -> Graph:
    """The graph of a pre-norm decoder with rotary positions and a gated FFN.

    Values: x (residual), a (normed), q k v att, f (normed), gate up h, y (normed output rows), logits; of a sparse FFN
    also r and scores (a predictor's), picked (gates or scores of the listed neurons), active.N (the list).
    ranks: of the predictors, by layer.
    """
    n_ff = config.n_ff
    graph = Graph(
        widths={
            "x": config.n_embd,
            "a": config.n_embd,
            "q": config.n_head * config.head_dim_k,
            "k": config.n_head_kv * config.head_dim_k,
            "v": config.n_head_kv * config.head_dim_v,
            "att": config.n_head * config.head_dim_v,
            "f": config.n_embd,
            "gate": n_ff,
            "up": n_ff,
            "h": n_ff,
            "y": config.n_embd,
            "logits": config.n_vocab,
        }
    )
    if plan:
        graph.widths |= {"picked": n_ff, "scores": n_ff} | {f"r{rank}": rank for rank in ranks}
    graph.add(Node("embed", (), ("x",), "token_embd.weight"))
    for layer in range(config.n_layer):
        _attention(graph, config, layer)
        if plan is None:
            _dense_ffn(graph, config, layer)
        else:
            _sparse_ffn(graph, config, layer, plan, ranks[layer] if ranks else 0)
    graph.add(Node("norm", ("x",), ("y",), "output_norm.weight", rows="outputs"))
    head = "token_embd.weight" if config.tied_output else "output.weight"
    graph.add(Node("matmul", ("y",), ("logits",), head, rows="outputs"))
    return graph


def _attention(graph: Graph, config: ModelConfig, layer: int) -> None:
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


def _dense_ffn(graph: Graph, config: ModelConfig, layer: int) -> None:
    block = f"blk.{layer}"
    graph.add(Node("norm", ("x",), ("f",), f"{block}.ffn_norm.weight", layer=layer))
    graph.add(Node("matmul", ("f",), ("gate",), f"{block}.ffn_gate.weight", layer=layer))
    graph.add(Node("matmul", ("f",), ("up",), f"{block}.ffn_up.weight", layer=layer))
    graph.add(Node("activate", ("gate", "up"), ("gate", "h"), layer=layer, function=config.activation))
    graph.add(Node("matmul", ("h", "x"), ("x",), f"{block}.ffn_down.weight", layer=layer))


def _sparse_ffn(graph: Graph, config: ModelConfig, layer: int, plan: Plan, rank: int) -> None:
    """A selection, then two branches: the listed neurons, or all of them with the inactive ones set to zero."""
    block, active = f"blk.{layer}", f"active.{layer}"
    threshold, function = plan.thresholds[layer], config.activation

    def add(op: str, reads: str, writes: str, weight: str = "", branch: str = "", **rule: str | float) -> None:
        name = f"{block}.{weight}.weight" if weight else ""
        graph.add(
            Node(op, tuple(reads.split()), tuple(writes.split()), name, layer=layer, branch=branch, **rule)  # type: ignore[arg-type]
        )

    add("norm", "x", "f", "ffn_norm")
    if plan.predictor:
        cut = f"{block}.ffn_pred_cut"
        source = "f" if plan.predictor_input == "ffn_norm" else "x"
        add("matmul", source, f"r{rank}", "ffn_pred_a")
        if plan.predictor == "relu":
            add("activate", f"r{rank}", f"r{rank}", function="relu")
        add("matmul", f"r{rank}", "scores", "ffn_pred_b")
        add("select", "scores", f"{active} picked", cut=cut, limit=plan.limit)
        add("rows", f"f {active}", "gate", "ffn_gate", "sparse")
        add("rows", f"f {active}", "up", "ffn_up", "sparse")
        add("activate", f"gate up picked {active}", "gate", "", "sparse", function=function)
        add("down", f"gate x {active}", "x", "ffn_down_t", "sparse")
        add("matmul", "f", "gate", "ffn_gate", "dense")
        add("matmul", "f", "up", "ffn_up", "dense")
        add("activate", "gate up scores", "gate h", "", "dense", function=function, cut=cut)
    else:
        add("matmul", "f", "gate", "ffn_gate")
        add("select", "gate", f"{active} picked", threshold=threshold, limit=plan.limit)
        add("rows", f"f picked {active}", "up", "ffn_up", "sparse", function=function, threshold=threshold)
        add("down", f"up x {active}", "x", "ffn_down_t", "sparse")
        add("matmul", "f", "up", "ffn_up", "dense")
        add("activate", "gate up", "gate h", "", "dense", function=function, threshold=threshold)
    if plan.dense_from_t:
        add("matmul_t", "h x", "x", "ffn_down_t", "dense")
    else:
        add("matmul", "h x", "x", "ffn_down", "dense")

"""The one generic decoder: a ModelConfig, how sparse its FFNs shall be, and what lies on a GPU become a Graph."""

from __future__ import annotations

from dataclasses import dataclass

from ..formats.config import ModelConfig
from .graph import Graph, Node
from .sparsity import Plan, everything


@dataclass(frozen=True)
class Split:
    """What runs on the GPU: by layer its attention and how many neurons of its FFN (the hot ones), and the output.

    mapped: of a layer with hot neurons it computes the others too, out of the host's memory.
    """

    attention: tuple[bool, ...]
    hot: tuple[int, ...]
    head: bool
    mapped: bool = False


def part(tensor: str, name: str) -> str:
    """The name of the "hot" or "cold" rows of a tensor."""
    return f"{tensor}@{name}"


def build(
    config: ModelConfig, plan: Plan | None = None, ranks: tuple[int, ...] = (), split: Split | None = None
) -> Graph:
    """The graph of a pre-norm decoder with rotary positions and a gated FFN.

    Values: x (residual), a (normed), q k v att, f (normed), gate up h, y (normed output rows), logits; of a sparse FFN
    also r and scores (a predictor's), picked (gates or scores of the listed neurons), active.N (the list). On the GPU
    likewise, and parts (sums of the hot neurons), base (x with the cold ones added). ranks: of the predictors, by
    layer. Of a dense model's split layers, the CPU lists all cold neurons.
    """
    return _Decoder(config, plan, ranks, split).graph


class _Decoder:
    def __init__(self, config: ModelConfig, plan: Plan | None, ranks: tuple[int, ...], split: Split | None) -> None:
        self.config, self.plan, self.ranks = config, plan, ranks
        self.split = split or Split((False,) * config.n_layer, (0,) * config.n_layer, False)
        self.graph = Graph(widths=_widths(config, ranks))
        if split:
            on_gpu = {f"gpu.{value}": width for value, width in self.graph.widths.items()}
            self.graph.widths |= on_gpu | {"gpu.base": config.n_embd, "gpu.parts": config.n_embd}
        self.current = {"cpu"}  # the units that have the residual as it is now
        self._add("embed", "", "x", "token_embd.weight")
        for layer in range(config.n_layer):
            self._attention(layer, "gpu" if self.split.attention[layer] else "cpu")
            self._ffn(layer)
        self._head("gpu" if self.split.head else "cpu")

    def _add(
        self, op: str, reads: str, writes: str, weight: str = "", unit: str = "cpu", **fields: str | float
    ) -> None:
        """Append a node, whose values are those of its unit."""

        def names(values: str) -> tuple[str, ...]:
            return tuple(f"gpu.{v}" if unit == "gpu" and not v.startswith("gpu.") else v for v in values.split())

        self.graph.add(Node(op, names(reads), names(writes), weight, unit=unit, **fields))  # type: ignore[arg-type]

    def _copy(self, op: str, source: str, to: str, rows: str = "tokens") -> None:
        self.graph.add(Node(op, (source,), (to,), rows=rows, unit="gpu"))

    def _need(self, unit: str) -> None:
        """Have the residual on a unit."""
        if unit not in self.current:
            self._copy(*(("send", "x", "gpu.x") if unit == "gpu" else ("fetch", "gpu.x", "x")))
            self.current.add(unit)

    def _attention(self, layer: int, unit: str) -> None:
        self._need(unit)
        cache, c = f"kv.{layer}", self.config

        def add(op: str, reads: str, writes: str, weight: str = "", bias: bool = False) -> None:
            name = f"blk.{layer}.{weight}"
            names = {"bias": f"{name}.bias" if bias else ""}
            self._add(op, reads, writes, f"{name}.weight" if weight else "", unit, layer=layer, **names)

        add("norm", "x", "a", "attn_norm")
        add("matmul", "a", "q", "attn_q", c.has("attn_q.bias"))
        add("matmul", "a", "k", "attn_k", c.has("attn_q.bias"))
        add("matmul", "a", "v", "attn_v", c.has("attn_q.bias"))
        add("rope", "q k v", f"q k {cache}")
        add("attention", f"q {cache}", "att")
        add("matmul", "att x", "x", "attn_output", c.has("attn_output.bias"))
        self.current = {unit}

    def _ffn(self, layer: int) -> None:
        n_hot = self.split.hot[layer]
        n_cold = self.config.n_ff - n_hot
        if n_hot and (self.split.mapped or not n_cold):
            self._need("gpu")
            self._gpu_ffn(layer, {"hot": n_hot, "cold": n_cold} if n_cold else {"": n_hot})
            self.current = {"gpu"}
        elif n_hot:
            self._need("cpu")
            self._need("gpu")
            self._gpu_ffn(layer, {"hot": n_hot})
            self._sparse_ffn(layer, self.plan or everything(self.config), n_cold)
            self._copy("send", "x", "gpu.base")
            self._add("merge", "base parts", "x", unit="gpu", layer=layer)
            self.current = {"gpu"}
        else:
            self._need("cpu")
            if self.plan:
                self._sparse_ffn(layer, self.plan, 0)
            else:
                self._dense_ffn(layer)
            self.current = {"cpu"}

    def _dense_ffn(self, layer: int) -> None:
        block = f"blk.{layer}"
        self._add("norm", "x", "f", f"{block}.ffn_norm.weight", layer=layer)
        self._add("matmul", "f", "gate", f"{block}.ffn_gate.weight", layer=layer)
        self._add("matmul", "f", "up", f"{block}.ffn_up.weight", layer=layer)
        self._add("activate", "gate up", "gate h", layer=layer, function=self.config.activation)
        self._add("matmul", "h x", "x", f"{block}.ffn_down.weight", layer=layer)

    def _sparse_ffn(self, layer: int, plan: Plan, n_cold: int) -> None:
        """A selection, then two branches: the listed neurons, or all of them with the inactive ones set to zero.

        n_cold: of a layer that is split, the neurons that are not on the GPU; 0 for all.
        """
        active, threshold, function = f"active.{layer}", plan.thresholds[layer], self.config.activation
        width = f":{n_cold}" if n_cold else ""
        gate, up, h, scores, picked = (f"{value}{width}" for value in ("gate", "up", "h", "scores", "picked"))
        self.graph.widths |= dict.fromkeys((gate, up, h, scores, picked), n_cold or self.config.n_ff)

        def weight(name: str) -> str:
            tensor = f"blk.{layer}.{name}"
            return part(tensor, "cold") if n_cold and name not in ("ffn_norm.weight", "ffn_pred_a.weight") else tensor

        def add(op: str, reads: str, writes: str, name: str = "", branch: str = "", **rest: str | float) -> None:
            tensor = weight(f"{name}.weight") if name else ""
            self._add(op, reads, writes, tensor, "cpu", layer=layer, branch=branch, **rest)

        add("norm", "x", "f", "ffn_norm")
        limit = n_cold or plan.limit
        if plan.predictor:
            r, cut = f"r{self.ranks[layer]}", weight("ffn_pred_cut")
            add("matmul", "f" if plan.predictor_input == "ffn_norm" else "x", r, "ffn_pred_a")
            if plan.predictor == "relu":
                add("activate", r, r, function="relu")
            add("matmul", r, scores, "ffn_pred_b")
            add("select", scores, f"{active} {picked}", cut=cut, limit=limit)
            add("rows", f"f {active}", gate, "ffn_gate", "sparse")
            add("rows", f"f {active}", up, "ffn_up", "sparse")
            add("activate", f"{gate} {up} {picked} {active}", gate, "", "sparse", function=function)
            add("down", f"{gate} x {active}", "x", "ffn_down_t", "sparse")
            add("matmul", "f", gate, "ffn_gate", "dense")
            add("matmul", "f", up, "ffn_up", "dense")
            add("activate", f"{gate} {up} {scores}", f"{gate} {h}", "", "dense", function=function, cut=cut)
        else:
            add("matmul", "f", gate, "ffn_gate")
            add("select", gate, f"{active} {picked}", limit=limit, threshold=threshold)
            add("rows", f"f {picked} {active}", up, "ffn_up", "sparse", function=function, threshold=threshold)
            add("down", f"{up} x {active}", "x", "ffn_down_t", "sparse")
            add("matmul", "f", up, "ffn_up", "dense")
            add("activate", f"{gate} {up}", f"{gate} {h}", "", "dense", function=function, threshold=threshold)
        if plan.dense_from_t or n_cold:
            add("matmul_t", f"{h} x", "x", "ffn_down_t", "dense")
        else:
            add("matmul", f"{h} x", "x", "ffn_down", "dense")

    def _gpu_ffn(self, layer: int, shares: dict[str, int]) -> None:
        """Shares of a layer's neurons, by name, on the GPU; "" is all of them.

        They are added to x, unless they are only the hot ones: then their sums stay in parts for a merge to come.
        """
        plan, function = self.plan, self.config.activation
        threshold = plan.thresholds[layer] if plan else 0.0

        def weight(name: str, share: str) -> str:
            tensor = f"blk.{layer}.{name}"
            return part(tensor, share) if share else tensor

        def add(op: str, reads: str, writes: str, tensor: str = "", **rest: str | float) -> None:
            self._add(op, reads, writes, tensor, "gpu", layer=layer, **rest)

        add("norm", "x", "f", weight("ffn_norm.weight", ""))
        r = ""
        if plan and plan.predictor:
            r = f"r{self.ranks[layer]}"
            source = "f" if plan.predictor_input == "ffn_norm" else "x"
            add("matmul", source, r, weight("ffn_pred_a.weight", ""), function=plan.predictor.replace("dejavu", ""))
        for share, n in shares.items():
            h, scores = f"gpu.h:{n}", f"gpu.scores:{n}"
            self.graph.widths |= {h: n, scores: n}
            if r:
                add("matmul", r, scores, weight("ffn_pred_b.weight", share))
            gate, up = weight("ffn_gate.weight", share), weight("ffn_up.weight", share)
            cut = weight("ffn_pred_cut", share) if r else ""
            reads = f"f {scores}" if r else "f"
            add("ffn", reads, h, gate, up=up, function=function, threshold=threshold, cut=cut)
            if plan is None and not share:
                add("matmul", f"{h} x", "x", weight("ffn_down.weight", ""))
                continue
            add("down", h, "parts", weight("ffn_down_t.weight", share))
            if list(shares) != ["hot"]:
                add("merge", "x parts", "x")

    def _head(self, unit: str) -> None:
        self._need(unit)
        tied = self.config.tied_output
        self._add("norm", "x", "y", "output_norm.weight", unit, rows="outputs")
        self._add("matmul", "y", "logits", "token_embd.weight" if tied else "output.weight", unit, rows="outputs")
        if unit == "gpu":
            self._copy("fetch", "gpu.logits", "logits", rows="outputs")


def _widths(config: ModelConfig, ranks: tuple[int, ...]) -> dict[str, int]:
    widths = {
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
    return widths | {f"r{rank}": rank for rank in ranks}

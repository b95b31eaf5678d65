"""The one generic decoder: a ModelConfig, how sparse its FFNs shall be, and what lies on a GPU become a Graph."""

from __future__ import annotations

from dataclasses import dataclass

from ..formats.config import ModelConfig
from .cpu_ffn import FFN
from .graph import Graph, Node, part
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


def build(
    config: ModelConfig, plan: Plan | None = None, ranks: tuple[int, ...] = (), split: Split | None = None
) -> Graph:
    """The graph of a decoder, by what its configuration says.

    Values: x (residual), a (normed), q k v att, f (normed), gate up h, o (what a norm follows before it is added), y
    (normed output rows), logits; of a sparse FFN also r and scores (a predictor's), picked (gates or scores of the
    listed neurons), active.N (the list); of a mixture of experts router (its logits), routed (pairs of a token and an
    expert). On the GPU likewise, and parts (sums of the hot neurons), base (x or o with the cold ones). ranks: of the
    predictors, by layer. Of a dense model's split layers, the CPU lists all cold neurons.
    """
    return _Decoder(config, plan, ranks, split).graph


class _Decoder:
    def __init__(self, config: ModelConfig, plan: Plan | None, ranks: tuple[int, ...], split: Split | None) -> None:
        self.config, self.plan, self.ranks = config, plan, ranks
        self.split = split or Split((False,) * config.n_layer, (0,) * config.n_layer, False)
        # A residual that is divided by a scale instead of growing by scaled sums: norms take any scale off again.
        self.eps = config.norm_eps / config.residual_scale**2
        self.graph = Graph(widths=_widths(config, ranks))
        if split:
            on_gpu = {f"gpu.{value}": width for value, width in self.graph.widths.items()}
            self.graph.widths |= on_gpu | {"gpu.base": config.n_embd, "gpu.parts": config.n_embd}
        self.current = {"cpu"}  # the units that have the residual as it is now
        self._add("embed", "", "x", "token_embd.weight", gain=config.embd_scale / config.residual_scale)
        if config.has("position_embd.weight"):
            self._add("positions", "tokens x", "x", "position_embd.weight", gain=1 / config.residual_scale)
        for layer in range(config.n_layer):
            if config.parallel:  # the FFN's norm comes before attention changes the residual
                for unit in sorted(self._ffn_units(layer)):
                    self._need(unit)
                    self._ffn_norm(layer, unit)
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

    def _bias(self, name: str) -> str:
        """`NAME.bias` of a block, if there is one."""
        return f"{name}.bias" if self.config.has(f"{name.split('.', 2)[2]}.bias") else ""

    def _norm(self, layer: int, unit: str, reads: str, to: str, *names: str, group: int = 0) -> None:
        """A norm of the first of these names that the model has; without any, values stay as they are."""
        name = next((name for name in names if self.config.has(f"{name}.weight")), "")
        if not name:
            self._add("pack", reads, to, unit=unit, layer=layer)
            return
        tensor = f"blk.{layer}.{name}"
        eps = self.eps if reads == "x" else self.config.norm_eps
        how: dict[str, str | float] = {"bias": self._bias(tensor), "function": self.config.norm}
        how |= {"eps": eps, "group": group}
        self._add("norm", reads, to, f"{tensor}.weight", unit, layer=layer, **how)

    def _attention(self, layer: int, unit: str) -> None:
        self._need(unit)
        cache, c = f"kv.{layer}", self.config
        target, base = ("o", "") if c.has("post_attention_norm.weight") else ("x", " x")

        def add(op: str, reads: str, writes: str, weight: str = "") -> None:
            name = f"blk.{layer}.{weight}"
            fields = {"bias": self._bias(name) if weight else ""}
            self._add(op, reads, writes, f"{name}.weight" if weight else "", unit, layer=layer, **fields)

        self._norm(layer, unit, "x", "a", "attn_norm_2", "attn_norm")
        add("matmul", "a", "q", "attn_q")
        add("matmul", "a", "k", "attn_k")
        add("matmul", "a", "v", "attn_v")
        if c.has("attn_q_norm.weight"):
            group = 0 if c.whole_head_norms else c.head_dim_k
            self._norm(layer, unit, "q", "q", "attn_q_norm", group=group)
            self._norm(layer, unit, "k", "k", "attn_k_norm", group=group)
        add("rope", "q k v", f"q k {cache}")
        add("attention", f"q {cache}", "att")
        add("matmul", f"att{base}", target, "attn_output")
        if not base:
            self._norm(layer, unit, "o x", "x", "post_attention_norm")
        self.current = {unit}

    def _ffn_units(self, layer: int) -> set[str]:
        """Where neurons of a layer are computed."""
        n_hot = self.split.hot[layer]
        if n_hot and (self.split.mapped or n_hot == self.config.n_ff):
            return {"gpu"}
        return {"cpu", "gpu"} if n_hot else {"cpu"}

    def _ffn_norm(self, layer: int, unit: str) -> None:
        self._norm(layer, unit, "x", "f", "ffn_norm", *(("attn_norm",) if self.config.parallel else ()))

    def _ffn(self, layer: int) -> None:
        """What the neurons add to the residual; where a norm comes in between, they make o, and that is added."""
        c, units = self.config, self._ffn_units(layer)
        n_hot = self.split.hot[layer]
        n_cold = c.n_ff - n_hot if n_hot else 0
        to, base = ("o", "") if c.has("post_ffw_norm.weight") else ("x", " x")
        for unit in sorted(units):
            self._need(unit)
            if not c.parallel:
                self._ffn_norm(layer, unit)
        if "gpu" in units:
            hot = {"hot": n_hot} if "cpu" in units else {"hot": n_hot, "cold": n_cold} if n_cold else {"": n_hot}
            self._gpu_ffn(layer, hot, to, base)
        if "cpu" in units:
            ffn = FFN(layer, n_cold, to, base, self._add, self._bias)
            if c.n_expert:
                ffn.experts(c, self.plan)
            elif self.plan or n_cold:
                ffn.sparse(c, self.plan or everything(c), self.ranks, self.graph.widths)
            else:
                ffn.dense(c)
        if len(units) == 2:
            self._copy("send", to, "gpu.base")
            self._add("merge", "base parts", to, unit="gpu", layer=layer)
        unit = "gpu" if "gpu" in units else "cpu"
        if not base:
            self._norm(layer, unit, "o x", "x", "post_ffw_norm")
        self.current = {unit}

    def _gpu_ffn(self, layer: int, shares: dict[str, int], to: str, base: str) -> None:
        """Shares of a layer's neurons, by name, on the GPU; "" is all of them.

        They are added to x or set in o, unless they are only the hot ones: then their sums stay in parts for a merge to
        come, and the bias of ffn_down and a bypass come from the CPU.
        """
        c, plan = self.config, self.plan
        threshold = plan.thresholds[layer] if plan else c.activation_floors[layer]

        def weight(name: str, share: str) -> str:
            tensor = f"blk.{layer}.{name}"
            return part(tensor, share) if share else tensor

        def bias(name: str, share: str) -> str:
            tensor = self._bias(f"blk.{layer}.{name}")
            return part(tensor, share) if share and tensor else tensor

        def add(op: str, reads: str, writes: str, tensor: str = "", **rest: str | float) -> None:
            self._add(op, reads, writes, tensor, "gpu", layer=layer, **rest)

        r = ""
        if plan and plan.predictor:
            r = f"r{self.ranks[layer]}"
            source = "f" if plan.predictor_input == "ffn_norm" else "x"
            add("matmul", source, r, weight("ffn_pred_a.weight", ""), function=plan.predictor.replace("dejavu", ""))
        if list(shares) != ["hot"] and c.has("ffn_bypass.weight"):
            add("matmul", f"f{base}", to, weight("ffn_bypass.weight", ""), bias=bias("ffn_bypass", ""))
            base = f" {to}"
        if c.n_expert:
            add("matmul", "f", "router", weight("ffn_gate_inp.weight", ""))
        exps = "_exps" if c.n_expert else ""
        gated = {"up": "ffn_up", "gate": "ffn_gate"} if c.gated else {"gate": "ffn_up"}
        for share, n in shares.items():
            n_scores = n // c.expert_neurons if c.n_expert else n
            h, scores = f"gpu.h:{n}", f"gpu.scores:{n_scores}"
            self.graph.widths |= {h: n, scores: n_scores}
            if r:
                add("matmul", r, scores, weight("ffn_pred_b.weight", share))
            if c.n_expert:
                add("route", "router", scores, weight("experts", share))
            names = {key: weight(f"{name}{exps}.weight", share) for key, name in gated.items()}
            rest: dict[str, str | float] = {
                "up": names.get("up", ""),
                "bias": bias(gated["gate"], share),
                "up_bias": bias(gated["up"], share) if c.gated else "",
                "cut": weight("ffn_pred_cut", share) if r else "",
            }
            reads = f"f {scores}" if r or c.n_expert else "f"
            add("ffn", reads, h, names["gate"], function=c.activation, threshold=threshold, **rest)
            if plan is None and not share and not c.n_expert:
                add("matmul", f"{h}{base}", to, weight("ffn_down.weight", ""), bias=bias("ffn_down", ""))
                continue
            add("down", h, "parts", weight(f"ffn_down{exps}_t.weight", share))
            if list(shares) != ["hot"]:
                first = share == next(iter(shares))
                reads = f"{to} parts" if base or not first else "parts"
                add("merge", reads, to, bias=bias("ffn_down", "") if first else "")

    def _head(self, unit: str) -> None:
        self._need(unit)
        c = self.config
        bias = "output_norm.bias" if c.has("output_norm.bias") else ""
        how: dict[str, str | float] = {"function": c.norm, "eps": self.eps, "bias": bias, "gain": c.logit_scale}
        self._add("norm", "x", "y", "output_norm.weight", unit, rows="outputs", **how)
        self._add(
            "matmul", "y", "logits", "token_embd.weight" if c.tied_output else "output.weight", unit, rows="outputs"
        )
        if unit == "gpu":
            self._copy("fetch", "gpu.logits", "logits", rows="outputs")


def _widths(config: ModelConfig, ranks: tuple[int, ...]) -> dict[str, int]:
    c = config
    widths = {
        "x": c.n_embd,
        "a": c.n_embd,
        "q": c.n_head * c.head_dim_k,
        "k": c.n_head_kv * c.head_dim_k,
        "v": c.n_head_kv * c.head_dim_v,
        "att": c.n_head * c.head_dim_v,
        "f": c.n_embd,
        "gate": c.n_ff,
        "up": c.n_ff,
        "h": c.n_ff,
        "o": c.n_embd,
        "y": c.n_embd,
        "logits": c.n_vocab,
    }
    if c.n_expert:
        widths |= dict.fromkeys(("gate", "up", "h"), c.expert_neurons)
        widths |= {"router": c.n_expert, "sums": c.n_embd}
    return widths | {f"r{rank}": rank for rank in ranks}

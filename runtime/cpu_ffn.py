"""The CPU's part of a layer's FFN, as nodes: dense, sparse, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..formats.config import ModelConfig
from .graph import part
from .sparsity import Plan

_WHOLE = ("ffn_pred_a", "ffn_gate_inp", "ffn_bypass")  # matrices whose rows are no neurons


@dataclass(frozen=True)
class FFN:
    """Makes the nodes of one layer, from f (normed) to `to`: added to x (base " x"), or alone in o (base "").

    n_cold: of a layer that is split, the neurons that are not on the GPU; 0 for all. append: as _Decoder._add; bias:
    the name of a tensor's bias, if there is one. A bypass comes first of what is added or set: after the last that
    reads the residual as it was (a predictor, an observer), and where threads meet anyway.
    """

    layer: int
    n_cold: int
    to: str
    base: str
    append: Callable[..., None]
    bias: Callable[[str], str]

    def dense(self, config: ModelConfig) -> None:
        """All neurons."""
        if config.gated:
            self._add("matmul", "f", "gate", "ffn_gate")
        self._add("matmul", "f", "up" if config.gated else "gate", "ffn_up")
        reads, floor = "gate up" if config.gated else "gate", config.activation_floors[self.layer]
        self._add("activate", reads, "gate h", function=config.activation, threshold=floor)
        base = self._bypass(config)
        self._add("matmul", f"h{base}", self.to, "ffn_down")

    def sparse(self, config: ModelConfig, plan: Plan, ranks: tuple[int, ...], widths: dict[str, int]) -> None:
        """A selection, then two branches: the listed neurons, or all of them with the inactive ones set to zero."""
        layer, n_cold = self.layer, self.n_cold
        active, threshold, function = f"active.{layer}", plan.thresholds[layer], config.activation
        width = f":{n_cold}" if n_cold else ""
        gate, up, h, scores, picked = (f"{value}{width}" for value in ("gate", "up", "h", "scores", "picked"))
        widths |= dict.fromkeys((gate, up, h, scores, picked), n_cold or config.n_ff)
        first = "ffn_gate" if config.gated else "ffn_up"
        other = f" {up}" if config.gated else ""
        limit = n_cold or plan.limit
        add = self._add
        if plan.predictor:
            r, cut = f"r{ranks[layer]}", self._name("ffn_pred_cut")
            add("matmul", "f" if plan.predictor_input == "ffn_norm" else "x", r, "ffn_pred_a")
            if plan.predictor == "relu":
                add("activate", r, r, function="relu")
            add("matmul", r, scores, "ffn_pred_b")
            add("select", scores, f"{active} {picked}", cut=cut, limit=limit)
            base = self._bypass(config)
            add("rows", f"f {active}", gate, first, "sparse")
            if config.gated:
                add("rows", f"f {active}", up, "ffn_up", "sparse")
            floor = config.activation_floors[layer]
            reads = f"{gate}{other} {picked} {active}"
            add("activate", reads, gate, "", "sparse", function=function, threshold=floor)
            self._down(gate, base, active)
            add("matmul", "f", gate, first, "dense")
            if config.gated:
                add("matmul", "f", up, "ffn_up", "dense")
            rule: dict[str, Any] = {"function": function, "cut": cut, "threshold": floor}
            add("activate", f"{gate}{other} {scores}", f"{gate} {h}", "", "dense", **rule)
        else:
            add("matmul", "f", gate, first)
            add("select", gate, f"{active} {picked}", limit=limit, threshold=threshold)
            base = self._bypass(config)
            if config.gated:
                add("rows", f"f {picked} {active}", up, "ffn_up", "sparse", function=function, threshold=threshold)
                self._down(up, base, active)
                add("matmul", "f", up, "ffn_up", "dense")
            else:
                add("activate", f"{picked} {active}", picked, "", "sparse", function=function, threshold=threshold)
                self._down(picked, base, active)
            add("activate", f"{gate}{other}", f"{gate} {h}", "", "dense", function=function, threshold=threshold)
        if plan.dense_from_t or n_cold:
            add("matmul_t", f"{h}{base}", self.to, "ffn_down_t", "dense")
        else:
            add("matmul", f"{h}{base}", self.to, "ffn_down", "dense")

    def experts(self, config: ModelConfig, plan: Plan | None) -> None:
        """The experts that the router chooses for each token; of a split layer, those that are not on the GPU."""
        threshold = plan.thresholds[self.layer] if plan else config.activation_floors[self.layer]
        self._add("matmul", "f", "router", "ffn_gate_inp")
        here = part(f"blk.{self.layer}.experts", "cold") if self.n_cold else ""
        self.append("route", "router", "routed", here, layer=self.layer)
        self._add("experts", "f routed", "gate", "ffn_gate_exps", rows="pairs")
        self._add("experts", "f routed", "up", "ffn_up_exps", rows="pairs")
        function = config.activation
        self._add("activate", "gate up routed", "gate h", rows="pairs", function=function, threshold=threshold)
        self._add("experts", "h routed", "sums", "ffn_down_exps", rows="pairs")
        self._add("combine", f"sums{self.base} routed", self.to)

    def _bypass(self, config: ModelConfig) -> str:
        """What there is of the result so far, for ffn_down to be added to: with a bypass, what that made."""
        if not config.has("ffn_bypass.weight"):
            return self.base
        self._add("matmul", f"f{self.base}", self.to, "ffn_bypass")
        return f" {self.to}"

    def _down(self, h: str, base: str, active: str) -> None:
        self._add("down", f"{h}{base} {active}", self.to, "ffn_down_t", "sparse")

    def _name(self, name: str) -> str:
        tensor = f"blk.{self.layer}.{name}"
        return part(tensor, "cold") if self.n_cold else tensor

    def _add(self, op: str, reads: str, writes: str, name: str = "", branch: str = "", **rest: str | float) -> None:
        bias = self.bias(f"blk.{self.layer}.{name.removesuffix('_t')}") if name else ""
        if name in _WHOLE or name.endswith("_exps"):
            tensor = f"blk.{self.layer}.{name}.weight"
        else:
            tensor = self._name(f"{name}.weight") if name else ""
            bias = part(bias, "cold") if bias and self.n_cold and name not in ("ffn_down", "ffn_down_t") else bias
        self.append(op, reads, writes, tensor, "cpu", layer=self.layer, branch=branch, bias=bias, **rest)

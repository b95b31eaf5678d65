"""What the FFNs have done so far: active neurons, bytes of weights read, experts chosen, the predictors' time."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .cpu.layout import Choice, Routing, Row

if TYPE_CHECKING:
    from ..formats.config import ModelConfig
    from .cpu.assemble import Tape
    from .graph import Node
    from .sparsity import Plan
    from .tensors import Tensors


@dataclass(frozen=True)
class Usage:
    """Sums over all steps and layers of an engine; the difference of two is what happened between.

    steps: steps taken. places, active: (token, neuron) pairs in all, and those active; both 0 for a dense engine.
    ffn_bytes: bytes of FFN weights read, predictors, routers and bypasses included; dense_bytes: what reading all
    weights in every step would have been. ticks, predictor_ticks: clock ticks of one thread in all ops, and in
    predictors. experts: int64 [n_layer, n_expert], how many tokens chose each expert, of layers that the CPU has a part
    in; None where there are no experts. The active neurons of a mixture are those of the chosen experts. layers: places
    and active by layer, int64 [2, n_layer]; None for a dense engine.
    """

    steps: int = 0
    places: int = 0
    active: int = 0
    ffn_bytes: int = 0
    dense_bytes: int = 0
    ticks: int = 0
    predictor_ticks: int = 0
    experts: NDArray[np.int64] | None = field(default=None, compare=False)
    layers: NDArray[np.int64] | None = field(default=None, compare=False)

    def __sub__(self, other: Usage) -> Usage:
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Usage(*(b if a is None else a if b is None else a - b for a, b in pairs))

    @property
    def density(self) -> float:
        """Active share of the neurons; 1 for a dense engine."""
        return self.active / self.places if self.places else 1.0

    @property
    def step_bytes(self) -> float:
        """Bytes of FFN weights that a step reads."""
        return self.ffn_bytes / max(1, self.steps)

    @property
    def byte_share(self) -> float:
        """Bytes of FFN weights read, over those that a dense engine reads."""
        return self.ffn_bytes / self.dense_bytes if self.dense_bytes else 1.0

    @property
    def predictor_share(self) -> float:
        """Predictors' share of the time; 0 where the machine has no clock that a program may read."""
        return self.predictor_ticks / self.ticks if self.ticks else 0.0


@dataclass(frozen=True)
class HotUsage:
    """What the GPU did: the neurons it has and the active (token, neuron) pairs, by layer, and the tokens it saw."""

    hot: tuple[int, ...]
    tokens: int
    active: NDArray[np.integer]


def usage(
    tape: Tape, tensors: Tensors, config: ModelConfig, plan: Plan | None, steps: int, gpu: HotUsage | None = None
) -> Usage:
    """The usage of a tape since it was made, and of the GPU beside it.

    Bytes read on the GPU are counted as for tokens one by one.
    """
    if config.n_expert:
        return _mixture(tape, tensors, config, steps, gpu)
    sizes = [_sizes(tensors, layer) for layer in range(config.n_layer)]
    bypass = sum(size["ffn_bypass"] for size in sizes)
    dense = bypass + sum(size["ffn_gate"] + size["ffn_up"] + size["ffn_down"] for size in sizes)
    if plan is None:
        return Usage(steps, ffn_bytes=steps * dense, dense_bytes=steps * dense)
    choices = tape.buffers["choices"].view(np.int64).reshape(-1, len(Choice)) if "choices" in tape.buffers else None
    layers, read = np.zeros((2, config.n_layer), np.int64), steps * bypass
    for layer, size in enumerate(sizes):
        always = size["ffn_pred_a"] + size["ffn_pred_b"] if plan.predictor else size["ffn_gate"]
        by_list = (0 if not plan.predictor else size["ffn_gate"]) + size["ffn_up"] + size["ffn_down_t"]
        n_hot = gpu.hot[layer] if gpu else 0
        if gpu and n_hot:
            pairs = int(gpu.active[layer])
            layers[:, layer] += gpu.tokens * n_hot, pairs
            read += (gpu.tokens * always * n_hot + pairs * by_list) // config.n_ff
        n_cold = config.n_ff - n_hot
        if choices is None or not n_cold:
            continue
        own = {name: int(choices[layer, getattr(Choice, name) // 8]) for name in Choice._fields}
        whole = size["ffn_gate"] + size["ffn_up"] + size["ffn_down_t" if plan.dense_from_t or n_hot else "ffn_down"]
        if plan.predictor:
            whole += always
        layers[:, layer] += own["tokens"] * n_cold, own["active"]
        read += own["listed"] * by_list // config.n_ff
        read += (own["sparse_steps"] * always + own["dense_steps"] * whole) * n_cold // config.n_ff
    ticks = tape.rows[:, Row.ticks // 8]
    predicting = [bool(plan.predictor) and _predicts(node) for node in tape.nodes]
    places, active = layers.sum(axis=1).tolist()
    own_ticks = int(ticks.sum()), int(ticks[predicting].sum())
    return Usage(steps, places, active, read, steps * dense, *own_ticks, layers=layers)


def _mixture(tape: Tape, tensors: Tensors, config: ModelConfig, steps: int, gpu: HotUsage | None) -> Usage:
    """The usage of a mixture of experts: of its experts, those are read that a token of the step has chosen."""
    ticks = int(tape.rows[:, Row.ticks // 8].sum())
    heat = np.zeros((config.n_layer, config.n_expert), np.int64)
    if "heat" in tape.buffers:
        heat += tape.buffers["heat"].view(np.int64).reshape(heat.shape)
    routings = tape.buffers["routing"].view(np.int64).reshape(-1, len(Routing)) if "routing" in tape.buffers else None
    layers, read, dense = np.zeros((2, config.n_layer), np.int64), 0, 0
    for layer in range(config.n_layer):
        names = (f"blk.{layer}.{name}.weight" for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"))
        experts = sum(tensors.info(name).nbytes for name in names)
        router = tensors.info(f"blk.{layer}.ffn_gate_inp.weight").nbytes
        dense += steps * (router + experts)
        n_hot = gpu.hot[layer] if gpu else 0
        if gpu and n_hot:
            pairs = int(gpu.active[layer])
            layers[:, layer] += gpu.tokens * n_hot, pairs
            read += gpu.tokens * router + pairs * experts // config.n_ff
        n_cold = config.n_ff - n_hot
        if routings is None or not n_cold:
            continue
        own = {name: int(routings[layer, getattr(Routing, name) // 8]) for name in Routing._fields}
        layers[:, layer] += own["tokens"] * n_cold, own["pairs"] * config.expert_neurons
        read += steps * router + own["read"] * experts // config.n_expert
    places, active = layers.sum(axis=1).tolist()
    return Usage(steps, places, active, read, dense, ticks, experts=heat, layers=layers)


def _predicts(node: Node) -> bool:
    """A predictor's matmul, the rectifying between its two, or the selection by its scores."""
    return node.op == "select" or "ffn_pred" in node.weight or (node.op == "activate" and len(node.reads) == 1)


def _sizes(tensors: Tensors, layer: int) -> dict[str, int]:
    """Bytes of a layer's FFN matrices; ffn_down counts as ffn_down_t where there is no other."""
    names = ("ffn_gate", "ffn_up", "ffn_down", "ffn_down_t", "ffn_pred_a", "ffn_pred_b", "ffn_bypass")
    found = {name: f"blk.{layer}.{name}.weight" for name in names}
    sizes = {name: tensors.info(full).nbytes if full in tensors else 0 for name, full in found.items()}
    if not sizes["ffn_gate"]:  # the only projection decides
        sizes["ffn_gate"], sizes["ffn_up"] = sizes["ffn_up"], 0
    sizes["ffn_down"] = sizes["ffn_down"] or sizes["ffn_down_t"]
    sizes["ffn_down_t"] = sizes["ffn_down_t"] or sizes["ffn_down"]  # dropped after it was split
    return sizes

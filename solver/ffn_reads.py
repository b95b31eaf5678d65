"""Bytes of FFN weights that a token reads, so that densities with different overheads can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .transpose import down_t_type

if TYPE_CHECKING:
    from ..runtime.engine import Engine


def read_share(engine: Engine, densities: np.ndarray) -> float:
    """At these shares of active neurons (by layer), over the bytes of gate, up and down alone.

    What is always read counts in full: the gate, or the predictor instead, a bypass, a router.
    """
    c, plan = engine.config, engine.plan
    files = [engine.file, *([engine.section.image] if engine.section else [])]

    def size(layer: int, name: str) -> int:
        full = f"blk.{layer}.{name}.weight"
        return next((file.info(full).nbytes for file in files if full in file), 0)

    read = whole = 0.0
    for layer, density in enumerate(densities.tolist()):
        if c.n_expert:
            experts = sum(size(layer, f"ffn_{part}_exps") for part in ("gate", "up", "down"))
            whole += experts
            read += size(layer, "ffn_gate_inp") + density * experts
            continue
        gate, up = (size(layer, name) for name in (("ffn_gate", "ffn_up") if c.gated else ("ffn_up", "")))
        down_t = size(layer, "ffn_down_t")
        down = size(layer, "ffn_down") or down_t
        if plan and not down_t:  # made at load
            kind = down_t_type(engine.file, c)
            down_t = c.n_embd * c.n_ff // kind.block_size * kind.type_size
        predictor = size(layer, "ffn_pred_a") + size(layer, "ffn_pred_b") if plan and plan.predictor else 0
        whole += gate + up + down
        read += size(layer, "ffn_bypass") + predictor
        if plan is None:
            read += gate + up + down
        elif density * c.n_ff > plan.limit:  # a step that would list more is dense
            read += gate + up + (down_t if plan.dense_from_t else down)
        else:
            read += density * (up + down_t) + (density if predictor else 1.0) * gate
    return read / whole

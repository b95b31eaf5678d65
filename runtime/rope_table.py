"""Cosines and sines of rotary position embeddings, for the scaling kinds that GGUF names."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ..formats.config import ModelConfig, RopeScaling
from .tensors import Tensors

_STEP = 512  # positions computed at a time


class RopeTable:
    """float32 [n_ctx, rope_dim]: cosines of the rope_dim / 2 angles, then their sines; filled as positions are needed.

    Formulas: RoFormer (Su et al. 2021); linear scaling (Chen et al. 2023); YaRN (Peng et al. 2023) with ggml's ramp
    over dimension pairs; Llama 3's frequency factors divide the frequencies.
    """

    def __init__(self, config: ModelConfig, n_ctx: int, factors: np.ndarray | None) -> None:
        self.table = np.empty((n_ctx, config.rope_dim), np.float32)
        self._filled = 0
        self._frequencies, self._magnitude = _frequencies(config, factors)

    def upto(self, n: int) -> None:
        """Make positions 0..n-1 valid."""
        while self._filled < n:
            end = min(self._filled + _STEP, len(self.table))
            angles = np.arange(self._filled, end, dtype=np.float64)[:, None] * self._frequencies
            half = angles.shape[1]
            self.table[self._filled : end, :half] = np.cos(angles) * self._magnitude
            self.table[self._filled : end, half:] = np.sin(angles) * self._magnitude
            self._filled = end


def rope_tables(config: ModelConfig, n_ctx: int, tensors: Tensors) -> tuple[RopeTable, RopeTable]:
    """The tables of layers without and with a sliding window; one and the same, where the model has one base.

    LongRoPE (Ding et al. 2024) divides frequencies by other factors in long contexts than in those trained at first; as
    in llama.cpp, what counts is how long the context may become.
    """
    long = n_ctx > config.rope_scaling.orig_ctx
    name = "rope_freqs.weight"
    if config.rope_scaling.kind == "longrope":
        name = f"rope_factors_{'long' if long else 'short'}.weight"
    table = RopeTable(config, n_ctx, tensors.dequantized(name) if name in tensors else None)
    if not config.local_base:
        return table, table
    local = replace(config, rope_base=config.local_base, rope_scaling=RopeScaling())
    return table, RopeTable(local, n_ctx, None)


def _frequencies(config: ModelConfig, factors: np.ndarray | None) -> tuple[np.ndarray, float]:
    """Radians per position of each pair (float64 [rope_dim / 2]), and the factor on both cosine and sine."""
    dims, scaling = config.rope_dim, config.rope_scaling
    pairs = np.arange(dims // 2, dtype=np.float64)
    plain = config.rope_base ** (-2.0 * pairs / dims)
    if factors is not None:
        plain = plain / factors.astype(np.float64)
    interpolated = plain / scaling.factor
    if scaling.kind != "yarn" or scaling.ext_factor == 0.0:
        return (interpolated if scaling.kind != "none" else plain), scaling.attn_factor

    def pair_with(rotations: float) -> float:
        """The pair that turns `rotations` times within the original context."""
        return dims * math.log(scaling.orig_ctx / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_base))

    low = max(0.0, math.floor(pair_with(scaling.beta_fast)))
    high = min(dims - 1.0, math.ceil(pair_with(scaling.beta_slow)))
    ramp = 1.0 - np.clip((pairs - low) / max(0.001, high - low), 0.0, 1.0)
    mix = ramp * scaling.ext_factor
    magnitude = scaling.attn_factor * (1.0 + 0.1 * math.log(scaling.factor))
    return interpolated * (1.0 - mix) + plain * mix, magnitude

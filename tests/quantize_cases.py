"""Shapes of models whose tensors' types llama-quantize was asked for, and weights whose rounding it was measured on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hotcold.formats.mixes import Facts

HERE = Path(__file__).parent
TYPES = HERE / "unit" / "quantize_types.json"  # {case: {mix: {tensor, less blk.N.: types by layer}}}
ERRORS = HERE / "kernels" / "encode_errors.json"  # {weights: {type: [root mean square error, same with importance]}}
REAL = HERE / "kernels" / "real_weights.npy"  # float16 [64, 576], of SmolLM2-135M-Instruct's token_embd (Apache 2.0)


@dataclass(frozen=True)
class Case:
    """A model of n_layer layers that are n wide, of rows too short for anything but counting."""

    arch: str = "llama"
    n_layer: int = 32
    n_head_kv: int = 8
    n: int = 256
    n_expert: int = 0
    tied: bool = False
    fused: bool = False
    gated: bool = True
    importance: bool = False
    keys: Mapping[str, float] = field(default_factory=dict)

    @property
    def facts(self) -> Facts:
        return Facts(self.arch, self.n_layer, 8, self.n_head_kv, self.n_expert, self.tied, self.importance)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in ggml order."""
        n, n_kv = self.n, self.n // 8 * self.n_head_kv
        yield "token_embd.weight", (n, 256)
        for layer in range(self.n_layer):
            blk = f"blk.{layer}."
            yield blk + "attn_norm.weight", (n,)
            if self.fused:
                yield blk + "attn_qkv.weight", (n, n + 2 * n_kv)
            else:
                yield blk + "attn_q.weight", (n, n)
                yield blk + "attn_k.weight", (n, n_kv)
                yield blk + "attn_v.weight", (n, n_kv)
            yield blk + "attn_output.weight", (n, n)
            if self.n_expert:
                yield blk + "ffn_gate_inp.weight", (n, self.n_expert)
                for part in ("gate", "up", "down"):
                    yield f"{blk}ffn_{part}_exps.weight", (n, n, self.n_expert)
            else:
                for part in ("gate", "up", "down") if self.gated else ("up", "down"):
                    yield f"{blk}ffn_{part}.weight", (n, n)
        yield "output_norm.weight", (n,)
        if not self.tied:
            yield "output.weight", (n, 256)


CASES = {
    "llama": Case(),
    "llama, shared values": Case(n_layer=22, n_head_kv=2),
    "llama, 70B": Case(n_layer=80, n_head_kv=1),
    "llama, tied": Case("llama", 16, 2, tied=True),
    "llama, imatrix": Case(importance=True),
    "mixtral": Case(n_head_kv=2, n_expert=8, keys={"expert_used_count": 2}),
    "qwen3moe": Case("qwen3moe", 12, 2, n_expert=16, keys={"expert_used_count": 4, "expert_feed_forward_length": 256}),
    "falcon": Case("falcon", 32, 1, fused=True, gated=False, keys={"attention.layer_norm_epsilon": 1e-5}),
    "gpt2, rows of 96": Case("gpt2", 12, 8, 96, fused=True, gated=False, keys={"attention.layer_norm_epsilon": 1e-5}),
}


def weights() -> dict[str, np.ndarray]:
    """Rows of 256 weights each, float32."""
    rng = np.random.default_rng(5)
    shape = (96, 256)
    real = np.load(REAL).astype(np.float32).reshape(-1, 256)
    return {
        "normal": rng.standard_normal(shape, np.float32) * np.float32(0.02),
        "outliers": (rng.standard_t(3, shape) * 0.02).astype(np.float32),
        "shifted": (rng.standard_normal(shape) * 0.1 + 0.25).astype(np.float32),
        "real": real,
    }


def importance() -> np.ndarray:
    """What 256 columns count: float32, from near nothing to a lot."""
    return (np.random.default_rng(6).standard_normal(256) ** 2 + 0.01).astype(np.float32)


def error(decoded: np.ndarray, values: np.ndarray, counts: np.ndarray | float = 1.0) -> float:
    """Root mean square error, weighted."""
    return float(np.sqrt(np.mean(counts * (decoded.reshape(values.shape) - values).astype(np.float64) ** 2)))


def by_kind(types: Mapping[str, str]) -> dict[str, str]:
    """Types by tensor -> by name less its layer, equal ones of consecutive layers counted: "Q6_K 4, Q4_K 28"."""
    rows: dict[str, list[str]] = {}
    for name in sorted(types, key=lambda name: int(name.split(".")[1]) if name.startswith("blk.") else 0):
        kind = name.split(".", 2)[2] if name.startswith("blk.") else name
        rows.setdefault(kind, []).append(types[name])
    return {
        kind: ", ".join(f"{key} {len(list(group))}" for key, group in itertools.groupby(row))
        for kind, row in sorted(rows.items())
    }

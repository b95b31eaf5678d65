"""Slow NumPy oracles for kernels and engine, independent of hotcold: files are read with gguf's own reader.

The forward pass agrees with llama.cpp to 1e-6 on F32 models, for every rope scaling kind that it covers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize as gguf_dequantize

Array = np.ndarray
QType = GGMLQuantizationType

# For each block format: byte offset of the f16 scale, byte offset of the f16 minimum (or None), the minimum
# as a multiple of the scale that centres random quants on zero, and the standard deviation at scale 1.
_BLOCKS: dict[QType, tuple[int, int | None, float, float]] = {
    QType.Q4_0: (0, None, 0.0, 4.61),
    QType.Q4_1: (0, 2, -7.5, 4.61),
    QType.Q5_0: (0, None, 0.0, 9.23),
    QType.Q5_1: (0, 2, -15.5, 9.23),
    QType.Q8_0: (0, None, 0.0, 73.9),
    QType.Q2_K: (80, 82, 1.5, 13.5),
    QType.Q3_K: (108, None, 0.0, 43.5),
    QType.Q4_K: (0, 2, 7.5, 258.0),
    QType.Q5_K: (0, 2, 15.5, 534.0),
    QType.Q6_K: (208, None, 0.0, 1366.0),
}
FLOAT_TYPES = (QType.F32, QType.F16, QType.BF16)
QUANT_TYPES = tuple(_BLOCKS)
COMPUTED_TYPES = FLOAT_TYPES + QUANT_TYPES


def row_bytes(qtype: QType, n_cols: int) -> int:
    """Bytes of one row of n_cols weights; ValueError when n_cols is not a whole number of blocks."""
    block, size = GGML_QUANT_SIZES[qtype]
    if n_cols % block:
        raise ValueError(f"{qtype.name} rows must be a multiple of {block}, got {n_cols}")
    return n_cols // block * size


def random_blocks(qtype: QType, n_rows: int, n_cols: int, rng: np.random.Generator, std: float = 0.07) -> Array:
    """Random valid weights of a type, uint8 (n_rows, bytes of a row), with about this standard deviation.

    Quant fields are uniform random bytes, so every code is met; scales vary by +-25 % between blocks, and
    half of them are negative in the types without a minimum, as in real files.
    """
    n_bytes = row_bytes(qtype, n_cols)
    if qtype in FLOAT_TYPES:
        weights = rng.standard_normal((n_rows, n_cols), dtype=np.float32) * np.float32(std)
        if qtype == QType.F32:
            return weights.view(np.uint8)
        if qtype == QType.F16:
            return weights.astype(np.float16).view(np.uint8)
        return (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    scale_at, min_at, centre, unit_std = _BLOCKS[qtype]
    size = GGML_QUANT_SIZES[qtype][1]
    blocks = rng.integers(0, 256, (n_rows * n_bytes // size, size), dtype=np.uint8)
    scale = (std / unit_std * rng.uniform(0.75, 1.25, (len(blocks), 1))).astype(np.float16)
    if min_at is None:
        scale[::2] *= np.float16(-1)
    else:
        blocks[:, min_at : min_at + 2] = (scale * np.float16(centre)).view(np.uint8)
    blocks[:, scale_at : scale_at + 2] = scale.view(np.uint8)
    return blocks.reshape(n_rows, n_bytes)


def dequantize(data: Array, qtype: QType) -> Array:
    """Weights float32 (n_rows, n_cols) of raw rows uint8 (n_rows, bytes of a row), through gguf.quants."""
    data = np.ascontiguousarray(data)
    if qtype in (QType.F32, QType.F16):
        return data.view(np.float32 if qtype == QType.F32 else np.float16).astype(np.float32)
    return gguf_dequantize(data, qtype)


def quantise_q8(x: Array) -> tuple[Array, Array]:
    """Symmetric 8-bit blocks of 32 as ggml's Q8_0: (int8 like x, float32 scales (..., n / 32))."""
    blocks = np.asarray(x, np.float32).reshape(*x.shape[:-1], -1, 32)
    scale = np.abs(blocks).max(axis=-1) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    scaled = blocks * inverse[..., None]
    rounded = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))  # roundf: halves away from zero
    return rounded.astype(np.int8).reshape(x.shape), scale


def dequantise_q8(q: Array, scale: Array) -> Array:
    """Inverse of quantise_q8, float32 like q."""
    return (q.reshape(*q.shape[:-1], -1, 32).astype(np.float32) * scale[..., None]).reshape(q.shape)


def matvec(data: Array, qtype: QType, x: Array, q8: bool = False) -> Array:
    """W @ x in float64 for raw rows; x is (n_cols,) or (n_tokens, n_cols); q8 rounds x first."""
    weights = dequantize(data, qtype).astype(np.float64)
    x = dequantise_q8(*quantise_q8(x)) if q8 else x
    return np.asarray(x, np.float64) @ weights.T


def rmsnorm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight along the last axis."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * weight


def silu(x: Array) -> Array:
    """x * sigmoid(x), without overflow for large negative x."""
    return x * 0.5 * (1 + np.tanh(x / 2))


def gelu(x: Array) -> Array:
    """GELU's tanh form (arXiv:1606.08415, section 2)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: Array) -> Array:
    """GELU as defined, x * Phi(x) (arXiv:1606.08415, section 1)."""
    erfc = np.vectorize(math.erfc, otypes=[np.float64])
    return x * 0.5 * erfc(-np.asarray(x, np.float64) / math.sqrt(2)).astype(x.dtype)


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_erf": gelu_erf,
    "relu": relu,
    "relu2": lambda x: relu(x) ** 2,
    "drelu": relu,
}


def glu(gate: Array, up: Array, activation: str = "silu") -> Array:
    """act(gate) * up; drelu rectifies both."""
    return ACTIVATIONS[activation](gate) * (relu(up) if activation == "drelu" else up)


@dataclass
class Rope:
    """Rotary embedding parameters, under ggml's names; factors divide the angle of each pair."""

    n_dims: int
    base: float = 10000.0
    style: str = "norm"
    freq_scale: float = 1.0
    ext_factor: float = 0.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    orig_ctx: int = 0
    factors: Array | None = None

    def angles(self, positions: Array) -> tuple[Array, float]:
        """(angles (n_tokens, n_dims / 2), magnitude scale) as ggml's rope_yarn computes them."""
        pair = np.arange(self.n_dims // 2)
        extrapolated = np.asarray(positions)[:, None] * self.base ** (-2.0 * pair / self.n_dims)
        if self.factors is not None:
            extrapolated = extrapolated / self.factors
        interpolated = extrapolated * self.freq_scale
        if self.ext_factor == 0:
            return interpolated, self.attn_factor
        low = max(0.0, math.floor(self._correction(self.beta_fast)))
        high = min(self.n_dims - 1.0, math.ceil(self._correction(self.beta_slow)))
        ramp = 1 - np.clip((pair - low) / max(0.001, high - low), 0, 1)
        mix = ramp * self.ext_factor
        magnitude = self.attn_factor * (1 + 0.1 * math.log(1 / self.freq_scale))
        return interpolated * (1 - mix) + extrapolated * mix, magnitude

    def _correction(self, rotations: float) -> float:
        wavelengths = math.log(self.orig_ctx / (rotations * 2 * math.pi))
        return self.n_dims * wavelengths / (2 * math.log(self.base))


def rope(x: Array, positions: Array, params: Rope) -> Array:
    """Rotate x (n_tokens, n_heads, head_dim): pairs (2i, 2i+1) for "norm", (i, i + n_dims/2) for "neox"."""
    angles, magnitude = params.angles(positions)
    cos, sin = np.cos(angles)[:, None] * magnitude, np.sin(angles)[:, None] * magnitude
    half = params.n_dims // 2
    first, second = {
        "norm": (slice(0, params.n_dims, 2), slice(1, params.n_dims, 2)),
        "neox": (slice(0, half), slice(half, params.n_dims)),
    }[params.style]
    out = np.array(x)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def attention(q: Array, k: Array, v: Array, scale: float | None = None, window: int = 0, softcap: float = 0.0) -> Array:
    """Causal attention (n_q, n_head, v_dim) of the last n_q of n_kv tokens; GQA: head h reads h // group.

    q (n_q, n_head, dim), k (n_kv, n_head_kv, dim), v (n_kv, n_head_kv, v_dim). With a window, a query sees a
    key when their distance is less than the window. softcap: scores become cap * tanh(score / cap).
    """
    n_q, n_head, dim = q.shape
    n_kv, n_head_kv, _ = k.shape
    group = n_head // n_head_kv
    scale = 1 / math.sqrt(dim) if scale is None else scale
    distance = np.arange(n_kv - n_q, n_kv)[:, None] - np.arange(n_kv)[None, :]
    hidden = (distance < 0) | ((distance >= window) if window else False)
    out = np.empty((n_q, n_head, v.shape[2]), np.result_type(q, v))
    for head in range(n_head):
        scores = q[:, head] @ k[:, head // group].T * scale
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        scores[hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, head // group]
    return out


@dataclass
class Model:
    """A llama, qwen2, qwen3moe or olmoe model in NumPy; the fields may be changed to make a deliberately wrong one.

    heat [n_layer, n_expert]: how many tokens have chosen each expert so far; gap: the least difference of logits
    between a chosen expert and one that was not. floors: by layer, of activated gates.
    """

    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    eps: float
    rope: Rope
    window: int
    activation: str
    tensors: dict[str, Array] = field(repr=False)
    quantised: set[str] = field(repr=False, default_factory=set)
    q8: bool = False
    kv_f16: bool = False
    n_used: int = 0
    weights_norm: bool = True
    floors: list[float] = field(default_factory=list)
    gap: float = math.inf
    heat: Array = field(repr=False, default_factory=lambda: np.zeros((0, 0), int))

    def forward(self, ids: Sequence[int]) -> Array:
        """Logits float64 (len(ids), n_vocab), one row a token.

        q8 rounds the activations that meet quantised weights, kv_f16 the cached keys and values.
        """
        return self._linear("output" if "output.weight" in self.tensors else "token_embd", self.hidden(ids))

    def hidden(self, ids: Sequence[int]) -> Array:
        """What the output head reads: float64 (len(ids), n_embd), the last block's result, normed."""
        x = self.tensors["token_embd.weight"][np.asarray(ids)]
        for layer in range(self.n_layer):
            x = x + self._attention(layer, self._norm(f"blk.{layer}.attn_norm", x))
            h = self._norm(f"blk.{layer}.ffn_norm", x)
            x = x + self._ffn(layer, h) + self._bypass(layer, h)
        return self._norm("output_norm", x)

    def _attention(self, layer: int, x: Array) -> Array:
        n, positions, name = len(x), np.arange(len(x)), f"blk.{layer}.attn_"
        q = rope(self._heads(name + "q", x, self.n_head), positions, self.rope)
        k = rope(self._heads(name + "k", x, self.n_head_kv), positions, self.rope)
        v = self._linear(name + "v", x).reshape(n, self.n_head_kv, -1)
        if self.kv_f16:
            k, v = (a.astype(np.float16).astype(a.dtype) for a in (k, v))
        return self._linear(name + "output", attention(q, k, v, window=self.window).reshape(n, -1))

    def _heads(self, name: str, x: Array, n: int) -> Array:
        """Queries or keys (n_tokens, n, head_dim), normed over each head or over all, as wide as the weights are."""
        y = self._linear(name, x)
        weight = self.tensors.get(name + "_norm.weight")
        if weight is not None:
            y = rmsnorm(y.reshape(len(x), -1, weight.size), weight.reshape(-1), self.eps)
        return y.reshape(len(x), n, self.head_dim)

    def _ffn(self, layer: int, x: Array) -> Array:
        if f"blk.{layer}.ffn_gate_inp.weight" in self.tensors:
            return self._experts(layer, x)
        gate, up = self._linear(f"blk.{layer}.ffn_gate", x), self._linear(f"blk.{layer}.ffn_up", x)
        return self._linear(f"blk.{layer}.ffn_down", self._hidden(layer, gate, up))

    def _hidden(self, layer: int, gate: Array, up: Array) -> Array:
        """act(gate) * up, without gates that stay below the layer's floor once activated."""
        enough = np.abs(ACTIVATIONS[self.activation](gate)) >= self.floors[layer]
        return np.where(enough, glu(gate, up, self.activation), 0)

    def _bypass(self, layer: int, x: Array) -> Array | float:
        """What goes past the neurons of a layer."""
        name = f"blk.{layer}.ffn_bypass"
        return self._linear(name, x) if f"{name}.weight" in self.tensors else 0.0

    def _experts(self, layer: int, x: Array) -> Array:
        """Token by token: a softmax of the router's logits, and the experts that it gives most, weighted."""
        name, out = f"blk.{layer}.ffn_", np.zeros_like(x)
        logits = self._linear(name + "gate_inp", x)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = shares / shares.sum(axis=1, keepdims=True)
        for t, row in enumerate(x):
            chosen = np.argsort(-shares[t], kind="stable")[: self.n_used]
            rest = np.delete(logits[t], chosen)
            self.gap = min([self.gap, *(logits[t, chosen].min() - rest)])
            total = shares[t, chosen].sum() if self.weights_norm else 1.0
            for expert in chosen:
                gate = self._linear(name + "gate_exps", row, expert)
                h = self._hidden(layer, gate, self._linear(name + "up_exps", row, expert))
                out[t] += shares[t, expert] / total * self._linear(name + "down_exps", h, expert)
                self.heat[layer, expert] += 1
        return out

    def _norm(self, name: str, x: Array) -> Array:
        return rmsnorm(x, self.tensors[name + ".weight"], self.eps)

    def _linear(self, name: str, x: Array, expert: int | None = None) -> Array:
        weight = self.tensors[name + ".weight"]
        weight = weight if expert is None else weight[expert]
        if self.q8 and name + ".weight" in self.quantised:
            x = dequantise_q8(*quantise_q8(x)).astype(x.dtype)
        return x @ weight.T + self.tensors.get(name + ".bias", 0.0)


def load(path: str | Path, dtype: Any = np.float64, *, q8: bool = False, kv_f16: bool = False) -> Model:
    """Read a llama, qwen2, qwen3moe or olmoe GGUF with gguf's reader, all tensors dequantised to dtype."""
    reader = GGUFReader(str(path))
    keys = {name: f.contents() for name, f in reader.fields.items() if len(f.data) == 1}
    arch = keys["general.architecture"]
    tensors = {
        t.name: gguf_dequantize(t.data, t.tensor_type).astype(dtype).reshape(t.data.shape[:-1] + (-1,))
        for t in reader.tensors
    }
    said = reader.fields.get(f"{arch}.hidden_activation_threshold")
    floors = np.broadcast_to(said.contents() if said else 0.0, keys[f"{arch}.block_count"])
    n_head = keys[f"{arch}.attention.head_count"]
    head_dim = keys.get(f"{arch}.attention.key_length", keys[f"{arch}.embedding_length"] // n_head)
    kind = keys.get(f"{arch}.rope.scaling.type", "linear")  # llama.cpp: a factor without a type is linear
    factor = keys.get(f"{arch}.rope.scaling.factor", keys.get(f"{arch}.rope.scale_linear", 1.0))
    return Model(
        n_layer=keys[f"{arch}.block_count"],
        n_head=n_head,
        n_head_kv=keys.get(f"{arch}.attention.head_count_kv", n_head),
        head_dim=head_dim,
        eps=keys[f"{arch}.attention.layer_norm_rms_epsilon"],
        rope=Rope(
            n_dims=keys.get(f"{arch}.rope.dimension_count", head_dim),
            base=keys.get(f"{arch}.rope.freq_base", 10000.0),
            style="norm" if arch == "llama" else "neox",
            freq_scale=1.0 if kind == "none" else 1 / (factor or 1.0),
            ext_factor=1.0 if kind == "yarn" else 0.0,
            attn_factor=keys.get(f"{arch}.rope.scaling.attn_factor", 1.0),
            beta_fast=keys.get(f"{arch}.rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.get(f"{arch}.rope.scaling.yarn_beta_slow", 1.0),
            orig_ctx=keys.get(f"{arch}.rope.scaling.original_context_length", keys[f"{arch}.context_length"]),
            factors=tensors.get("rope_freqs.weight"),
        ),
        window=keys.get(f"{arch}.attention.sliding_window", 0),
        activation=keys.get(f"{arch}.hidden_activation", "silu"),
        floors=floors.tolist(),
        tensors=tensors,
        quantised={t.name for t in reader.tensors if t.tensor_type not in FLOAT_TYPES},
        q8=q8,
        kv_f16=kv_f16,
        n_used=keys.get(f"{arch}.expert_used_count", 0),
        weights_norm=arch != "olmoe",
        heat=np.zeros((keys[f"{arch}.block_count"], keys.get(f"{arch}.expert_count", 0)), int),
    )


def forward(path: str | Path, ids: Sequence[int], **options: Any) -> Array:
    """Logits float64 (len(ids), n_vocab) of a model file; options as load."""
    return load(path, **options).forward(ids)

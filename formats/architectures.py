"""The architectures that the decoder runs: each is a row of data, not a file of code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import UnsupportedError
from .gguf_header import show

# Shapes are in ggml order (row length first), in names that ModelConfig resolves: n_q = n_head * head_dim_k,
# n_k and n_v = n_head_kv * head_dim_k or _v, n_att = n_head * head_dim_v, n_rot = rope_dim / 2.
Shape = tuple[str, ...]

_MODEL: Mapping[str, Shape] = {"token_embd.weight": ("n_embd", "n_vocab"), "output_norm.weight": ("n_embd",)}
_MODEL_OPTIONAL: Mapping[str, Shape] = {
    "output.weight": ("n_embd", "n_vocab"),
    "rope_freqs.weight": ("n_rot",),
}
_BLOCK: Mapping[str, Shape] = {
    "attn_norm.weight": ("n_embd",),
    "attn_q.weight": ("n_embd", "n_q"),
    "attn_k.weight": ("n_embd", "n_k"),
    "attn_v.weight": ("n_embd", "n_v"),
    "attn_output.weight": ("n_att", "n_embd"),
    "ffn_norm.weight": ("n_embd",),
    "ffn_gate.weight": ("n_embd", "n_ff"),
    "ffn_up.weight": ("n_embd", "n_ff"),
    "ffn_down.weight": ("n_ff", "n_embd"),
}
_QKV_BIAS: Mapping[str, Shape] = {"attn_q.bias": ("n_q",), "attn_k.bias": ("n_k",), "attn_v.bias": ("n_v",)}
_OUTPUT_BIAS: Mapping[str, Shape] = {"attn_output.bias": ("n_embd",)}


@dataclass(frozen=True)
class Architecture:
    """What tells one architecture from another; block tensors are named without their `blk.N.`."""

    name: str
    rope_style: str  # "norm": pairs (2i, 2i+1); "neox": pairs (i, i + rope_dim/2)
    activation: str
    model_required: Mapping[str, Shape]
    model_optional: Mapping[str, Shape]
    block_required: Mapping[str, Shape]
    block_optional: Mapping[str, Shape]  # in every block or in none


ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row
    for row in (
        # Llama 1-3, Mistral, SmolLM2, TinyLlama, Yi: their files all say "llama".
        Architecture("llama", "norm", "silu", _MODEL, _MODEL_OPTIONAL, _BLOCK, {**_QKV_BIAS, **_OUTPUT_BIAS}),
        # SJTU's Bamboo is Mistral with ReLU on gate and up; only PowerInfer's llama.cpp names it.
        Architecture("bamboo", "norm", "drelu", _MODEL, _MODEL_OPTIONAL, _BLOCK, {}),
        Architecture("qwen2", "neox", "silu", _MODEL, _MODEL_OPTIONAL, {**_BLOCK, **_QKV_BIAS}, {}),
    )
}


def lookup(name: str) -> Architecture:
    """The row of that name; UnsupportedError lists the supported ones."""
    if name not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedError(f"architecture {show(name)} is not supported; supported: {supported}")
    return ARCHITECTURES[name]

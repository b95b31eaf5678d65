"""The vocabulary of the table of architectures: what a row can say, and the tensors that its features bring.

Shapes are in ggml order (row length first), in names that ModelConfig resolves: n_q = n_head * head_dim_k, n_k and
n_v = n_head_kv * head_dim_k or _v, n_qkv their sum, n_att = n_head * head_dim_v, n_dim = head_dim_k, n_rot =
rope_dim / 2, n_gate_up = 2 n_ff, n_one = the neurons of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .checkpoint_terms import Checkpoint

Shape = tuple[str, ...]
Group = Mapping[str, Shape]  # tensors that a file has all or none of; those of a block without their `blk.N.`


def weights(**shapes: str) -> Group:
    """Tensors `NAME.weight`; a shape is words."""
    return {f"{name}.weight": tuple(shape.split()) for name, shape in shapes.items()}


def biases(**widths: str) -> Group:
    """Vectors `NAME.bias`."""
    return {f"{name}.bias": (width,) for name, width in widths.items()}


def both(*groups: Group) -> Group:
    """Groups that come together."""
    return {name: shape for group in groups for name, shape in group.items()}


EMBEDDING = weights(token_embd="n_embd n_vocab")
POSITIONS = weights(position_embd="n_embd n_pos")  # learned ones, instead of rotations
OUTPUT_NORM, OUTPUT_NORM_BIAS = weights(output_norm="n_embd"), biases(output_norm="n_embd")
OUTPUT = weights(output="n_embd n_vocab")  # where it is missing, the embedding serves
ROPE_FREQS = weights(rope_freqs="n_rot")
ROPE_FACTORS = weights(rope_factors_long="n_rot", rope_factors_short="n_rot")

ATTN_NORM, ATTN_NORM_BIAS = weights(attn_norm="n_embd"), biases(attn_norm="n_embd")
SECOND_NORM = both(weights(attn_norm_2="n_embd"), biases(attn_norm_2="n_embd"))
FFN_NORM, FFN_NORM_BIAS = weights(ffn_norm="n_embd"), biases(ffn_norm="n_embd")
POST_NORMS = weights(post_attention_norm="n_embd", post_ffw_norm="n_embd")
QKV, QKV_BIAS = (
    weights(attn_q="n_embd n_q", attn_k="n_embd n_k", attn_v="n_embd n_v"),
    biases(attn_q="n_q", attn_k="n_k", attn_v="n_v"),
)
FUSED_QKV, FUSED_QKV_BIAS = weights(attn_qkv="n_embd n_qkv"), biases(attn_qkv="n_qkv")
OUT, OUT_BIAS = weights(attn_output="n_att n_embd"), biases(attn_output="n_embd")
HEAD_NORMS = weights(attn_q_norm="n_dim", attn_k_norm="n_dim")  # over each head, with the same weights
OWN_HEAD_NORMS = weights(attn_q_norm="n_dim n_head", attn_k_norm="n_dim n_kv")  # over each head, with its own
WHOLE_NORMS = weights(attn_q_norm="n_q", attn_k_norm="n_k")  # over all heads at once

UP_DOWN = weights(ffn_up="n_embd n_ff", ffn_down="n_ff n_embd")
GATED = both(weights(ffn_gate="n_embd n_ff"), UP_DOWN)
FUSED_GATED = weights(ffn_up="n_embd n_gate_up", ffn_down="n_ff n_embd")  # the gate's rows, then up's
UP_DOWN_BIAS = biases(ffn_up="n_ff", ffn_down="n_embd")
GATED_BIAS = both(biases(ffn_gate="n_ff"), UP_DOWN_BIAS)
BYPASS, BYPASS_BIAS = weights(ffn_bypass="n_embd n_embd"), biases(ffn_bypass="n_embd")
"""A linear map of the FFN's input, added to what its neurons make of it: any family with an FFN of its own may have it
(ReLU models that `hotcold relufy` made do)."""
EXPERTS = weights(
    ffn_gate_inp="n_embd n_expert",
    ffn_gate_exps="n_embd n_one n_expert",
    ffn_up_exps="n_embd n_one n_expert",
    ffn_down_exps="n_one n_embd n_expert",
)

MODEL_WIDE = both(EMBEDDING, POSITIONS, OUTPUT_NORM, OUTPUT_NORM_BIAS, OUTPUT, ROPE_FREQS, ROPE_FACTORS)
"""Tensors that are there once; all others belong to a block."""

LLAMA_BLOCK = both(ATTN_NORM, QKV, OUT, FFN_NORM)
"""What most families have beside their FFN: pre-norms, separate projections."""

FUSED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "attn_qkv": (("attn_q", "n_q"), ("attn_k", "n_k"), ("attn_v", "n_v")),
    "ffn_up": (("ffn_gate", "n_ff"), ("ffn_up", "n_ff")),
}
"""A fused tensor -> the tensors whose rows it has, in order; the second only where a row's FFN is FUSED_GATED."""


@dataclass(frozen=True)
class Architecture:
    """What tells one architecture from another; whatever a file says itself (KV keys) is taken from there.

    models: what it is known for. required: tensors of every model and block. optional: groups that a file has or has
    not. ffn: alternatives, of which a file has one. norm: "rms" or "layer". rope: "norm" turns pairs (2i, 2i+1), "neox"
    (i, i + rope_dim/2), "" nothing.
    gated: h = act(gate) * up, or else act(up). parallel: attention and FFN read the same residual: "yes", "key" (the
    file's use_parallel_residual says, by default so), "no ffn_norm" (where that is missing), or "".
    window: tokens of the sliding window, where the file does not say. window_every: each n-th layer has none (1: none
    has one); 0: all have. local_base: rope base of layers with a window, which have no scaling either; 0: as all.
    local_plain: the same base there, but no scaling. embd_scale: "" or "sqrt" (of n_embd). wide_heads: block
    counts of the sizes whose attention is scaled by n_embd / n_head instead of the head size. weights_norm: the chosen
    experts' weights are made to sum to 1. softcaps: of attention scores and logits, where the file does not say; 0:
    none. divides_logits: by logit_scale, instead of multiplying them. mixes: the rules of
    llama-quantize's that are for this family: "falcon" (its own), "70B" (more bits for attn_v of 80 layers) or "". hf:
    Hugging Face's side.
    """

    name: str
    models: str
    required: Group
    optional: tuple[Group, ...]
    ffn: tuple[Group, ...]
    norm: str = "rms"
    rope: str = "neox"
    activation: str = "silu"
    gated: bool = True
    parallel: str = ""
    window: int = 0
    window_every: int = 0
    local_base: float = 0.0
    local_plain: bool = False
    embd_scale: str = ""
    wide_heads: tuple[int, ...] = ()
    weights_norm: bool = True
    softcaps: tuple[float, float] = (0.0, 0.0)
    divides_logits: bool = False
    mixes: str = ""
    hf: Checkpoint = field(kw_only=True)

"""How a row of the table of architectures speaks of Hugging Face checkpoints, and the settings that they all share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .checkpoint_names import Names, llama_names

# {arch}.KEY -> names of the setting in config.json; every family has those that it needs
INTEGERS: Names = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "feed_forward_length": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
}
NUMBERS: Names = {
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling",),
}
EPSILON = {"rms": ("rms_norm_eps",), "layer": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")}
ACTIVATION = ("hidden_activation", "hidden_act", "activation_function", "activation")
ROTATED_PART = ("partial_rotary_factor", "rotary_pct", "rope_pct", "rope_percent", "rope_percentage")
ROPE_BASE = ("rope_theta", "rotary_emb_base")

FATRELU = "fatrelu"  # ReLU of what reaches hidden_act_param
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_python_tanh": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "relu_squared": "relu2",
    FATRELU: "relu",
}
"""A setting's word -> ours (`gelu` is the tanh form)."""


@dataclass(frozen=True)
class Checkpoint:
    """The Hugging Face side of an architecture.

    classes: what config.json calls it (`architectures`). names: tensors. prefix: of the model's body, which some
    checkpoints leave out. tied: the embedding is the output too, unless config.json says otherwise; own_output:
    other readers want a tensor for the output even so. norm_offset: added to the weights of norms. reordered: stem
    -> how its values lie: "transposed"; "grouped" (fused rows by K/V head: its queries, key, value); "offset" (two
    rows before the first position). ignored: tensors that hold no weights of ours (names, or beginnings that end in
    a dot). windows: which layers have the window: "" none, "all", "pattern" (all but each n-th), "late" (from
    max_window_layers on, if use_sliding_window); windowed: the classes of which that is true, () all. attn_scale:
    setting and power that scale attention's scores. one_kv_head: the setting that means it, and another that
    overrules. defaults: settings of config.json where it has none, class_defaults: of one class; ff_multiple: FFN
    width then, of n_embd. only: settings of which one value is supported. activated: whether config.json names the
    FFN's activation. keys: further {arch}.* keys. wrapped: classes of models for text and pictures, whose text part
    this is: settings in text_config, names of tensors below WRAPPED.
    """

    classes: tuple[str, ...]
    names: Names = field(default_factory=llama_names)
    prefix: str = "model."
    tied: bool = False
    own_output: bool = False
    norm_offset: float = 0.0
    reordered: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    windows: str = ""
    windowed: tuple[str, ...] = ()
    attn_scale: tuple[str, float] = ("", 1.0)
    one_kv_head: tuple[str, str] = ("", "")
    defaults: Mapping[str, Any] = field(default_factory=dict)
    class_defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ff_multiple: int = 0
    only: Mapping[str, Any] = field(default_factory=dict)
    activated: bool = True
    keys: Mapping[str, str] = field(default_factory=dict)
    wrapped: tuple[str, ...] = ()


WRAPPED = {"language_model.": "", "model.language_model.": "model."}
NO_TEXT = (  # beginnings of what such models have beside their text part
    "vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.",
)  # fmt: skip
IGNORED = (".rotary_emb.inv_freq",)  # ends of names, of any family: computed from the settings

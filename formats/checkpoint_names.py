"""What Hugging Face's checkpoints call the tensors, by family.

Tensors are mapped by stem: `attn_q` stands for `blk.N.attn_q.weight` and `.bias`. In a Hugging Face name {i} is the
block, and {n} counts what is stacked into one tensor: experts, or heads that have norms of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

Names = Mapping[str, tuple[str, ...]]
"""GGUF's stem -> Hugging Face's, of which a checkpoint has one."""


def names(prefix: str, block: str, **stems: str) -> Names:
    """Stems by GGUF's names: `.x` is one of the block, `x` of the model's body, `/x` of neither; `a|b`: either."""

    def full(stem: str) -> str:
        if stem.startswith("/"):
            return stem[1:]
        return prefix + block + stem if stem.startswith(".") else prefix + stem

    return {name: tuple(full(stem) for stem in text.split("|")) for name, text in stems.items()}


_LLAMA = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "/lm_head",
    "attn_norm": ".input_layernorm",
    "attn_q": ".self_attn.q_proj",
    "attn_k": ".self_attn.k_proj",
    "attn_v": ".self_attn.v_proj",
    "attn_output": ".self_attn.o_proj",
    "attn_q_norm": ".self_attn.q_norm",
    "attn_k_norm": ".self_attn.k_norm",
    "ffn_norm": ".post_attention_layernorm",
    "ffn_gate": ".mlp.gate_proj",
    "ffn_up": ".mlp.up_proj",
    "ffn_down": ".mlp.down_proj",
    "ffn_gate_inp": ".mlp.gate|.block_sparse_moe.gate",
    "ffn_gate_exps": ".mlp.experts.{n}.gate_proj|.block_sparse_moe.experts.{n}.w1",
    "ffn_up_exps": ".mlp.experts.{n}.up_proj|.block_sparse_moe.experts.{n}.w3",
    "ffn_down_exps": ".mlp.experts.{n}.down_proj|.block_sparse_moe.experts.{n}.w2",
}


def llama_names(**others: str) -> Names:
    """The names that most families share, and what differs from them."""
    return names("model.", "layers.{i}", **{**_LLAMA, **others})


GEMMA_NAMES = llama_names(
    post_attention_norm=".post_attention_layernorm",
    ffn_norm=".pre_feedforward_layernorm",
    post_ffw_norm=".post_feedforward_layernorm",
)
OPT_NAMES = names(
    "model.decoder.",
    "layers.{i}",
    token_embd="embed_tokens",
    position_embd="embed_positions",
    output_norm="final_layer_norm",
    output="/lm_head",
    attn_norm=".self_attn_layer_norm",
    attn_q=".self_attn.q_proj",
    attn_k=".self_attn.k_proj",
    attn_v=".self_attn.v_proj",
    attn_output=".self_attn.out_proj",
    ffn_norm=".final_layer_norm",
    ffn_up=".fc1",
    ffn_down=".fc2",
)
FALCON_NAMES = names(
    "transformer.",
    "h.{i}",
    token_embd="word_embeddings",
    output_norm="ln_f",
    output="/lm_head",
    attn_norm=".input_layernorm|.ln_mlp",
    attn_norm_2=".ln_attn",
    attn_qkv=".self_attention.query_key_value",
    attn_output=".self_attention.dense",
    ffn_up=".mlp.dense_h_to_4h",
    ffn_down=".mlp.dense_4h_to_h",
)
GPT2_NAMES = names(
    "transformer.",
    "h.{i}",
    token_embd="wte",
    position_embd="wpe",
    output_norm="ln_f",
    output="/lm_head",
    attn_norm=".ln_1",
    attn_qkv=".attn.c_attn",
    attn_output=".attn.c_proj",
    ffn_norm=".ln_2",
    ffn_up=".mlp.c_fc",
    ffn_down=".mlp.c_proj",
)
GPTNEOX_NAMES = names(
    "gpt_neox.",
    "layers.{i}",
    token_embd="embed_in",
    output_norm="final_layer_norm",
    output="/embed_out",
    attn_norm=".input_layernorm",
    attn_qkv=".attention.query_key_value",
    attn_output=".attention.dense",
    ffn_norm=".post_attention_layernorm",
    ffn_up=".mlp.dense_h_to_4h",
    ffn_down=".mlp.dense_4h_to_h",
)

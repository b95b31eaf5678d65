"""The architectures that the decoder runs: each is a row of data, not a file of code."""

from __future__ import annotations

from collections.abc import Mapping

from .architecture_terms import (
    ATTN_NORM,
    ATTN_NORM_BIAS,
    EXPERTS,
    FFN_NORM,
    FFN_NORM_BIAS,
    FUSED_GATED,
    FUSED_QKV,
    FUSED_QKV_BIAS,
    GATED,
    GATED_BIAS,
    HEAD_NORMS,
    LLAMA_BLOCK,
    OUT,
    OUT_BIAS,
    OUTPUT,
    OUTPUT_NORM,
    OUTPUT_NORM_BIAS,
    OWN_HEAD_NORMS,
    POSITIONS,
    POST_NORMS,
    QKV,
    QKV_BIAS,
    ROPE_FACTORS,
    ROPE_FREQS,
    SECOND_NORM,
    UP_DOWN,
    UP_DOWN_BIAS,
    WHOLE_NORMS,
    Architecture,
    both,
)
from .checkpoint_terms import Checkpoint, llama_names, names
from .errors import UnsupportedError
from .gguf_header import show

# As in their GGUF files: token_embd always, output only where the embedding does not serve as the output too.
_ALL_BIASES = (QKV_BIAS, OUT_BIAS, UP_DOWN_BIAS)
_LAYER_NORMS = both(ATTN_NORM, ATTN_NORM_BIAS, OUTPUT_NORM, OUTPUT_NORM_BIAS)
_TWO_LAYER_NORMS = both(_LAYER_NORMS, FFN_NORM, FFN_NORM_BIAS)
_LAYER_BLOCK = both(_TWO_LAYER_NORMS, QKV, OUT)
_LLAMA = both(OUTPUT_NORM, LLAMA_BLOCK)

_GEMMA_NAMES = llama_names(
    post_attention_norm=".post_attention_layernorm",
    ffn_norm=".pre_feedforward_layernorm",
    post_ffw_norm=".post_feedforward_layernorm",
)

ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row
    for row in (
        # Llama 1-3, Mistral, Mixtral, SmolLM2, TinyLlama, Yi, ReLU-Llama: their files all say "llama".
        Architecture(
            "llama",
            _LLAMA,
            (OUTPUT, ROPE_FREQS, QKV_BIAS, OUT_BIAS, GATED_BIAS),
            (GATED, EXPERTS),
            rope="norm",
            hf=Checkpoint(
                ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"), windows="all"
            ),
        ),
        # SJTU's Bamboo is Mistral with ReLU on gate and up; only PowerInfer's llama.cpp names it.
        Architecture(
            "bamboo",
            _LLAMA,
            (OUTPUT, ROPE_FREQS),
            (GATED,),
            rope="norm",
            activation="drelu",
            hf=Checkpoint(("BambooForCausalLM",), ignored=("model.layers.{i}.mlp.predictor.",), activated=False),
        ),
        Architecture(
            "qwen2",
            both(_LLAMA, QKV_BIAS),
            (OUTPUT, ROPE_FREQS),
            (GATED,),
            hf=Checkpoint(("Qwen2ForCausalLM",), windows="late"),
        ),
        Architecture(
            "qwen3",
            both(_LLAMA, HEAD_NORMS),
            (OUTPUT, ROPE_FREQS, QKV_BIAS, OUT_BIAS),
            (GATED,),
            hf=Checkpoint(("Qwen3ForCausalLM",), windows="late"),
        ),
        Architecture(
            "qwen3moe",
            both(_LLAMA, HEAD_NORMS),
            (OUTPUT, ROPE_FREQS, QKV_BIAS, OUT_BIAS),
            (EXPERTS,),
            hf=Checkpoint(
                ("Qwen3MoeForCausalLM",),
                defaults={"norm_topk_prob": False},
                only={"mlp_only_layers": [], "decoder_sparse_step": 1, "use_sliding_window": False},
            ),
        ),
        Architecture(
            "olmoe",
            both(_LLAMA, WHOLE_NORMS),
            (OUTPUT,),
            (EXPERTS,),
            weights_norm=False,
            hf=Checkpoint(("OlmoeForCausalLM",), own_output=True, only={"clip_qkv": None}),
        ),
        Architecture(
            "gemma2",
            both(_LLAMA, POST_NORMS),
            (OUTPUT,),
            (GATED,),
            activation="gelu",
            window_every=2,
            embd_scale="sqrt",
            wide_heads=(46,),
            softcaps=(50.0, 30.0),
            hf=Checkpoint(
                ("Gemma2ForCausalLM",),
                _GEMMA_NAMES,
                tied=True,
                norm_offset=1.0,
                windows="pattern",
                attn_scale=("query_pre_attn_scalar", -0.5),
                defaults={"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096},
                only={"use_bidirectional_attention": False},
            ),
        ),
        Architecture(
            "gemma3",
            both(_LLAMA, POST_NORMS, HEAD_NORMS),
            (OUTPUT,),
            (GATED,),
            activation="gelu",
            window_every=6,
            local_base=10000.0,
            embd_scale="sqrt",
            wide_heads=(62,),
            hf=Checkpoint(
                ("Gemma3ForCausalLM",),
                _GEMMA_NAMES,
                tied=True,
                norm_offset=1.0,
                windows="pattern",
                attn_scale=("query_pre_attn_scalar", -0.5),
                defaults={"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "rope_theta": 1e6},
                only={"use_bidirectional_attention": False},
            ),
        ),
        Architecture(
            "phi3",
            both(OUTPUT_NORM, ATTN_NORM, FUSED_QKV, OUT, FFN_NORM),
            (OUTPUT, ROPE_FACTORS),
            (FUSED_GATED,),
            hf=Checkpoint(
                ("Phi3ForCausalLM",),
                llama_names(attn_qkv=".self_attn.qkv_proj", ffn_up=".mlp.gate_up_proj"),
                windows="all",
            ),
        ),
        # OPT has no place in llama.cpp; PowerInfer's names are used, its two unused first positions are left out.
        Architecture(
            "opt",
            both(_LAYER_BLOCK, POSITIONS),
            (OUTPUT, *_ALL_BIASES),
            (UP_DOWN,),
            norm="layer",
            rope="",
            activation="relu",
            gated=False,
            hf=Checkpoint(
                ("OPTForCausalLM",),
                names(
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
                ),
                tied=True,
                reordered={"position_embd": "offset"},
                defaults={"layer_norm_eps": 1e-5},
                only={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
            ),
        ),
        # Falcon-7B has one norm for attention and FFN; of two, attn_norm is the FFN's.
        Architecture(
            "falcon",
            both(_LAYER_NORMS, FUSED_QKV, OUT),
            (OUTPUT, SECOND_NORM, FUSED_QKV_BIAS, OUT_BIAS, UP_DOWN_BIAS),
            (UP_DOWN,),
            norm="layer",
            activation="gelu_erf",
            gated=False,
            parallel="yes",
            hf=Checkpoint(
                ("FalconForCausalLM", "RWForCausalLM"),
                names(
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
                ),
                prefix="transformer.",
                tied=True,
                reordered={"attn_qkv": "grouped"},
                one_kv_head=("multi_query", "new_decoder_architecture"),
                defaults={"max_position_embeddings": 2048, "layer_norm_epsilon": 1e-5, "multi_query": True},
                ff_multiple=4,
                only={"alibi": False, "parallel_attn": True, "apply_residual_connection_post_layernorm": False},
                keys={"tensor_data_layout": "jploski"},
            ),
        ),
        Architecture(
            "gpt2",
            both(_TWO_LAYER_NORMS, POSITIONS, FUSED_QKV, FUSED_QKV_BIAS, OUT, OUT_BIAS, UP_DOWN_BIAS),
            (OUTPUT,),
            (UP_DOWN,),
            norm="layer",
            rope="",
            activation="gelu",
            gated=False,
            hf=Checkpoint(
                ("GPT2LMHeadModel",),
                names(
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
                ),
                prefix="transformer.",
                tied=True,
                reordered=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), "transposed"),
                ignored=("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias"),
                defaults={"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
                ff_multiple=4,
                only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
            ),
        ),
        Architecture(
            "gptneox",
            both(_TWO_LAYER_NORMS, FUSED_QKV, OUT, UP_DOWN_BIAS),
            (OUTPUT, FUSED_QKV_BIAS, OUT_BIAS),
            (UP_DOWN,),
            norm="layer",
            activation="gelu_erf",
            gated=False,
            parallel="key",
            hf=Checkpoint(
                ("GPTNeoXForCausalLM",),
                names(
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
                ),
                own_output=True,
                prefix="gpt_neox.",
                reordered={"attn_qkv": "grouped"},
                ignored=("gpt_neox.layers.{i}.attention.bias", "gpt_neox.layers.{i}.attention.masked_bias"),
                defaults={"rotary_pct": 0.25, "layer_norm_eps": 1e-5},
            ),
        ),
        Architecture(
            "starcoder2",
            _LAYER_BLOCK,
            (OUTPUT, *_ALL_BIASES),
            (UP_DOWN,),
            norm="layer",
            activation="gelu",
            gated=False,
            hf=Checkpoint(
                ("Starcoder2ForCausalLM",),
                llama_names(ffn_up=".mlp.c_fc", ffn_down=".mlp.c_proj"),
                tied=True,
                windows="all",
                only={"mlp_type": "default", "norm_type": "layer_norm"},
            ),
        ),
        # StableLM 2 12B has no ffn_norm: it is parallel, with one norm.
        Architecture(
            "stablelm",
            both(_LAYER_NORMS, QKV, OUT),
            (OUTPUT, QKV_BIAS, both(FFN_NORM, FFN_NORM_BIAS), OWN_HEAD_NORMS),
            (GATED,),
            norm="layer",
            parallel="no ffn_norm",
            hf=Checkpoint(
                ("StableLmForCausalLM", "StableLMEpochForCausalLM"),
                llama_names(
                    attn_q_norm=".self_attn.q_layernorm.norms.{n}", attn_k_norm=".self_attn.k_layernorm.norms.{n}"
                ),
                own_output=True,
                defaults={"partial_rotary_factor": 0.25},
            ),
        ),
        Architecture(
            "olmo2",
            both(OUTPUT_NORM, QKV, OUT, WHOLE_NORMS, POST_NORMS),
            (OUTPUT,),
            (GATED,),
            hf=Checkpoint(
                ("Olmo2ForCausalLM",),
                llama_names(
                    post_attention_norm=".post_attention_layernorm", post_ffw_norm=".post_feedforward_layernorm"
                ),
                own_output=True,
            ),
        ),
        Architecture(
            "granite",
            _LLAMA,
            (OUTPUT, ROPE_FREQS, QKV_BIAS, OUT_BIAS, GATED_BIAS),
            (GATED,),
            rope="norm",
            divides_logits=True,
            hf=Checkpoint(("GraniteForCausalLM",), attn_scale=("attention_multiplier", 1.0)),
        ),
        Architecture(
            "nemotron",
            _LAYER_BLOCK,
            (OUTPUT, *_ALL_BIASES),
            (UP_DOWN,),
            norm="layer",
            activation="relu2",
            gated=False,
            hf=Checkpoint(
                ("NemotronForCausalLM",),
                own_output=True,
                norm_offset=1.0,
                defaults={"partial_rotary_factor": 0.5, "hidden_act": "relu2"},
            ),
        ),
        Architecture(
            "arcee",
            _LLAMA,
            (OUTPUT, ROPE_FREQS, *_ALL_BIASES),
            (UP_DOWN,),
            rope="norm",
            activation="relu2",
            gated=False,
            hf=Checkpoint(("ArceeForCausalLM",), defaults={"hidden_act": "relu2"}),
        ),
    )
}


def lookup(name: str) -> Architecture:
    """The row of that name; UnsupportedError lists the supported ones."""
    if name not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedError(f"architecture {show(name)} is not supported; supported: {supported}")
    return ARCHITECTURES[name]

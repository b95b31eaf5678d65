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
from .checkpoint_names import FALCON_NAMES, GEMMA_NAMES, GPT2_NAMES, GPTNEOX_NAMES, OPT_NAMES, llama_names
from .checkpoint_terms import Checkpoint
from .errors import UnsupportedError
from .gguf_header import show

# As in their GGUF files: token_embd always, output only where the embedding does not serve as the output too.
_ALL_BIASES = (QKV_BIAS, OUT_BIAS, UP_DOWN_BIAS)
_LAYER_NORMS = both(ATTN_NORM, ATTN_NORM_BIAS, OUTPUT_NORM, OUTPUT_NORM_BIAS)
_TWO_LAYER_NORMS = both(_LAYER_NORMS, FFN_NORM, FFN_NORM_BIAS)
_LAYER_BLOCK = both(_TWO_LAYER_NORMS, QKV, OUT)
_LLAMA = both(OUTPUT_NORM, LLAMA_BLOCK)

_GEMMA2_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # null in config.json means none

ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(
            "llama",
            "Llama 1 to 3, Mistral, Mixtral, SmolLM2, TinyLlama, Yi, ReLU-Llama, ProSparse",
            _LLAMA,
            (OUTPUT, ROPE_FREQS, QKV_BIAS, OUT_BIAS, GATED_BIAS),
            (GATED, EXPERTS),
            rope="norm",
            mixes="70B",
            hf=Checkpoint(
                (
                    "LlamaForCausalLM",
                    "LLaMAForCausalLM",
                    "MistralForCausalLM",
                    "MixtralForCausalLM",
                    "SparseLlamaForCausalLM",
                ),
                windows="all",
                windowed=("MistralForCausalLM", "MixtralForCausalLM"),
                class_defaults={"MistralForCausalLM": {"sliding_window": 4096}},
            ),
        ),
        # SJTU's Bamboo is Mistral with ReLU on gate and up; only PowerInfer's llama.cpp names it.
        Architecture(
            "bamboo",
            "Bamboo",
            _LLAMA,
            (OUTPUT, ROPE_FREQS),
            (GATED,),
            rope="norm",
            activation="drelu",
            hf=Checkpoint(("BambooForCausalLM",), ignored=("model.layers.{i}.mlp.predictor.",), activated=False),
        ),
        Architecture(
            "qwen2",
            "Qwen2, Qwen2.5",
            both(_LLAMA, QKV_BIAS),
            (OUTPUT, ROPE_FREQS),
            (GATED,),
            mixes="70B",
            hf=Checkpoint(("Qwen2ForCausalLM",), windows="late", defaults={"max_window_layers": 28}),
        ),
        Architecture(
            "qwen3",
            "Qwen3",
            both(_LLAMA, HEAD_NORMS),
            (OUTPUT, ROPE_FREQS, QKV_BIAS, OUT_BIAS),
            (GATED,),
            hf=Checkpoint(("Qwen3ForCausalLM",), windows="late", defaults={"max_window_layers": 28}),
        ),
        Architecture(
            "qwen3moe",
            "Qwen3 MoE",
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
            "OLMoE",
            both(_LLAMA, WHOLE_NORMS),
            (OUTPUT,),
            (EXPERTS,),
            weights_norm=False,
            hf=Checkpoint(
                ("OlmoeForCausalLM",),
                own_output=True,
                defaults={"rms_norm_eps": 1e-5, "norm_topk_prob": False},
                only={"clip_qkv": None},
            ),
        ),
        Architecture(
            "gemma2",
            "Gemma 2",
            both(_LLAMA, POST_NORMS),
            (OUTPUT,),
            (GATED,),
            activation="gelu",
            window=4096,
            window_every=2,
            embd_scale="sqrt",
            wide_heads=(46,),
            softcaps=(50.0, 30.0),
            hf=Checkpoint(
                ("Gemma2ForCausalLM",),
                GEMMA_NAMES,
                tied=True,
                norm_offset=1.0,
                windows="pattern",
                attn_scale=("query_pre_attn_scalar", -0.5),
                defaults={"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, **_GEMMA2_CAPS},
                only={"use_bidirectional_attention": False},
            ),
        ),
        Architecture(
            "gemma3",
            "Gemma 3 (text)",
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
                GEMMA_NAMES,
                tied=True,
                norm_offset=1.0,
                windows="pattern",
                attn_scale=("query_pre_attn_scalar", -0.5),
                defaults={
                    "head_dim": 256,
                    "query_pre_attn_scalar": 256,
                    "sliding_window": 4096,
                    "rope_theta": 1e6,
                    "num_attention_heads": 8,
                    "num_key_value_heads": 4,
                    "max_position_embeddings": 131072,
                    "rms_norm_eps": 1e-6,
                    "vocab_size": 262208,
                },
                wrapped=("Gemma3ForConditionalGeneration",),
                only={"use_bidirectional_attention": False},
            ),
        ),
        Architecture(
            "phi3",
            "Phi-3, Phi-3.5, Phi-4",
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
            "OPT",
            both(_LAYER_BLOCK, POSITIONS),
            (OUTPUT, *_ALL_BIASES),
            (UP_DOWN,),
            norm="layer",
            rope="",
            activation="relu",
            gated=False,
            hf=Checkpoint(
                ("OPTForCausalLM",),
                OPT_NAMES,
                tied=True,
                reordered={"position_embd": "offset"},
                defaults={"layer_norm_eps": 1e-5},
                only={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
            ),
        ),
        # Falcon-7B has one norm for attention and FFN; of two, attn_norm is the FFN's.
        Architecture(
            "falcon",
            "Falcon 7B, 11B, 40B, 180B",
            both(_LAYER_NORMS, FUSED_QKV, OUT),
            (OUTPUT, SECOND_NORM, FUSED_QKV_BIAS, OUT_BIAS, UP_DOWN_BIAS),
            (UP_DOWN,),
            norm="layer",
            activation="gelu_erf",
            gated=False,
            parallel="yes",
            mixes="falcon",
            hf=Checkpoint(
                ("FalconForCausalLM",),
                FALCON_NAMES,
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
            "GPT-2",
            both(_TWO_LAYER_NORMS, POSITIONS, FUSED_QKV, FUSED_QKV_BIAS, OUT, OUT_BIAS, UP_DOWN_BIAS),
            (OUTPUT,),
            (UP_DOWN,),
            norm="layer",
            rope="",
            activation="gelu",
            gated=False,
            hf=Checkpoint(
                ("GPT2LMHeadModel",),
                GPT2_NAMES,
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
            "GPT-NeoX, Pythia",
            both(_TWO_LAYER_NORMS, FUSED_QKV, OUT, UP_DOWN_BIAS),
            (OUTPUT, FUSED_QKV_BIAS, OUT_BIAS),
            (UP_DOWN,),
            norm="layer",
            activation="gelu_erf",
            gated=False,
            parallel="key",
            hf=Checkpoint(
                ("GPTNeoXForCausalLM",),
                GPTNEOX_NAMES,
                own_output=True,
                prefix="gpt_neox.",
                reordered={"attn_qkv": "grouped"},
                ignored=("gpt_neox.layers.{i}.attention.bias", "gpt_neox.layers.{i}.attention.masked_bias"),
                defaults={"rotary_pct": 0.25, "layer_norm_eps": 1e-5},
            ),
        ),
        Architecture(
            "starcoder2",
            "StarCoder2",
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
            "StableLM, StableLM 2",
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
            "OLMo 2 and 3",
            both(OUTPUT_NORM, QKV, OUT, WHOLE_NORMS, POST_NORMS),
            (OUTPUT,),
            (GATED,),
            window_every=4,
            local_plain=True,
            hf=Checkpoint(
                ("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
                llama_names(
                    post_attention_norm=".post_attention_layernorm", post_ffw_norm=".post_feedforward_layernorm"
                ),
                own_output=True,
                windows="pattern",
                windowed=("Olmo3ForCausalLM",),
            ),
        ),
        Architecture(
            "granite",
            "Granite 3",
            _LLAMA,
            (OUTPUT, ROPE_FREQS, QKV_BIAS, OUT_BIAS, GATED_BIAS),
            (GATED,),
            rope="norm",
            divides_logits=True,
            hf=Checkpoint(
                ("GraniteForCausalLM",),
                attn_scale=("attention_multiplier", 1.0),
                defaults={"attention_multiplier": 1.0},
            ),
        ),
        Architecture(
            "nemotron",
            "Nemotron 3, 4, Minitron",
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
            "Arcee AFM",
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

"""The tiny models of tests/families, one config.json each, in the words that published checkpoints use.

Keys are those of the real files (rope_theta and rope_scaling, torch_dtype, n_embd in gpt2 and so on), also where
transformers writes them otherwise today. `matters` names changes of the config that must change the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]
N_VOCAB = 288
EOS, IM_START, IM_END = 285, 286, 287
WINDOW = 8


@dataclass(frozen=True)
class Spec:
    """One tiny model: its config.json and how its files differ from the plainest ones."""

    name: str
    config: Config
    matters: tuple[Config, ...] = ()
    dtype: str = "bfloat16"  # on disk; the expected logits are those of the rounded weights, in float32
    n_shards: int = 1
    shades: tuple[Config, ...] = ()  # changes that move them little
    gelu_tail: bool = False  # FFN inputs around -2.5, where GELU by tanh and by erf differ by a tenth of its value
    chat_template: str = ""  # "": none, "config": in tokenizer_config.json, "file": chat_template.jinja
    prompt_lengths: tuple[int, ...] = (28, 4, 9, 16)
    n_ctx: int = 64  # the context size at which the logits hold
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # buffers that published files carry along
    generation: Config = field(default_factory=dict)
    short: tuple[int, ...] = ()  # prompt lengths of expected_short.npz, for a context of n_ctx_short
    n_ctx_short: int = 0


def _base(architecture: str, model_type: str, **keys: Any) -> Config:
    """What nearly every config.json says; None takes a key out."""
    config: Config = {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "bos_token_id": EOS,
        "eos_token_id": IM_END,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "model_type": model_type,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0",
        "use_cache": True,
        "vocab_size": N_VOCAB,
    }
    config.update(keys)
    return {key: value for key, value in config.items() if value is not None}


_THETA: Config = {"rope_theta": 500.0}
_NO_WINDOW: Config = {"sliding_window": 4096}
_LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}
_YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 4.0,
    "mscale": 1.0,
    "original_max_position_embeddings": 32,
    "rope_type": "yarn",
    "type": "yarn",
}
_LONGROPE = {
    "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 12.0],
    "short_factor": [1.0, 1.05, 1.2, 1.4, 1.5, 2.0],
    "type": "longrope",
}
_GEMMA: Config = {
    "attention_bias": False,
    "head_dim": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "sliding_window": WINDOW,
    "tie_word_embeddings": None,
}
_GEMMA2: Config = {
    **_GEMMA,
    "attn_logit_softcapping": 2.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 5.0,
    "query_pre_attn_scalar": 32,
}
_GEMMA2_MATTERS = (
    _NO_WINDOW,
    _THETA,
    {"attn_logit_softcapping": None},
    {"final_logit_softcapping": None},
    {"query_pre_attn_scalar": 20},
    {"sliding_window": WINDOW - 1},
)
_NEOX: Config = {
    "attention_dropout": None,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "num_key_value_heads": None,
    "rms_norm_eps": None,
    "rope_theta": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
}
_FALCON: Config = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "bias": False,
    "hidden_act": None,
    "hidden_dropout": 0.0,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": None,
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_key_value_heads": None,
    "parallel_attn": True,
    "rms_norm_eps": None,
    "rope_theta": None,
    "tie_word_embeddings": None,
}
_STABLELM: Config = {
    "hidden_dropout": 0.0,
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.25,
    "qk_layernorm": False,
    "rms_norm_eps": None,
    "use_parallel_residual": False,
    "use_qkv_bias": True,
}

# fmt: off
SPECS: tuple[Spec, ...] = (
    Spec(
        "llama",
        _base("LlamaForCausalLM", "llama", tie_word_embeddings=True, attention_bias=False, mlp_bias=False),
        (_THETA, {"hidden_act": "relu"}),
        chat_template="config",
        generation={"do_sample": True, "eos_token_id": [EOS, IM_END], "temperature": 0.6, "top_p": 0.9},
    ),
    Spec(
        "llama-rope3-bias",
        _base(
            "LlamaForCausalLM", "llama", attention_bias=True, mlp_bias=True, rope_scaling=_LLAMA3,
            eos_token_id=[EOS, IM_END],
        ),
        (_THETA, {"rope_scaling": None}, {"rope_scaling": {**_LLAMA3, "high_freq_factor": 2.0}}),
    ),
    Spec(
        "llama-relu",
        _base("LlamaForCausalLM", "llama", hidden_act="relu", num_key_value_heads=4, rms_norm_eps=1e-06),
        ({"hidden_act": "silu"},),
        dtype="float16",
        extra={f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (8,) for i in range(2)},
    ),
    Spec(
        "mistral",
        _base("MistralForCausalLM", "mistral", sliding_window=WINDOW, head_dim=32),
        (_NO_WINDOW, {"sliding_window": WINDOW + 1}, _THETA),
    ),
    Spec(
        "qwen2",
        _base(
            "Qwen2ForCausalLM", "qwen2", max_window_layers=2, rms_norm_eps=1e-06, sliding_window=WINDOW,
            tie_word_embeddings=True, use_sliding_window=False,
            vocab_size=320,  # more rows than the tokenizer has tokens, as in the published ones
        ),
        (_THETA, {"use_sliding_window": True, "max_window_layers": 0}),
        n_shards=2,
        generation={"repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "do_sample": True},
    ),
    Spec(
        "qwen3",
        _base(
            "Qwen3ForCausalLM", "qwen3", attention_bias=False, head_dim=32, max_window_layers=2, rms_norm_eps=1e-06,
            rope_scaling=None, sliding_window=None, use_sliding_window=False,
        ),
        (_THETA,),
        chat_template="file",
    ),
    Spec(
        "gpt2",
        {
            "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
            "bos_token_id": EOS, "embd_pdrop": 0.1, "eos_token_id": EOS, "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 64, "n_embd": 64, "n_head": 4, "n_layer": 2,
            "n_positions": 64, "resid_pdrop": 0.1,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": N_VOCAB,
        },
        ({"activation_function": "gelu"}, {"activation_function": "relu"}),
        dtype="float16",
        gelu_tail=True,
        extra={f"h.{i}.attn.bias": (1, 1, 64, 64) for i in range(2)},
    ),
    Spec(
        "mixtral",
        _base(
            "MixtralForCausalLM", "mixtral", intermediate_size=32, num_experts_per_tok=2, num_local_experts=4,
            output_router_logits=False, router_aux_loss_coef=0.02,
        ),
        (_THETA, {"num_experts_per_tok": 1}),
        n_shards=2,
    ),
    Spec("gemma2", _base("Gemma2ForCausalLM", "gemma2", **_GEMMA2), _GEMMA2_MATTERS),
    Spec(
        "gemma2-27b",  # whose score scale is that of n_embd / n_head and not of the head's width
        _base("Gemma2ForCausalLM", "gemma2", **{**_GEMMA2, "query_pre_attn_scalar": 16}),
        _GEMMA2_MATTERS,
    ),
    Spec(
        "gemma3",
        _base(
            "Gemma3ForCausalLM", "gemma3_text",
            **{
                **_GEMMA, "attn_logit_softcapping": None, "cache_implementation": "hybrid",
                "final_logit_softcapping": None, "head_dim": 16, "intermediate_size": 32, "num_hidden_layers": 6,
                "num_key_value_heads": 1, "query_pre_attn_scalar": 16, "rope_local_base_freq": 10000.0,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 1000000.0,
                "sliding_window_pattern": 6,
            },
        ),
        (
            _NO_WINDOW, _THETA, {"rope_local_base_freq": 500.0}, {"rope_scaling": None},
            {"query_pre_attn_scalar": 10}, {"sliding_window_pattern": 3},
        ),
    ),
    Spec(
        "phi3",
        _base(
            "Phi3ForCausalLM", "phi3", pad_token_id=EOS, rope_scaling=None, sliding_window=WINDOW, resid_pdrop=0.0,
            embd_pdrop=0.0,
        ),
        (_NO_WINDOW, _THETA),
    ),
    Spec(
        "phi3-longrope",
        _base(
            "Phi3ForCausalLM", "phi3", max_position_embeddings=64, original_max_position_embeddings=16,
            pad_token_id=EOS, partial_rotary_factor=0.75, rope_scaling=_LONGROPE, sliding_window=262144,
            tie_word_embeddings=True,
        ),
        (_THETA, {"rope_scaling": {**_LONGROPE, "long_factor": [1.0] * 6}}, {"max_position_embeddings": 16}),
        prompt_lengths=(28, 17, 18, 20),  # all past the original context: the long factors
        short=(16, 4, 9, 12),
        n_ctx_short=16,
    ),
    Spec(
        "opt",
        {
            "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0,
            "bos_token_id": EOS, "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": EOS, "ffn_dim": 96,
            "hidden_size": 64, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 64,
            "model_type": "opt", "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 1,
            "prefix": "<|endoftext|>", "torch_dtype": "float16", "use_cache": True, "vocab_size": N_VOCAB,
            "word_embed_proj_dim": 64,
        },
        ({"activation_function": "gelu"},),
        dtype="float16",
    ),
    Spec(
        "falcon-7b",
        _base("FalconForCausalLM", "falcon", **_FALCON),
        (_THETA,),
        shades=({"activation": "gelu_new"},),
    ),
    Spec(
        "falcon-40b",
        _base("FalconForCausalLM", "falcon", **{**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
        (_THETA,),
        extra={"lm_head.weight": ()},  # tied, and yet in the file
    ),
    Spec(
        "bamboo",
        _base("BambooForCausalLM", "bamboo", hidden_act="relu", sliding_window=4096, rope_theta=10000.0),
        (_THETA,),
    ),
    Spec(
        "gptneox",
        _base("GPTNeoXForCausalLM", "gpt_neox", **_NEOX),
        ({"use_parallel_residual": False}, {"rotary_pct": 0.5}),
        shades=({"hidden_act": "gelu_new"},),
        dtype="float16",
        extra={
            f"gpt_neox.layers.{i}.attention.{name}": shape
            for i in range(2)
            for name, shape in (("bias", (1, 1, 32, 32)), ("masked_bias", ()), ("rotary_emb.inv_freq", (2,)))
        },
    ),
    Spec(
        "gptneox-serial",
        _base("GPTNeoXForCausalLM", "gpt_neox", **{**_NEOX, "use_parallel_residual": False, "rotary_pct": 1.0}),
        (
            {"use_parallel_residual": True}, {"rotary_pct": 0.25}, {"rotary_emb_base": 500},
            {"hidden_act": "gelu_new"},
        ),
        dtype="float16",
        gelu_tail=True,
    ),
    Spec(
        "starcoder2",
        _base(
            "Starcoder2ForCausalLM", "starcoder2", hidden_act="gelu_pytorch_tanh", mlp_type="default",
            norm_epsilon=1e-05, norm_type="layer_norm", rms_norm_eps=None, sliding_window=WINDOW,
            tie_word_embeddings=None, use_bias=True,
        ),
        (_NO_WINDOW, _THETA, {"hidden_act": "gelu"}),
        gelu_tail=True,
    ),
    Spec(
        "stablelm",
        _base("StableLmForCausalLM", "stablelm", **_STABLELM),
        (_THETA, {"partial_rotary_factor": 0.5}, {"use_parallel_residual": True}),
        dtype="float16",
    ),
    Spec(
        "stablelm-12b",
        _base(
            "StableLmForCausalLM", "stablelm",
            **{**_STABLELM, "qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": False},
        ),
        (_THETA, {"qk_layernorm": False}),
    ),
    Spec(
        "olmo2",
        _base("Olmo2ForCausalLM", "olmo2", attention_bias=False, rms_norm_eps=1e-06),
        (_THETA,),
        dtype="float32",
    ),
    Spec(
        "olmo3",
        _base(
            "Olmo3ForCausalLM", "olmo3", attention_bias=False, rms_norm_eps=1e-06, rope_scaling=_YARN,
            rope_theta=500000.0, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        ),
        (_THETA, {"rope_scaling": None}, {"sliding_window": 12}, {"layer_types": ["full_attention"] * 2}),
    ),
    Spec(
        "granite",
        _base(
            "GraniteForCausalLM", "granite", attention_bias=False, attention_multiplier=0.15,
            embedding_multiplier=3.0, logits_scaling=2.0, mlp_bias=False, residual_multiplier=0.6,
            rope_scaling=None, tie_word_embeddings=True,
        ),
        (
            _THETA, {"attention_multiplier": 0.25}, {"embedding_multiplier": 1.0}, {"logits_scaling": 1.0},
            {"residual_multiplier": 1.0},
        ),
    ),
    Spec(
        "nemotron",
        _base(
            "NemotronForCausalLM", "nemotron", attention_bias=False, head_dim=16, hidden_act="relu2",
            mlp_bias=False, norm_eps=1e-05, partial_rotary_factor=0.5, rms_norm_eps=None,
        ),
        (_THETA, {"partial_rotary_factor": 1.0}, {"hidden_act": "relu"}),
    ),
    Spec(
        "arcee",
        _base(
            "ArceeForCausalLM", "arcee", attention_bias=False, head_dim=16, hidden_act="relu2", mlp_bias=False,
            rope_scaling=_YARN,
        ),
        (_THETA, {"rope_scaling": None}, {"hidden_act": "relu"}),
    ),
    Spec(
        "qwen3moe",
        _base(
            "Qwen3MoeForCausalLM", "qwen3_moe", attention_bias=False, decoder_sparse_step=1, head_dim=32,
            mlp_only_layers=[], moe_intermediate_size=32, norm_topk_prob=True, num_experts=8, num_experts_per_tok=3,
            output_router_logits=False, rms_norm_eps=1e-06, router_aux_loss_coef=0.001, tie_word_embeddings=True,
            use_sliding_window=False,
        ),
        (_THETA, {"norm_topk_prob": False}, {"num_experts_per_tok": 2}),
    ),
    Spec(
        "olmoe",
        _base(
            "OlmoeForCausalLM", "olmoe", intermediate_size=32, norm_topk_prob=False, num_experts=8,
            num_experts_per_tok=3, num_key_value_heads=4, output_router_logits=False, router_aux_loss_coef=0.01,
        ),
        (_THETA, {"norm_topk_prob": True}, {"num_experts_per_tok": 2}),
    ),
)
# fmt: on

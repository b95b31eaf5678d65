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
from .errors import UnsupportedError
from .gguf_header import show

# As in their GGUF files: token_embd always, output only where the embedding does not serve as the output too.
_ALL_BIASES = (QKV_BIAS, OUT_BIAS, UP_DOWN_BIAS)
_LAYER_NORMS = both(ATTN_NORM, ATTN_NORM_BIAS, OUTPUT_NORM, OUTPUT_NORM_BIAS)
_TWO_LAYER_NORMS = both(_LAYER_NORMS, FFN_NORM, FFN_NORM_BIAS)
_LAYER_BLOCK = both(_TWO_LAYER_NORMS, QKV, OUT)
_LLAMA = both(OUTPUT_NORM, LLAMA_BLOCK)

ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row
    for row in (
        # Llama 1-3, Mistral, Mixtral, SmolLM2, TinyLlama, Yi, ReLU-Llama: their files all say "llama".
        Architecture(
            "llama", _LLAMA, (OUTPUT, ROPE_FREQS, QKV_BIAS, OUT_BIAS, GATED_BIAS), (GATED, EXPERTS), rope="norm"
        ),
        # SJTU's Bamboo is Mistral with ReLU on gate and up; only PowerInfer's llama.cpp names it.
        Architecture("bamboo", _LLAMA, (OUTPUT, ROPE_FREQS), (GATED,), rope="norm", activation="drelu"),
        Architecture("qwen2", both(_LLAMA, QKV_BIAS), (OUTPUT, ROPE_FREQS), (GATED,)),
        Architecture("qwen3", both(_LLAMA, HEAD_NORMS), (OUTPUT, ROPE_FREQS, QKV_BIAS, OUT_BIAS), (GATED,)),
        Architecture("qwen3moe", both(_LLAMA, HEAD_NORMS), (OUTPUT, ROPE_FREQS, QKV_BIAS, OUT_BIAS), (EXPERTS,)),
        Architecture("olmoe", both(_LLAMA, WHOLE_NORMS), (OUTPUT,), (EXPERTS,), weights_norm=False),
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
        ),
        Architecture(
            "phi3", both(OUTPUT_NORM, ATTN_NORM, FUSED_QKV, OUT, FFN_NORM), (OUTPUT, ROPE_FACTORS), (FUSED_GATED,)
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
        ),
        Architecture(
            "starcoder2",
            _LAYER_BLOCK,
            (OUTPUT, *_ALL_BIASES),
            (UP_DOWN,),
            norm="layer",
            activation="gelu",
            gated=False,
        ),
        # StableLM 2 12B has no ffn_norm: it is parallel, with one norm.
        Architecture(
            "stablelm",
            both(_LAYER_NORMS, QKV, OUT),
            (OUTPUT, QKV_BIAS, both(FFN_NORM, FFN_NORM_BIAS), OWN_HEAD_NORMS),
            (GATED,),
            norm="layer",
            parallel="no ffn_norm",
        ),
        Architecture("olmo2", both(OUTPUT_NORM, QKV, OUT, WHOLE_NORMS, POST_NORMS), (OUTPUT,), (GATED,)),
        Architecture(
            "granite",
            _LLAMA,
            (OUTPUT, ROPE_FREQS, QKV_BIAS, OUT_BIAS, GATED_BIAS),
            (GATED,),
            rope="norm",
            divides_logits=True,
        ),
        Architecture(
            "nemotron",
            _LAYER_BLOCK,
            (OUTPUT, *_ALL_BIASES),
            (UP_DOWN,),
            norm="layer",
            activation="relu2",
            gated=False,
        ),
        Architecture(
            "arcee",
            _LLAMA,
            (OUTPUT, ROPE_FREQS, *_ALL_BIASES),
            (UP_DOWN,),
            rope="norm",
            activation="relu2",
            gated=False,
        ),
    )
}


def lookup(name: str) -> Architecture:
    """The row of that name; UnsupportedError lists the supported ones."""
    if name not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedError(f"architecture {show(name)} is not supported; supported: {supported}")
    return ARCHITECTURES[name]

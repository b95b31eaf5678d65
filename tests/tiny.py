"""Tiny, deterministic, valid GGUF models with random weights, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import naive
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType, TokenType

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GPT2_CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_GPT2_MERGES = (
    "h e,Ġ t,Ġt he,i n,Ġ a,e r,o n,a n,Ġ s,r e,Ġ h,Ġh e,l l,Ġ w,o r,l o,ll o,he llo,Ġhe llo,Ġw or,l d,"
    "Ġwor ld,in g,e n,Ġ c,a t,Ġc at,e d,Ġ o,Ġ b,i s,i t,o u,Ġ f,Ġ p,e s,a r,Ġa n,Ġan d,Ċ Ċ,Ġ m"
)
_SPM_PIECES = "▁t he ▁the in ▁a er on an ▁s re ▁h ll ▁w or".split()


@dataclass(frozen=True)
class RopeOptions:
    """What to write about rope scaling: kind "none", "linear" or "yarn"; freqs adds a rope_freqs tensor."""

    kind: str = "none"
    factor: float = 4.0
    orig_ctx: int = 32
    attn_factor: float | None = None
    freqs: bool = False
    extra: Mapping[str, float] = field(default_factory=dict)


def byte_characters() -> list[str]:
    """The 256 printable stand-ins that byte-level BPE uses for bytes (GPT-2's table)."""
    keep = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in keep else next(spare)) for byte in range(256)]


def _gpt2_vocabulary(writer: GGUFWriter, n_vocab: int, pre: str) -> None:
    merges = _GPT2_MERGES.split(",")
    tokens = _GPT2_CONTROL + byte_characters() + [merge.replace(" ", "") for merge in merges]
    kinds = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3)
    _pad(tokens, kinds, n_vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def _llama_vocabulary(writer: GGUFWriter, n_vocab: int) -> None:
    letters = ["▁", *"etaoinshrdlucmfwygpbvkxqjz"]
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + _SPM_PIECES + letters
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    kinds += [TokenType.NORMAL] * (len(tokens) - len(kinds))
    _pad(tokens, kinds, n_vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)


def _pad(tokens: list[str], kinds: list[TokenType], n_vocab: int) -> None:
    if n_vocab < len(tokens):
        raise ValueError(f"n_vocab must be at least {len(tokens)}, got {n_vocab}")
    missing = n_vocab - len(tokens)
    tokens += [f"<unused{i}>" for i in range(missing)]
    kinds += [TokenType.UNUSED] * missing


def make_tiny_model(
    path: str | Path,
    *,
    arch: str = "llama",
    n_layer: int = 2,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int | None = None,
    n_ff: int = 96,
    n_expert: int = 0,
    n_expert_used: int = 2,
    n_vocab: int = 300,
    qtype: str = "F32",
    types: Mapping[str, str] | None = None,
    tokenizer: str = "gpt2",
    pre: str = "gpt-2",
    rope: RopeOptions | None = None,
    rope_base: float = 10000.0,
    rope_dim: int | None = None,
    sliding_window: int = 0,
    tied: bool = False,
    biases: bool | None = None,
    bypass: bool = False,
    floors: Sequence[float] = (),
    chat_template: str | None = CHATML,
    n_ctx_train: int = 256,
    eps: float = 1e-5,
    name: str = "tiny",
    metadata: Mapping[str, str | int | float | bool] | None = None,
    seed: int = 0,
) -> Path:
    """Write a valid model file and return its path; the same arguments write the same bytes.

    qtype is the type of all matrices, `types` overrides it by tensor name; K-quants need n_embd and n_ff that
    are multiples of 256. biases (q, k, v) default to what the architecture has; metadata adds keys as given. n_expert:
    a mixture of so many experts of n_ff neurons each (arch llama, qwen3moe or olmoe); its routers are F32. bypass: a
    linear map with a bias beside each layer's neurons. floors: by layer, of activated gates.
    """
    head_dim = n_embd // n_head if head_dim is None else head_dim
    biases = arch == "qwen2" if biases is None else biases
    rope = rope or RopeOptions()
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(str(path), arch)
    writer.add_name(name)
    writer.add_context_length(n_ctx_train)
    writer.add_block_count(n_layer)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    if n_expert:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(n_expert_used)
        writer.add_expert_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(eps)
    writer.add_vocab_size(n_vocab)
    writer.add_rope_freq_base(rope_base)
    writer.add_rope_dimension_count(head_dim if rope_dim is None else rope_dim)
    if head_dim != n_embd // n_head:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if sliding_window:
        writer.add_sliding_window(sliding_window)
    _write_rope(writer, arch, rope)
    if tokenizer == "gpt2":
        _gpt2_vocabulary(writer, n_vocab, pre)
    else:
        _llama_vocabulary(writer, n_vocab)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for key, value in (metadata or {}).items():
        kind = {str: "string", bool: "bool", int: "uint32", float: "float32"}[type(value)]
        getattr(writer, f"add_{kind}")(key, value)
    if floors:
        writer.add_array(f"{arch}.hidden_activation_threshold", list(map(float, floors)))

    def matrix(tensor: str, n_rows: int, n_cols: int, std: float | None = None, experts: int = 0) -> None:
        kind = GGMLQuantizationType[(types or {}).get(tensor, qtype)]
        std = n_cols**-0.5 if std is None else std
        data = naive.random_blocks(kind, n_rows * max(1, experts), n_cols, rng, std)
        if experts:
            data = data.reshape(experts, n_rows, -1)
        if kind == GGMLQuantizationType.F32:
            writer.add_tensor(tensor, data.view(np.float32))
        elif kind == GGMLQuantizationType.F16:
            writer.add_tensor(tensor, data.view(np.float16))
        else:
            writer.add_tensor(tensor, data, raw_dtype=kind)

    def vector(tensor: str, n: int, mean: float = 1.0) -> None:
        writer.add_tensor(tensor, rng.normal(mean, 0.2, n).astype(np.float32))

    def router(tensor: str, n_rows: int, n_cols: int) -> None:
        writer.add_tensor(tensor, rng.normal(0.0, 1.5 * n_cols**-0.5, (n_rows, n_cols)).astype(np.float32))

    n_q, n_kv = n_head * head_dim, n_head_kv * head_dim
    matrix("token_embd.weight", n_vocab, n_embd, 0.3)
    for layer in range(n_layer):
        blk = f"blk.{layer}."
        vector(blk + "attn_norm.weight", n_embd)
        for part, n_rows in (("q", n_q), ("k", n_kv), ("v", n_kv)):
            matrix(f"{blk}attn_{part}.weight", n_rows, n_embd)
            if biases:
                vector(f"{blk}attn_{part}.bias", n_rows, 0.0)
        matrix(blk + "attn_output.weight", n_embd, n_q)
        if arch in ("qwen3moe", "olmoe"):
            vector(blk + "attn_q_norm.weight", head_dim if arch == "qwen3moe" else n_q)
            vector(blk + "attn_k_norm.weight", head_dim if arch == "qwen3moe" else n_kv)
        vector(blk + "ffn_norm.weight", n_embd)
        if n_expert:
            router(blk + "ffn_gate_inp.weight", n_expert, n_embd)
            matrix(blk + "ffn_gate_exps.weight", n_ff, n_embd, experts=n_expert)
            matrix(blk + "ffn_up_exps.weight", n_ff, n_embd, experts=n_expert)
            matrix(blk + "ffn_down_exps.weight", n_embd, n_ff, experts=n_expert)
            continue
        matrix(blk + "ffn_gate.weight", n_ff, n_embd)
        matrix(blk + "ffn_up.weight", n_ff, n_embd)
        matrix(blk + "ffn_down.weight", n_embd, n_ff)
        if bypass:
            matrix(blk + "ffn_bypass.weight", n_embd, n_embd)
            vector(blk + "ffn_bypass.bias", n_embd, 0.0)
    vector("output_norm.weight", n_embd)
    if not tied:
        matrix("output.weight", n_vocab, n_embd, 0.3)
    if rope.freqs:
        writer.add_tensor("rope_freqs.weight", np.geomspace(1, 8, head_dim // 2).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _write_rope(writer: GGUFWriter, arch: str, rope: RopeOptions) -> None:
    if rope.kind == "none":
        return
    writer.add_rope_scaling_type(RopeScalingType(rope.kind))
    writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.orig_ctx)
    if rope.attn_factor is not None:
        writer.add_rope_scaling_attn_factors(rope.attn_factor)
    for key, value in rope.extra.items():
        writer.add_float32(f"{arch}.rope.scaling.{key}", value)

"""What a model is made of and how much memory it needs, for `hotcold inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .console import human_bytes

if TYPE_CHECKING:
    from ..formats.config import ModelConfig
    from ..formats.gguf import GGUFFile

_ACTIVATIONS = {
    "silu": "SiLU",
    "gelu": "GELU (tanh)",
    "gelu_erf": "GELU (erf)",
    "relu": "ReLU",
    "relu2": "squared ReLU",
    "drelu": "ReLU of gate and up",
}


def describe(gguf: GGUFFile) -> dict[str, Any]:
    """{"family", "features": {name: text}, "memory": bytes (of a model)}, or {"unsupported": why}; JSON-able."""
    from ..formats.config import ModelConfig
    from ..formats.errors import HotcoldError
    from ..runtime.footprint import footprint

    try:
        if gguf.metadata.get("general.type") == "adapter":
            return _adapter(gguf)
        config = ModelConfig.from_gguf(gguf)
    except HotcoldError as error:
        return {"unsupported": str(error).removeprefix(f"{gguf.path}: ")}
    needs = footprint(gguf, config)
    memory = {"weights": needs.weights, "kv_cache_per_token": needs.token, "n_ctx": needs.n_ctx}
    memory |= {"working": needs.work, "total": needs.total}
    return {"family": config.arch, "features": dict(_features(config)), "memory": memory}


def lines(report: dict[str, Any]) -> Iterator[str]:
    """What describe() found, as lines."""
    if "unsupported" in report:
        yield f"  not supported: {report['unsupported']}"
        return
    yield f"  {'family':13}  {report['family']}"
    for name, text in report["features"].items():
        yield f"  {name:13}  {text}"
    if (memory := report.get("memory")) is None:
        return
    token, n_ctx = memory["kv_cache_per_token"], memory["n_ctx"]
    cache = f"KV cache {human_bytes(token * n_ctx)} ({human_bytes(token)} a token) for a context of {n_ctx}"
    yield f"  {'memory':13}  {human_bytes(memory['total'])}: weights {human_bytes(memory['weights'])}, {cache},"
    yield f"  {'':13}  working space about {human_bytes(memory['working'])}"


def _adapter(gguf: GGUFFile) -> dict[str, Any]:
    from ..formats.lora import Adapter

    with Adapter(gguf.path) as adapter:
        ranks = sorted(set(adapter.ranks.values()))
        parts = sorted({name.split(".", 2)[-1].removesuffix(".weight") for name in adapter.ranks})
        scale = f", alpha {adapter.alpha:g}" if adapter.alpha else ""
        rank = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[1:] else "")
        merged = f"; makes a {adapter.activation} model, in a file that is written when it is first used"
        features = {
            "adapter": f"LoRA for {adapter.arch} models (--lora), {rank}{scale}{merged if adapter.activation else ''}",
            "changes": f"{len(adapter.ranks)} matrices: {', '.join(parts)}",
        }
        return {"family": adapter.arch, "features": features}


def _features(c: ModelConfig) -> Iterator[tuple[str, str]]:
    yield "size", f"{c.n_layer} layers of {c.n_embd}, {c.n_vocab} tokens, trained for a context of {c.n_ctx_train}"
    yield "attention", "; ".join(_attention(c))
    yield "positions", "; ".join(_positions(c))
    yield "norms", "; ".join(_norms(c))
    yield "FFN", "; ".join(_ffn(c))
    if others := list(_others(c)):
        yield "also", "; ".join(others)


def _attention(c: ModelConfig) -> Iterator[str]:
    shared = "" if c.n_head_kv == c.n_head else f", {c.n_head_kv} of keys and values"
    yield f"{c.n_head} heads of {c.head_dim_k}{shared}"
    windowed = [window for window in c.windows if 0 < window < c.n_ctx_train]
    if windowed:
        yield f"sliding window of {windowed[0]} tokens in {len(windowed)} of {c.n_layer} layers"
    if c.attn_softcap:
        yield f"scores capped softly at {c.attn_softcap:g}"


def _positions(c: ModelConfig) -> Iterator[str]:
    if c.n_positions:
        yield f"{c.n_positions} learned"
        return
    part = "" if c.rope_dim == c.head_dim_k else f" of {c.rope_dim} dimensions of each head"
    order = ", NeoX order" if c.rope_style == "neox" else ""
    yield f"rotary{part}{order}, base {c.rope_base:g}"
    if c.local_base:
        yield f"base {c.local_base:g} in layers with a window"
    if c.rope_scaling.kind != "none":
        factor = "" if c.rope_scaling.kind == "longrope" else f" by {c.rope_scaling.factor:g}"
        yield f"{c.rope_scaling.kind} scaling{factor}"


def _norms(c: ModelConfig) -> Iterator[str]:
    before, after = c.has("attn_norm.weight"), c.has("post_attention_norm.weight")
    where = "before and after" if before and after else "before" if before else "after"
    yield f"{'RMS' if c.norm == 'rms' else 'layer'} norms {where} attention and FFN"
    if c.parallel:
        yield "attention and FFN in parallel"
    if c.has("attn_q_norm.weight"):
        yield "of queries and keys, " + ("over all heads" if c.whole_head_norms else "by head")


def _ffn(c: ModelConfig) -> Iterator[str]:
    from ..runtime.sparsity import ZEROS

    kind = _ACTIVATIONS[c.activation] + (", gated" if c.gated else ", without a gate")
    if any(c.activation_floors):
        least, most = min(c.activation_floors), max(c.activation_floors)
        kind += f", 0 below {most:g}" if least == most else f", 0 below {least:g} to {most:g} by layer"
    if c.activation in ZEROS:
        kind += "; zeros are skipped (--sparsity exact)"
    if c.n_expert:
        yield f"{c.n_expert} experts of {c.expert_neurons} neurons, {c.n_expert_used} for each token; {kind}"
    else:
        yield f"{c.n_ff} neurons; {kind}"
    if c.has("ffn_bypass.weight"):
        yield "a dense bypass beside them" + (", with a bias" if c.has("ffn_bypass.bias") else "")


def _others(c: ModelConfig) -> Iterator[str]:
    biased = [name for name in ("attn_q", "attn_output", "ffn_up") if c.has(f"{name}.bias")]
    if biased:
        names = {"attn_q": "queries, keys and values", "attn_output": "attention's output", "ffn_up": "the FFN"}
        yield f"biases of {', '.join(names[name] for name in biased)}"
    if c.tied_output:
        yield "tied embeddings"
    if c.logit_softcap:
        yield f"logits capped softly at {c.logit_softcap:g}"
    scales = (("embeddings", c.embd_scale), ("residual sums", c.residual_scale), ("logits", c.logit_scale))
    if any(scale != 1.0 for _, scale in scales):
        yield ", ".join(f"{name} times {scale:.4g}" for name, scale in scales if scale != 1.0)

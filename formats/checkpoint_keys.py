"""config.json of a Hugging Face checkpoint -> the keys of a GGUF file."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .architecture_terms import Architecture
from .checkpoint_rope import Rope
from .checkpoint_settings import Keys, Settings
from .checkpoint_terms import ACTIVATION, ACTIVATIONS, EPSILON, FATRELU, INTEGERS, NUMBERS
from .gguf_header import show

MAX_LAYERS = 100_000  # before the tensors have said how many there really are
MAX_HEAD = 65536


def architecture_keys(
    row: Architecture, name: str, said: Settings
) -> tuple[Keys, dict[str, NDArray[np.float32]], list[str]]:
    """{arch}.* keys without that prefix, the tensors that settings stand for, and notes for the person.

    name: the model's class.
    """
    hf = row.hf
    for setting, wanted in hf.only.items():
        if said.values.get(setting, wanted) not in (wanted, None):
            raise said.unsupported(f"{setting} = {show(said.values[setting])} is not supported, only {wanted}")
    keys: Keys = {}
    for key, names in INTEGERS.items():
        value = said.integer(*names, low=0 if key.startswith("expert") else 1) or None
        if value is None and key == "feed_forward_length":
            value = hf.ff_multiple * keys.get("embedding_length", 0) or None
        if value is None and key == "attention.head_count_kv":
            value = keys.get("attention.head_count")
        if value is not None:
            keys[key] = value
    for key in INTEGERS:
        if key not in keys and not key.startswith("expert"):
            raise said.error(INTEGERS[key][0], "nothing", f"it, for {row.name}.{key}")
    n_embd, n_head = keys["embedding_length"], keys["attention.head_count"]
    keys["attention.head_count_kv"] = _kv_heads(row, said, n_head, keys["attention.head_count_kv"])
    head_dim = said.integer("head_dim", "kv_channels")
    if head_dim is None and n_embd % n_head:
        raise said.error(INTEGERS["attention.head_count"][0], n_head, f"a divisor of {n_embd}, the embedding's length")
    head_dim = head_dim or n_embd // n_head
    if head_dim > MAX_HEAD:
        raise said.error("head_dim", head_dim, f"at most {MAX_HEAD}")
    if head_dim * n_head != n_embd:
        keys["attention.key_length"] = keys["attention.value_length"] = head_dim
    eps = said.number(*EPSILON[row.norm])
    if eps is None:
        raise said.error(EPSILON[row.norm][0], "nothing", "the epsilon of the norms")
    keys["attention.layer_norm_rms_epsilon" if row.norm == "rms" else "attention.layer_norm_epsilon"] = eps
    for key, names in NUMBERS.items():
        if (number := said.number(*names)) is not None:
            keys[key] = number
    for key, usual in (("attn_logit_softcapping", row.softcaps[0]), ("final_logit_softcapping", row.softcaps[1])):
        if usual and key not in keys:
            keys[key] = 0.0
    if name in hf.windowed or not hf.windowed:
        keys |= _windows(row, said, keys["block_count"])
    keys |= _attention_scale(row, said, head_dim, keys)
    if row.parallel == "key" or "use_parallel_residual" in said.values:
        keys["use_parallel_residual"] = said.flag("use_parallel_residual", True)
    weights_norm = said.flag("norm_topk_prob", row.weights_norm)
    if "expert_count" in keys and weights_norm != row.weights_norm:
        keys["expert_weights_norm"] = weights_norm
    if hf.activated and (activation := _activation(said)) not in (row.activation, None):
        keys["hidden_activation"] = "gelu_tanh" if activation == "gelu" else activation
    if hf.activated and said.text(*ACTIVATION) == FATRELU:
        keys["hidden_activation_threshold"] = _floor(said)
    tensors: dict[str, NDArray[np.float32]] = {}
    notes: list[str] = []
    if row.rope:
        rope = Rope(row, said, head_dim, keys["context_length"])
        keys |= rope.keys
        tensors, notes = rope.tensors, rope.notes
    return {**keys, **hf.keys}, tensors, notes


def _kv_heads(row: Architecture, said: Settings, n_head: int, n_head_kv: int) -> int:
    one, overruled = row.hf.one_kv_head
    if one and not said.flag(overruled, False):
        n_head_kv = 1 if said.flag(one, False) else n_head
    if n_head % n_head_kv:
        name = INTEGERS["attention.head_count_kv"][0]
        raise said.error(name, n_head_kv, f"a divisor of the {n_head} heads")
    return n_head_kv


def _activation(said: Settings) -> str | None:
    word = said.text(*ACTIVATION)
    if word is not None and word not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise said.unsupported(f"the activation {show(word)} is not supported; supported: {known}")
    return None if word is None else ACTIVATIONS[word]


def _floor(said: Settings) -> float:
    """Of FATReLU: what an input must reach."""
    floor = said.number("hidden_act_param")
    if floor is None or floor < 0.0:
        raise said.error("hidden_act_param", "nothing" if floor is None else floor, "the threshold of fatrelu, from 0")
    return floor


def _attention_scale(row: Architecture, said: Settings, head_dim: int, keys: Keys) -> Keys:
    """attention.scale, where it is not what the family has anyway."""
    name, power = row.hf.attn_scale
    value = said.number(name) if name else None
    if value is None:
        return {}
    if value <= 0.0:
        raise said.error(name, value, "a number greater than 0")
    wide = keys["embedding_length"] // keys["attention.head_count"]
    usual = (wide if keys["block_count"] in row.wide_heads else head_dim) ** -0.5
    return {} if math.isclose(value**power, usual, rel_tol=1e-6) else {"attention.scale": value**power}


def _windows(row: Architecture, said: Settings, n_layer: int) -> Keys:
    """The window and, where the family's own layers are not the ones, which layers have it."""
    window = said.integer("sliding_window", low=0) or 0
    kind = row.hf.windows
    if not window or not kind or (kind == "late" and not said.flag("use_sliding_window", False)):
        return {"attention.sliding_window": 0} if row.window else {}
    types = said.values.get("layer_types")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != n_layer or any(word not in known for word in types):
            raise said.error("layer_types", show(types), f"{' or '.join(known)} for each of {n_layer} layers")
        has = [word == "sliding_attention" for word in types]
    else:
        first = (said.integer("max_window_layers", low=0) or 0) if kind == "late" else 0
        every = said.integer("sliding_window_pattern", "_sliding_window_pattern", low=0) if kind == "pattern" else 0
        every = row.window_every if every is None else every
        has = [layer >= first and not (every and (layer + 1) % every == 0) for layer in range(min(n_layer, MAX_LAYERS))]
    usual = [not (row.window_every and (layer + 1) % row.window_every == 0) for layer in range(len(has))]
    if not any(has):
        return {}
    found: Keys = {"attention.sliding_window": window}
    return found if has == usual else {**found, "attention.sliding_window_pattern": has}

"""config.json of a Hugging Face checkpoint -> the keys of a GGUF file; what is missing or odd is one clear error.

transformers 5 words rotations differently (`rope_parameters`, by kind of layer where there are two); they are read as
if they were in the older words (`rope_theta`, `rope_scaling`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .architecture_terms import Architecture
from .checkpoint_terms import (
    ACTIVATION,
    ACTIVATIONS,
    EPSILON,
    INTEGERS,
    NUMBERS,
    ROPE_BASE,
    ROTATED_PART,
)
from .errors import FormatError, UnsupportedError
from .gguf_header import show

MAX_INT = 2**31 - 1
MAX_LAYERS = 100_000  # before the tensors have said how many there really are
MAX_HEAD = 65536
Keys = dict[str, Any]
_PLAIN = ("default", "none", "")


class Settings:
    """config.json: typed look-ups by any of several names; what is null counts as missing.

    defaults: what is meant where a setting has none of its names in the file.
    """

    def __init__(self, path: Path, values: Keys, defaults: Mapping[str, Any]) -> None:
        self.path, self.values, self.defaults = path, _in_old_words(values), defaults

    def error(self, name: str, got: object, wanted: object) -> FormatError:
        return FormatError(self.path, f"setting {show(name)}", show(got) if isinstance(got, str) else got, wanted)

    def unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{self.path}: {what}")

    def find(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """The first of these settings that is there, and its value (None: there is none)."""
        for values in (self.values, self.defaults):
            if any(name in values for name in names):
                return next(((name, values[name]) for name in names if values.get(name) is not None), (names[0], None))
        return names[0], None

    def integer(self, *names: str, low: int = 1) -> int | None:
        name, value = self.find(names)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= MAX_INT:
            raise self.error(name, show(value), f"an integer from {low} to {MAX_INT}")
        return value

    def number(self, *names: str) -> float | None:
        name, value = self.find(names)
        if value is None:
            return None
        return as_number(value, lambda wanted: self.error(name, show(value), wanted))

    def text(self, *names: str) -> str | None:
        name, value = self.find(names)
        if value is not None and not isinstance(value, str):
            raise self.error(name, show(value), "a word")
        return value

    def flag(self, name: str, default: bool) -> bool:
        _, value = self.find((name,))
        if value is not None and not isinstance(value, bool):
            raise self.error(name, show(value), "true or false")
        return default if value is None else value


def as_number(value: Any, error: Callable[[str], FormatError]) -> float:
    """A finite number, as float."""
    if type(value) not in (int, float) or abs(value) > 1e30 or value != value:
        raise error("a number")
    return float(value)


def _in_old_words(values: Keys) -> Keys:
    said = values.get("rope_parameters")
    if not isinstance(said, dict):
        return values
    found = dict(values)
    local = said.get("sliding_attention")
    if isinstance(said.get("full_attention"), dict):
        said = said["full_attention"]
    if isinstance(local, dict) and "rope_theta" in local:
        found["rope_local_base_freq"] = local["rope_theta"]
    for name in ("rope_theta", "partial_rotary_factor"):
        if said.get(name) is not None:
            found[name] = said[name]
    found["rope_scaling"] = said
    return found


def architecture_keys(row: Architecture, said: Settings) -> tuple[Keys, dict[str, NDArray[np.float32]], list[str]]:
    """{arch}.* keys without that prefix, the tensors that settings stand for, and notes for the person."""
    hf = row.hf
    for name, wanted in hf.only.items():
        if said.values.get(name, wanted) not in (wanted, None):
            raise said.unsupported(f"{name} = {show(said.values[name])} is not supported, only {wanted}")
    if said.values.get("quantization_config"):
        raise said.unsupported(
            "a quantised checkpoint (quantization_config) cannot be converted; take the original one"
        )
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
    head_dim = said.integer("head_dim")
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
    keys |= _windows(row, said, keys["block_count"])
    keys |= _attention_scale(row, said, head_dim, keys)
    if row.parallel == "key" or "use_parallel_residual" in said.values:
        keys["use_parallel_residual"] = said.flag("use_parallel_residual", True)
    weights_norm = said.flag("norm_topk_prob", row.weights_norm)
    if "expert_count" in keys and weights_norm != row.weights_norm:
        keys["expert_weights_norm"] = weights_norm
    if hf.activated and (activation := _activation(said)) not in (row.activation, None):
        keys["hidden_activation"] = "gelu_tanh" if activation == "gelu" else activation
    tensors: dict[str, NDArray[np.float32]] = {}
    notes: list[str] = []
    if row.rope:
        rope = _Rope(row, said, head_dim, keys["context_length"])
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
        return {}
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


class _Rope:
    """Rotations: the keys, and the factors that some scalings have in tensors."""

    def __init__(self, row: Architecture, said: Settings, head_dim: int, n_ctx: int) -> None:
        self.said, self.keys, self.n_ctx = said, Keys(), n_ctx
        self.tensors: dict[str, NDArray[np.float32]] = {}
        self.notes: list[str] = []
        part = said.number(*ROTATED_PART)
        base = said.number(*ROPE_BASE)
        self.base = 10000.0 if base is None else base
        if self.base < 2.0:
            raise said.error(said.find(ROPE_BASE)[0], self.base, "a number from 2")
        self.dim = int(head_dim * (1.0 if part is None else part))
        if not 0 < self.dim <= head_dim or self.dim % 2:
            raise said.error(said.find(ROTATED_PART)[0], part, f"a part of {head_dim} that is an even number")
        self.keys["rope.dimension_count"] = self.dim
        self.keys["rope.freq_base"] = self.base
        if row.local_base and (local := said.number("rope_local_base_freq")) is not None:
            self.keys["rope.freq_base_swa"] = local
        scaling = said.values.get("rope_scaling")
        if scaling is None:
            return
        if not isinstance(scaling, dict):
            raise said.error("rope_scaling", show(scaling), "an object")
        self.scaling = scaling
        kind = scaling.get("rope_type") or scaling.get("type") or ""
        if not isinstance(kind, str):
            raise said.error("rope_scaling.rope_type", show(kind), "a word")
        if kind in _PLAIN:
            return
        made = {
            "linear": self.linear,
            "dynamic": self.dynamic,
            "yarn": self.yarn,
            "llama3": self.llama3,
            "longrope": self.longrope,
            "su": self.longrope,
        }
        if kind not in made:
            raise said.unsupported(f"rope scaling of type {show(kind)} is not supported; supported: {', '.join(made)}")
        made[kind]()

    def number(self, name: str, default: float | None = None) -> float:
        value = self.scaling.get(name)
        value = default if value is None else value
        return as_number(value, lambda wanted: self.said.error(f"rope_scaling.{name}", show(value), wanted))

    def factor(self) -> float:
        value = self.number("factor")
        if value < 1.0:
            raise self.said.error("rope_scaling.factor", value, "a number from 1")
        return value

    def original(self, default: int) -> int:
        """The context that was trained before it was stretched."""
        value = self.scaling.get("original_max_position_embeddings")
        value = self.said.integer("original_max_position_embeddings") if value is None else value
        value = default if value is None else value
        if type(value) is not int or not 1 < value <= MAX_INT:
            raise self.said.error("original_max_position_embeddings", show(value), "an integer greater than 1")
        return value

    def linear(self) -> None:
        self.keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": self.factor()}

    def dynamic(self) -> None:
        self.notes.append(f"dynamic rope scaling, for contexts beyond {self.n_ctx} tokens, is left out")

    def yarn(self) -> None:
        factor = self.factor()
        if self.scaling.get("truncate") is False:
            raise self.said.unsupported("yarn with truncate = false is not supported")

        def mscale(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0

        default = mscale(1.0)
        if self.scaling.get("mscale") and self.scaling.get("mscale_all_dim"):
            default = mscale(self.number("mscale")) / mscale(self.number("mscale_all_dim"))
        self.keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": factor,
            "rope.scaling.original_context_length": self.original(self.n_ctx),
        }
        # Readers multiply by 1 + 0.1 ln(factor) themselves.
        extra = self.number("attention_factor", default) / mscale(1.0)
        if not math.isclose(extra, 1.0, rel_tol=1e-6):
            self.keys["rope.scaling.yarn_attn_factor"] = extra
        for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            if (value := self.number(name, usual) or usual) != usual:
                self.keys[f"rope.scaling.yarn_{name}"] = value

    def llama3(self) -> None:
        factor, low, high = self.factor(), self.number("low_freq_factor"), self.number("high_freq_factor")
        if not 0.0 < low < high:
            raise self.said.error("rope_scaling.low_freq_factor", low, f"more than 0 and less than {high}")
        original = self.original(self.n_ctx)
        waves = 2.0 * np.pi * self.base ** (np.arange(0, self.dim, 2, dtype=np.float64) / self.dim)
        between = (original / waves - low) / (high - low)
        mixed = 1.0 / ((1.0 - between) / factor + between)
        factors = np.where(waves < original / high, 1.0, np.where(waves > original / low, factor, mixed))
        self.tensors["rope_freqs.weight"] = factors.astype(np.float32)

    def longrope(self) -> None:
        original = self.original(self.n_ctx)
        for name in ("long", "short"):
            values = self.scaling.get(f"{name}_factor")
            if not isinstance(values, list) or len(values) != self.dim // 2:
                wanted = f"{self.dim // 2} numbers, one for each rotation"
                raise self.said.error(f"rope_scaling.{name}_factor", show(values), wanted)
            error = self.said.error(f"rope_scaling.{name}_factor", show(values), "numbers greater than 0")
            numbers = [as_number(value, lambda _: error) for value in values]  # noqa: B023
            if min(numbers) <= 0.0:
                raise error
            self.tensors[f"rope_factors_{name}.weight"] = np.array(numbers, np.float32)
        factor = self.number("factor", self.n_ctx / original)
        usual = math.sqrt(1.0 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
        self.keys |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": self.number("attention_factor", usual),
        }

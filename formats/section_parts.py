"""The parts that a section may have, and the check that their keys and tensors fit together and fit the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .config import ModelConfig
from .errors import FormatError
from .gguf_header import show
from .types import GGMLType

RANK_MULTIPLE = 32
PLACEMENT_KEY = "hotcold.placement.attention"  # that every placement has
# part -> (prefix of its keys, its tensors, which all but ffn_thresholds are there once for each layer; of ffn_hot_idx,
# layers without hot neurons have none)
PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "profile": ("hotcold.profile.", ("ffn_act_freq",)),
    "thresholds": ("hotcold.threshold.", ("ffn_thresholds",)),
    "predictors": ("hotcold.predictor.", ("ffn_pred_a.weight", "ffn_pred_b.weight", "ffn_pred_cut")),
    "down_t": ("hotcold.down_t.", ("ffn_down_t.weight",)),
    "placement": ("hotcold.placement.", ("ffn_hot_idx",)),
}
Layout = Mapping[str, tuple[tuple[int, ...], GGMLType]]
"""Tensor name -> (shape in ggml order, type)."""

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.")


def part_of(name: str) -> str | None:
    """The part that a key or a tensor of a section belongs to; None for what every section has, and for unknown."""
    bare = _BLOCK.sub("", name, count=1)
    for part, (prefix, tensors) in PARTS.items():
        if name.startswith(prefix) or bare in tensors:
            return part
    return None


def check(path: Path, metadata: Mapping[str, Any], tensors: Layout, config: ModelConfig) -> None:
    """Raise FormatError unless a section's keys and tensors fit together and fit the model; path: for the message."""
    _complete(path, tensors, config.n_layer)
    if any(part_of(name) == "predictors" for name in tensors):
        for key, choices in (("kind", ("relu", "dejavu")), ("input", ("ffn_norm", "residual"))):
            got = metadata.get(f"hotcold.predictor.{key}")
            if not isinstance(got, str) or got not in choices:
                raise FormatError(path, f"key 'hotcold.predictor.{key}'", show(got), " or ".join(map(repr, choices)))
    _placement(path, metadata, tensors, config)
    for name, (shape, kind) in tensors.items():
        if part_of(name) is None:
            continue
        field = f"tensor {show(name)}"
        block = _BLOCK.match(name)
        if block and int(block[1]) >= config.n_layer:
            raise FormatError(path, field, f"layer {block[1]}", f"one of the model's {config.n_layer} layers")
        if name.endswith("ffn_down_t.weight") and kind.block_size > 1 and config.n_ff % 32:
            wanted = f"a float type, as n_ff = {config.n_ff} is no multiple of 32"
            raise FormatError(path, f"{field}: type", kind.name, wanted)
        wanted_kind = GGMLType.I32 if name.endswith("ffn_hot_idx") else GGMLType.F32
        if not name.endswith(".weight") and kind != wanted_kind:
            raise FormatError(path, f"{field}: type", kind.name, wanted_kind.name)
        expected = _expected(path, name, metadata, tensors, config)
        if shape != expected:
            raise FormatError(path, f"{field}: shape", shape, expected)


def _placement(path: Path, metadata: Mapping[str, Any], tensors: Layout, config: ModelConfig) -> None:
    """The keys of a placement."""
    prefix = PARTS["placement"][0]
    if not any(part_of(name) == "placement" for name in (*metadata, *tensors)):
        return

    def require(key: str, fits: Callable[[Any], bool], wanted: str) -> None:
        got = metadata.get(prefix + key)
        if not fits(got):
            raise FormatError(path, f"key '{prefix}{key}'", show(got), wanted)

    def is_flags(value: Any) -> bool:
        return isinstance(value, str) and len(value) == config.n_layer and not set(value) - {"0", "1"}

    require("attention", is_flags, f"a string of {config.n_layer} digits 0 or 1")
    require("head", lambda value: type(value) is int and value in (0, 1), "0 or 1")
    for key in ("n_ctx", "budget", "group"):
        require(key, lambda value: type(value) is int and 0 < value < 2**63, "a positive integer")
    require("cold", lambda value: value in ("cpu", "mapped"), "'cpu' or 'mapped'")
    for key in ("objective", "hardware", "sparsity", "profile"):
        require(key, lambda value: isinstance(value, str), "a string")


def _complete(path: Path, tensors: Layout, n_layer: int) -> None:
    for part, (_, names) in PARTS.items():
        there = next((name for name in tensors if part_of(name) == part), None)
        if there is None or part == "placement":
            continue
        for bare in names:
            for name in [bare] if bare == "ffn_thresholds" else [f"blk.{layer}.{bare}" for layer in range(n_layer)]:
                if name not in tensors:
                    raise FormatError(path, f"tensor {show(name)}", "none", f"one, as there is {show(there)}")


def _expected(
    path: Path, name: str, metadata: Mapping[str, Any], tensors: Layout, config: ModelConfig
) -> tuple[int, ...]:
    bare = _BLOCK.sub("", name, count=1)
    if bare == "ffn_thresholds":
        densities = metadata.get("hotcold.threshold.densities")
        if not isinstance(densities, (list, np.ndarray)):
            raise FormatError(path, "key 'hotcold.threshold.densities'", show(densities), "an array of numbers")
        return (config.n_layer, len(densities))
    if bare == "ffn_hot_idx":
        shape = tensors[name][0]
        fits = len(shape) == 1 and 1 <= shape[0] <= config.n_ff
        return shape if fits else (config.n_ff,)
    if bare in ("ffn_act_freq", "ffn_pred_cut"):
        return (config.n_ff,)
    if bare == "ffn_down_t.weight":
        return (config.n_embd, config.n_ff)
    a, _ = tensors[name.replace("ffn_pred_b", "ffn_pred_a")]
    if len(a) != 2 or a[1] % RANK_MULTIPLE:
        wanted = f"({config.n_embd}, a multiple of {RANK_MULTIPLE})"
        raise FormatError(path, f"tensor {show(name)}: shape", a, wanted)
    return (config.n_embd, a[1]) if bare == "ffn_pred_a.weight" else (a[1], config.n_ff)

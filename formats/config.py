"""ModelConfig: one frozen dataclass from a file's metadata; later code never sees a metadata key."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .architectures import Architecture, Shape, lookup
from .errors import FormatError, UnsupportedError
from .gguf import GGUFFile
from .gguf_header import show
from .powerinfer import FAMILIES, check_predictors, own_block

MAX_INT = 2**31 - 1  # the largest int32: positions and token ids are of that type
_SCALING_KINDS = ("none", "linear", "yarn")
# {arch}.hidden_activation -> our name; Hugging Face's spellings are met in files too.
_ACTIVATIONS = {name: name for name in ("silu", "gelu", "relu", "relu2", "drelu")}
_ACTIVATIONS |= {"swish": "silu", "gelu_tanh": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}
_ACTIVATIONS |= {"relu_squared": "relu2", "relu_sqr": "relu2"}


@dataclass(frozen=True)
class RopeScaling:
    """How positions are stretched beyond the trained context; factor is 1 / ggml's freq_scale.

    As in ggml, rotated vectors are scaled by attn_factor, and if ext_factor != 0 by 1 + 0.1 ln(factor) too.
    """

    kind: str = "none"  # none, linear or yarn
    factor: float = 1.0
    orig_ctx: int = 0
    ext_factor: float = 0.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """All sizes and switches of a model, validated against its tensors."""

    arch: str
    name: str
    n_vocab: int
    n_ctx_train: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim_k: int
    head_dim_v: int
    n_ff: int
    norm_eps: float
    rope_dim: int
    rope_base: float
    rope_style: str
    rope_scaling: RopeScaling
    sliding_window: int  # tokens that a token sees, itself included; 0 = all
    attn_scale: float
    activation: str  # of the FFN: silu, gelu (tanh form), relu, relu2 (squared), or drelu (gate and up both)
    qkv_bias: bool
    output_bias: bool  # attn_output.bias
    tied_output: bool  # no output.weight: token_embd.weight serves
    sampling: dict[str, float | int] = field(default_factory=dict)  # general.sampling.*, without that prefix

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ModelConfig:
        """Read and check metadata and tensor shapes: FormatError if broken, UnsupportedError if foreign."""
        return _Reader(file).config()


class _Reader:
    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        arch = file.get("general.architecture", None, str)
        if arch is None:
            raise self.error("general.architecture", "no such key", "the name of an architecture")
        _refuse_other_kinds(file)
        try:
            self.row: Architecture = lookup(arch)
        except UnsupportedError as error:
            raise self.unsupported(str(error)) from None
        if file.powerinfer and arch not in FAMILIES:
            raise self.unsupported(f"PowerInfer files of architecture {show(arch)} are not supported")
        self.n_layer = self.integer("block_count", 1)

    def error(self, key: str, got: object, wanted: object) -> FormatError:
        return FormatError(self.file.path, f"key {show(key)}", got, wanted)

    def unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{self.file.path}: {what}")

    def config(self) -> ModelConfig:
        row, file = self.row, self.file
        if self.integer("expert_count", 0, 0) > 0:
            raise self.unsupported("mixture-of-experts models are not supported")
        if file.get(f"{row.name}.attention.causal", True, bool) is False:
            raise self.unsupported("models with non-causal attention are not supported")
        n_embd = self.integer("embedding_length", 1)
        n_head = self.integer("attention.head_count", 1)
        n_head_kv = self.integer("attention.head_count_kv", 1, n_head)
        if n_head % n_head_kv:
            key = f"{row.name}.attention.head_count_kv"
            raise self.error(key, n_head_kv, f"a divisor of head_count = {n_head}")
        head_dim_k = self.head_dim("attention.key_length", n_embd, n_head)
        head_dim_v = self.head_dim("attention.value_length", n_embd, n_head)
        rope_dim = self.integer("rope.dimension_count", 2, head_dim_k)
        if rope_dim % 2 or rope_dim > head_dim_k:
            key = f"{row.name}.rope.dimension_count"
            raise self.error(key, rope_dim, f"an even number up to the head size {head_dim_k}")
        n_ctx_train = self.integer("context_length", 1)
        scale = self.number("attention.scale", 0.0, 0.0, 1e6)
        config = ModelConfig(
            arch=row.name,
            name=file.get("general.name", file.path.stem, str),
            n_vocab=self.vocabulary(),
            n_ctx_train=n_ctx_train,
            n_embd=n_embd,
            n_layer=self.n_layer,
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim_k=head_dim_k,
            head_dim_v=head_dim_v,
            n_ff=self.integer("feed_forward_length", 1),
            norm_eps=self.number("attention.layer_norm_rms_epsilon", None, 0.0, 1.0),
            rope_dim=rope_dim,
            rope_base=self.number("rope.freq_base", 10000.0, 2.0, 1e30),
            rope_style=row.rope_style,
            rope_scaling=self.rope_scaling(n_ctx_train),
            sliding_window=self.sliding_window(),
            attn_scale=scale or 1.0 / math.sqrt(head_dim_k),
            activation=self.activation(),
            qkv_bias="blk.0.attn_q.bias" in file.tensors,
            output_bias="blk.0.attn_output.bias" in file.tensors,
            tied_output="output.weight" not in file.tensors,
            sampling=self.sampling(),
        )
        self.check_tensors(config)
        return config

    def integer(self, suffix: str, low: int, default: int | None = None) -> int:
        """{arch}.suffix in [low, MAX_INT]; an array with one equal value for each layer counts as one."""
        key = f"{self.row.name}.{suffix}"
        if key not in self.file.metadata:
            if default is None:
                raise self.error(key, "no such key", "an integer")
            return default
        value = self.file.metadata[key]
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and suffix != "block_count":
            if value.size != self.n_layer:
                raise self.error(key, f"{value.size} values", f"one for each of {self.n_layer} layers")
            if (value != value[0]).any():
                raise self.unsupported(f"{show(key)} differs between layers, which is not supported")
            value = int(value[0])
        if type(value) is not int or not low <= value <= MAX_INT:
            raise self.error(key, show(value), f"an integer from {low} to {MAX_INT}")
        return value

    def number(self, suffix: str, default: float | None, low: float, high: float) -> float:
        """{arch}.suffix as a float in [low, high], so that float32 arithmetic on it stays finite."""
        key = f"{self.row.name}.{suffix}"
        value = self.file.get(key, default, float)
        if value is None:
            raise self.error(key, "no such key", "a number")
        if not low <= value <= high:  # a NaN is in no range
            raise self.error(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def head_dim(self, suffix: str, n_embd: int, n_head: int) -> int:
        """{arch}.suffix; n_embd / n_head where the file has no such key."""
        if f"{self.row.name}.{suffix}" not in self.file.metadata and n_embd % n_head:
            wanted = f"a divisor of embedding_length = {n_embd}"
            raise self.error(f"{self.row.name}.attention.head_count", n_head, wanted)
        return self.integer(suffix, 1, n_embd // n_head)

    def vocabulary(self) -> int:
        info = self.file.tensors.get("token_embd.weight")
        if info is None or len(info.shape) != 2:
            got = "none" if info is None else info.shape
            raise FormatError(self.file.path, "tensor 'token_embd.weight'", got, "a matrix")
        tokens = self.file.get("tokenizer.ggml.tokens", None, list)
        if tokens is not None and len(tokens) != info.shape[1]:
            wanted = f"{info.shape[1]}, the rows of token_embd.weight"
            raise self.error("tokenizer.ggml.tokens", f"{len(tokens)} tokens", wanted)
        return info.shape[1]

    def sliding_window(self) -> int:
        window = self.integer("attention.sliding_window", 0, 0)
        if window and f"{self.row.name}.attention.sliding_window_pattern" in self.file.metadata:
            raise self.unsupported("sliding windows in only some layers are not supported")
        return window

    def rope_scaling(self, n_ctx_train: int) -> RopeScaling:
        prefix = f"{self.row.name}.rope.scaling"
        kind = self.file.get(f"{prefix}.type", "linear", str)
        if kind not in _SCALING_KINDS:
            supported = ", ".join(_SCALING_KINDS)
            raise self.unsupported(f"rope scaling type {show(kind)} is not supported; supported: {supported}")
        # Old files have rope.scale_linear; as in llama.cpp, a factor of 0 means none.
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 0.0, 0.0, 1e6), 0.0, 1e6)
        if 0.0 < factor < 1e-6:
            raise self.error(f"{prefix}.factor", factor, "0 (none), or a number from 1e-06 to 1e+06")
        factor = factor or 1.0
        attn = self.number("rope.scaling.attn_factor", 1.0, 1e-6, 1e6)
        if kind != "yarn":
            kind = "linear" if kind == "linear" and factor != 1.0 else "none"
            return RopeScaling(kind, factor if kind == "linear" else 1.0, n_ctx_train, attn_factor=attn)
        if self.file.get(f"{prefix}.yarn_log_multiplier", 0.0, float) != 0.0:
            raise self.unsupported("rope scaling with a yarn_log_multiplier is not supported")
        return RopeScaling(
            kind,
            factor,
            orig_ctx=self.integer("rope.scaling.original_context_length", 1, n_ctx_train),
            ext_factor=self.number("rope.scaling.yarn_ext_factor", 1.0, 0.0, 1e6),
            attn_factor=attn * self.number("rope.scaling.yarn_attn_factor", 1.0, 1e-6, 1e6),
            beta_fast=self.number("rope.scaling.yarn_beta_fast", 32.0, 1e-6, 1e6),
            beta_slow=self.number("rope.scaling.yarn_beta_slow", 1.0, 1e-6, 1e6),
        )

    def activation(self) -> str:
        """The FFN's activation function: what the file says, or else what the family has."""
        key = f"{self.row.name}.hidden_activation"
        default = FAMILIES[self.row.name] if self.file.powerinfer else self.row.activation
        said = self.file.get(key, default, str)
        if said not in _ACTIVATIONS:
            raise self.unsupported(f"{key} = {show(said)} is not supported; supported: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[said]

    def sampling(self) -> dict[str, float | int]:
        prefix = "general.sampling."
        found: dict[str, float | int] = {}
        for key, value in self.file.metadata.items():
            # A string (`sequence`, the samplers' order) sets no number of ours.
            if not key.startswith(prefix) or isinstance(value, str):
                continue
            if type(value) not in (int, float) or not math.isfinite(value):
                raise self.error(key, show(value), "a finite number")
            found[key.removeprefix(prefix)] = value
        return found

    def check_tensors(self, config: ModelConfig) -> None:
        """Every tensor that the architecture needs is there in its shape, and no other is."""
        row, tensors = self.row, self.file.tensors
        sizes = {
            "n_embd": config.n_embd,
            "n_vocab": config.n_vocab,
            "n_ff": config.n_ff,
            "n_q": config.n_head * config.head_dim_k,
            "n_k": config.n_head_kv * config.head_dim_k,
            "n_v": config.n_head_kv * config.head_dim_v,
            "n_att": config.n_head * config.head_dim_v,
            "n_rot": config.rope_dim // 2,
        }
        optional = {name for name in row.block_optional if f"blk.0.{name}" in tensors}
        if len(optional & {"attn_q.bias", "attn_k.bias", "attn_v.bias"}) in (1, 2):
            raise self.unsupported("biases on only some of attn_q, attn_k and attn_v are not supported")
        wanted: dict[str, Shape] = dict(row.model_required)
        wanted |= {name: shape for name, shape in row.model_optional.items() if name in tensors}
        block = dict(row.block_required) | {name: row.block_optional[name] for name in optional}
        if self.file.powerinfer:
            block = own_block(block)
        if self.n_layer * len(block) > len(tensors):  # before n_layer is used as a loop count
            wanted_layers = f"at most {len(tensors) // len(block)}, as there are {len(tensors)} tensors"
            raise self.error(f"{row.name}.block_count", self.n_layer, wanted_layers)
        wanted |= {f"blk.{i}.{name}": shape for i in range(self.n_layer) for name, shape in block.items()}
        for name, shape in wanted.items():
            expected = tuple(sizes[size] for size in shape)
            info: Any = tensors.get(name)
            if info is None or info.shape != expected:
                got = "no such tensor" if info is None else f"shape {info.shape}"
                raise FormatError(self.file.path, f"tensor {show(name)}", got, f"shape {expected}")
        known = set(wanted)
        if self.file.powerinfer:
            known |= check_predictors(self.file, config.n_layer, config.n_embd, config.n_ff)
        for name in tensors:
            if name not in known:
                raise self.unsupported(f"tensor {show(name)} is not one that {row.name} models are run with")


def _refuse_other_kinds(file: GGUFFile) -> None:
    kind = file.get("general.type", "model", str)
    if kind != "model":
        raise UnsupportedError(f"{file.path}: a file of type {show(kind)} is not a model that can be run")
    parts = file.get("split.count", 1, int)
    if parts > 1:
        raise UnsupportedError(f"{file.path}: one of {parts} parts of a split model; merge them first")

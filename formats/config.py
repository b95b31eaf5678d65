"""ModelConfig: one frozen dataclass from a file's metadata; later code never sees a metadata key."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from .architecture_terms import WHOLE_NORMS, Architecture, Group
from .architectures import lookup
from .errors import FormatError, UnsupportedError
from .gguf import GGUFFile
from .gguf_header import show
from .model_tensors import check, dimensions, fused_rows, groups, unfused
from .powerinfer import FAMILIES, check_predictors

MAX_INT = 2**31 - 1  # the largest int32: positions and token ids are of that type
_SCALING_KINDS = ("none", "linear", "yarn", "longrope")
_SOFTMAX = 1  # {arch}.expert_gating_func
_POOLINGS = {0: "mean", 1: "mean", 2: "cls", 3: "last"}  # {arch}.pooling_type, as llama.cpp numbers them; 0: not said
# {arch}.hidden_activation -> our name; Hugging Face's spellings are met in files too.
_ACTIVATIONS = {name: name for name in ("silu", "gelu", "gelu_erf", "relu", "relu2", "drelu")}
_ACTIVATIONS |= {"swish": "silu", "gelu_tanh": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}
_ACTIVATIONS |= {"relu_squared": "relu2", "relu_sqr": "relu2"}


@dataclass(frozen=True)
class RopeScaling:
    """How positions are stretched beyond the trained context; factor is 1 / ggml's freq_scale.

    As in ggml, rotated vectors are scaled by attn_factor, and if ext_factor != 0 by 1 + 0.1 ln(factor) too. longrope:
    frequencies are divided by factors in the file, of which there are some for contexts longer than orig_ctx.
    """

    kind: str = "none"  # none, linear, yarn or longrope
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
    n_ff: int  # neurons of a layer; of a mixture of experts, those of all its experts
    norm: str  # "rms", or "layer" (mean taken off)
    norm_eps: float
    rope_dim: int  # 0: no rotations
    rope_base: float
    rope_style: str  # "norm" or "neox"
    rope_scaling: RopeScaling
    windows: tuple[int, ...]  # by layer, the tokens that a token sees, itself included; 0 = all
    attn_scale: float
    activation: str  # of the FFN: silu, gelu (tanh form), gelu_erf, relu, relu2 (squared), or drelu (gate and up both)
    activation_floors: tuple[float, ...]  # by layer: an activated gate below it counts as 0 (FATReLU); 0: none
    tensors: frozenset[str]  # names of those that the file has, of the first block for all; fused ones taken apart
    whole_head_norms: bool = False  # norms of q and k are over all heads at once
    local_base: float = 0.0  # rope base of layers with a window, which are not scaled then; 0: as all others
    gated: bool = True  # h = act(gate) * up, or else act(up)
    parallel: bool = False  # attention and FFN read the same residual
    embd_scale: float = 1.0  # embeddings are multiplied by it
    residual_scale: float = 1.0  # what attention and FFN add is multiplied by it
    logit_scale: float = 1.0  # logits are multiplied by it
    attn_softcap: float = 0.0  # scores become cap * tanh(score / cap); 0: they stay
    logit_softcap: float = 0.0
    n_positions: int = 0  # learned ones; 0: any number
    n_expert: int = 0
    n_expert_used: int = 0  # of a token
    weights_norm: bool = True  # the weights of a token's experts sum to 1
    pooling: str = "mean"  # of a text's hidden states into its embedding: mean, cls (the first) or last; "": another
    sampling: dict[str, float | int] = field(default_factory=dict)  # general.sampling.*, without that prefix

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ModelConfig:
        """Read and check metadata and tensor shapes: FormatError if broken, UnsupportedError if foreign.

        It also tells the file which rows of fused tensors stand for others (GGUFFile.rows).
        """
        return _Reader(file).config()

    def has(self, tensor: str) -> bool:
        """Whether there is a tensor of that name, those of blocks without their `blk.N.`."""
        return tensor in self.tensors

    @property
    def tied_output(self) -> bool:
        """No output.weight: token_embd.weight serves."""
        return not self.has("output.weight")

    @property
    def expert_neurons(self) -> int:
        """Neurons of one expert."""
        return self.n_ff // self.n_expert


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
        if file.get(f"{row.name}.attention.causal", True, bool) is False:
            raise self.unsupported("models with non-causal attention are not supported")
        for suffix in ("attention.max_alibi_bias", "attention.clamp_kqv"):
            if self.number(suffix, 0.0, -1e30, 1e30):
                raise self.unsupported(f"{row.name}.{suffix} is not supported")
        n_embd = self.integer("embedding_length", 1)
        n_head = self.integer("attention.head_count", 1)
        n_head_kv = self.integer("attention.head_count_kv", 1, n_head)
        if n_head % n_head_kv:
            key = f"{row.name}.attention.head_count_kv"
            raise self.error(key, n_head_kv, f"a divisor of head_count = {n_head}")
        head_dim_k = self.head_dim("attention.key_length", n_embd, n_head)
        head_dim_v = self.head_dim("attention.value_length", n_embd, n_head)
        rope_dim = self.integer("rope.dimension_count", 2, head_dim_k) if row.rope else 0
        if rope_dim % 2 or rope_dim > head_dim_k:
            key = f"{row.name}.rope.dimension_count"
            raise self.error(key, rope_dim, f"an even number up to the head size {head_dim_k}")
        n_ctx_train = self.integer("context_length", 1)
        model, block = groups(file, row)
        each = sum(not name.startswith("ffn_bypass.") for name in block)
        if self.n_layer * each > len(file.tensors):  # before it is used as a loop count
            most = len(file.tensors) // each
            wanted = f"at most {most}, as there are {len(file.tensors)} tensors"
            raise self.error(f"{row.name}.block_count", self.n_layer, wanted)
        n_expert, n_used, n_one = self.experts(block)
        windows = self.windows()
        n_wide = n_embd // n_head if self.n_layer in row.wide_heads else head_dim_k
        eps = "attention.layer_norm_rms_epsilon" if row.norm == "rms" else "attention.layer_norm_epsilon"
        logit_scale = self.number("logit_scale", 1.0, 1e-6, 1e6)
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
            n_ff=n_one * max(1, n_expert),
            norm=row.norm,
            norm_eps=self.number(eps, None, 0.0, 1.0),
            rope_dim=rope_dim,
            rope_base=self.number("rope.freq_base", 10000.0, 2.0, 1e30),
            rope_style=row.rope or "norm",
            rope_scaling=self.rope_scaling(n_ctx_train),
            windows=windows,
            attn_scale=self.number("attention.scale", 0.0, 0.0, 1e6) or 1.0 / math.sqrt(n_wide),
            activation=self.activation(),
            activation_floors=self.floors(),
            tensors=frozenset(model) | unfused(block),
            whole_head_norms=block.get("attn_q_norm.weight") == WHOLE_NORMS["attn_q_norm.weight"],
            local_base=self.local_base(windows),
            gated=row.gated,
            parallel=self.parallel(block),
            embd_scale=self.number("embedding_scale", math.sqrt(n_embd) if row.embd_scale else 1.0, 1e-6, 1e6),
            residual_scale=self.number("residual_scale", 1.0, 1e-6, 1e6),
            logit_scale=1.0 / logit_scale if row.divides_logits else logit_scale,
            attn_softcap=self.number("attn_logit_softcapping", row.softcaps[0], 0.0, 1e6),
            logit_softcap=self.number("final_logit_softcapping", row.softcaps[1], 0.0, 1e6),
            n_positions=self.positions() if "position_embd.weight" in model else 0,
            n_expert=n_expert,
            n_expert_used=n_used,
            weights_norm=file.get(f"{row.name}.expert_weights_norm", row.weights_norm, bool),
            pooling=_POOLINGS.get(self.integer("pooling_type", 0, 0), ""),
            sampling=self.sampling(),
        )
        self.check_tensors(config, model, block)
        file.rows = fused_rows(file, block, self.n_layer, self.sizes(config))
        return config

    def local_base(self, windows: tuple[int, ...]) -> float:
        """The rope base of layers with a window, if their rotations are not those of the others."""
        if not any(windows) or not (self.row.local_base or self.row.local_plain):
            return 0.0
        usual = self.row.local_base or self.number("rope.freq_base", 10000.0, 2.0, 1e30)
        return self.number("rope.freq_base_swa", usual, 2.0, 1e30)

    def experts(self, block: Group) -> tuple[int, int, int]:
        """How many experts there are, how many a token uses, and the neurons of one (0, 0 and all without experts)."""
        n_expert = self.integer("expert_count", 0, 0)
        key, there = f"{self.row.name}.expert_count", "ffn_gate_exps.weight" in block
        if there and not n_expert:
            raise self.error(key, 0, "the number of the experts whose tensors there are")
        if not n_expert:
            return 0, 0, self.integer("feed_forward_length", 1)
        n_used = self.integer("expert_used_count", 1)
        if n_used > n_expert:
            raise self.error(f"{self.row.name}.expert_used_count", n_used, f"at most expert_count = {n_expert}")
        if not there:
            raise self.error(key, n_expert, "0, as there are no tensors of experts (or each has a tensor of its own)")
        gating = self.integer("expert_gating_func", 0, _SOFTMAX)
        scale = self.number("expert_weights_scale", 1.0, 0.0, 1e6)
        if gating not in (0, _SOFTMAX) or scale not in (0.0, 1.0):
            raise self.unsupported("experts that are not weighted by a plain softmax are not supported")
        suffix = "expert_feed_forward_length"
        n_one = self.integer(suffix if f"{self.row.name}.{suffix}" in self.file.metadata else "feed_forward_length", 1)
        if n_one * n_expert > MAX_INT:
            raise self.error(f"{self.row.name}.{suffix}", n_one, f"at most {MAX_INT // n_expert}")
        return n_expert, n_used, n_one

    def parallel(self, block: Group) -> bool:
        if self.row.parallel == "key":
            return self.file.get(f"{self.row.name}.use_parallel_residual", True, bool)
        return self.row.parallel == "yes" or (bool(self.row.parallel) and "ffn_norm.weight" not in block)

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

    def positions(self) -> int:
        info = self.file.tensors.get("position_embd.weight")
        return info.shape[-1] if info else self.integer("context_length", 1)

    def windows(self) -> tuple[int, ...]:
        """Each layer's sliding window; by the row which layers have one, if the file does not say."""
        window = self.integer("attention.sliding_window", 0, self.row.window)
        key = f"{self.row.name}.attention.sliding_window_pattern"
        said = self.file.metadata.get(key)
        if isinstance(said, np.ndarray) and said.dtype == bool:
            if said.size != self.n_layer:
                raise self.error(key, f"{said.size} values", f"one for each of {self.n_layer} layers")
            return tuple(window if has else 0 for has in said.tolist())
        every = self.integer("attention.sliding_window_pattern", 0, self.row.window_every)
        return tuple(0 if every and (layer + 1) % every == 0 else window for layer in range(self.n_layer))

    def rope_scaling(self, n_ctx_train: int) -> RopeScaling:
        prefix = f"{self.row.name}.rope.scaling"
        factors = "rope_factors_long.weight" in self.file.tensors
        # llama.cpp's converter of Phi-3 writes the factors and no type.
        kind = self.file.get(f"{prefix}.type", "longrope" if factors else "linear", str)
        if factors and kind != "longrope":
            raise self.unsupported(f"rope factors with a scaling of type {show(kind)} are not supported")
        if kind not in _SCALING_KINDS:
            supported = ", ".join(_SCALING_KINDS)
            raise self.unsupported(f"rope scaling type {show(kind)} is not supported; supported: {supported}")
        # Old files have rope.scale_linear; as in llama.cpp, a factor of 0 means none.
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 0.0, 0.0, 1e6), 0.0, 1e6)
        if 0.0 < factor < 1e-6:
            raise self.error(f"{prefix}.factor", factor, "0 (none), or a number from 1e-06 to 1e+06")
        factor = factor or 1.0
        attn = self.number("rope.scaling.attn_factor", 1.0, 1e-6, 1e6)
        if kind == "longrope":
            orig_ctx = self.integer("rope.scaling.original_context_length", 1, n_ctx_train)
            return RopeScaling(kind, orig_ctx=orig_ctx, attn_factor=attn)
        if kind != "yarn":
            kind = "linear" if kind == "linear" and factor != 1.0 else "none"
            return RopeScaling(kind, factor if kind == "linear" else 1.0, n_ctx_train, attn_factor=attn)
        if self.file.get(f"{prefix}.yarn_log_multiplier", 0.0, float) != 0.0:
            raise self.unsupported("rope scaling with a yarn_log_multiplier is not supported")
        self.check_magnitude(1.0 + 0.1 * math.log(factor))
        return RopeScaling(
            kind,
            factor,
            orig_ctx=self.integer("rope.scaling.original_context_length", 1, n_ctx_train),
            ext_factor=self.number("rope.scaling.yarn_ext_factor", 1.0, 0.0, 1e6),
            attn_factor=attn,
            beta_fast=self.number("rope.scaling.yarn_beta_fast", 32.0, 1e-6, 1e6),
            beta_slow=self.number("rope.scaling.yarn_beta_slow", 1.0, 1e-6, 1e6),
        )

    def check_magnitude(self, usual: float) -> None:
        """yarn_attn_factor is Hugging Face's whole factor where converters write it, and llama.cpp does not heed it."""
        said = self.number("rope.scaling.yarn_attn_factor", 1.0, 1e-6, 1e6)
        if said != 1.0 and not math.isclose(said, usual, rel_tol=1e-3):
            key = f"{self.row.name}.rope.scaling.yarn_attn_factor"
            raise self.unsupported(f"{key} = {said:g} is not supported, only the usual {usual:g} (or 1)")

    def activation(self) -> str:
        """The FFN's activation function: what the file says, or else what the family has."""
        key = f"{self.row.name}.hidden_activation"
        default = FAMILIES[self.row.name] if self.file.powerinfer else self.row.activation
        said = self.file.get(key, default, str)
        if said not in _ACTIVATIONS:
            raise self.unsupported(f"{key} = {show(said)} is not supported; supported: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[said]

    def floors(self) -> tuple[float, ...]:
        """What each layer's activated gates must reach (arXiv:2002.08561): one number for all, or one for each."""
        key = f"{self.row.name}.hidden_activation_threshold"
        said = self.file.metadata.get(key)
        if not isinstance(said, np.ndarray):
            return (self.number("hidden_activation_threshold", 0.0, 0.0, 1e6),) * self.n_layer
        if said.size != self.n_layer:
            raise self.error(key, f"{said.size} values", f"one for each of {self.n_layer} layers")
        if said.dtype.kind != "f" or not ((said >= 0) & (said <= 1e6)).all():  # a NaN is in no range
            raise self.error(key, show(said), "numbers from 0 to 1e+06")
        return tuple(map(float, said))

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

    def sizes(self, config: ModelConfig) -> dict[str, int]:
        """What the names of dimensions in the table of architectures stand for."""
        return dimensions(
            n_embd=config.n_embd,
            n_vocab=config.n_vocab,
            n_pos=config.n_positions,
            n_one=config.n_ff // max(1, config.n_expert),
            n_expert=config.n_expert,
            n_head=config.n_head,
            n_kv=config.n_head_kv,
            key=config.head_dim_k,
            value=config.head_dim_v,
            rope_dim=config.rope_dim,
        )

    def check_tensors(self, config: ModelConfig, model: Group, block: Group) -> None:
        """Every tensor that the architecture needs is there in its shape, and no other is."""
        powerinfer = self.file.powerinfer
        own = check_predictors(self.file, config.n_layer, config.n_embd, config.n_ff) if powerinfer else set()
        check(self.file, model, block, self.n_layer, self.sizes(config), own)


def _refuse_other_kinds(file: GGUFFile) -> None:
    kind = file.get("general.type", "model", str)
    if kind != "model":
        instead = "; --lora adds it to the one that it was made for" if kind == "adapter" else ""
        raise UnsupportedError(f"{file.path}: a file of type {show(kind)} is not a model that can be run{instead}")
    parts = file.get("split.count", 1, int)
    if parts > 1:
        raise UnsupportedError(f"{file.path}: one of {parts} parts of a split model; merge them first")

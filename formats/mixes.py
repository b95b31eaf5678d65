"""Which type each tensor of a quantised file gets: the mixes of the field (Q4_K_M and so on), as tables.

Tensors that matter more get more bits: attention's values, what leaves the FFN, the output matrix, in some layers or in
all. These are llama-quantize's choices (llama.cpp, src/llama-quant.cpp), so that a name means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .architectures import ARCHITECTURES
from .errors import ParameterError
from .types import GGMLType


@dataclass(frozen=True)
class Facts:
    """What the choice depends on besides a tensor's name and shape; tied: there is no output.weight."""

    arch: str
    n_layer: int
    n_head: int = 0
    n_head_kv: int = 0
    n_expert: int = 0
    tied: bool = False
    importance: bool = False  # the errors are weighted by an imatrix

    @classmethod
    def of(cls, metadata: Mapping[str, Any], tensors: Iterable[str], importance: bool = False) -> Facts:
        """From a GGUF file's metadata and the names of its tensors."""
        arch = str(metadata.get("general.architecture", ""))

        def number(key: str, default: int = 0) -> int:
            value = metadata.get(f"{arch}.{key}", default)
            if isinstance(value, np.ndarray) and value.size:  # one entry a layer
                value = value.flat[0].item()
            return value if type(value) is int else default

        n_head = number("attention.head_count")
        return cls(
            arch,
            number("block_count"),
            n_head,
            number("attention.head_count_kv", n_head),
            number("expert_count"),
            "output.weight" not in tensors,
            importance,
        )

    @property
    def rules(self) -> str:
        """Which rules the family has (Architecture.mixes)."""
        return ARCHITECTURES[self.arch].mixes if self.arch in ARCHITECTURES else ""

    @property
    def n_gqa(self) -> int:
        """Query heads that share a key and value head."""
        return self.n_head // self.n_head_kv if self.n_head_kv else 1


Condition = Callable[[Facts, int], bool]  # of the layer with that number


def _always(facts: Facts, layer: int) -> bool:
    return True


def _more_bits(facts: Facts, layer: int) -> bool:
    """The first and the last eighth, and every third layer between."""
    eighth = facts.n_layer // 8
    return layer < eighth or layer >= 7 * facts.n_layer // 8 or (layer - eighth) % 3 == 2


def _first(part: int) -> Condition:
    return lambda facts, layer: layer < facts.n_layer // part


def _below(number: int) -> Condition:
    return lambda facts, layer: layer < number


def _shared_by_four(facts: Facts, layer: int) -> bool:
    return facts.n_gqa >= 4


def _with_importance(facts: Facts, layer: int) -> bool:
    return facts.importance and layer < facts.n_layer // 8


Rules = tuple[tuple[Condition, GGMLType], ...]  # the first whose condition holds


@dataclass(frozen=True)
class Mix:
    """A target: the type of most tensors, general.file_type, and rules by kind of tensor.

    falcon: rules that replace the others for that architecture. eight_experts: the type of attn_output where a layer
    has eight experts.
    """

    name: str
    base: GGMLType
    file_type: int
    rules: Mapping[str, Rules]
    falcon: Mapping[str, Rules]
    eight_experts: GGMLType | None


def _mix(
    name: str,
    base: str,
    file_type: int,
    rules: Mapping[str, Rules] | None = None,
    falcon: Mapping[str, Rules] | None = None,
    eight_experts: GGMLType | None = None,
) -> Mix:
    return Mix(name, GGMLType[base], file_type, rules or {}, {**(rules or {}), **(falcon or {})}, eight_experts)


_Q3, _Q4, _Q5, _Q6 = GGMLType.Q3_K, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K
_GUARD_4 = {"ffn_down": ((_with_importance, GGMLType.Q4_1),)}
_GUARD_5 = {"ffn_down": ((_with_importance, GGMLType.Q5_1),)}

MIXES: Mapping[str, Mix] = {
    mix.name: mix
    for mix in (
        _mix("F32", "F32", 0),
        _mix("F16", "F16", 1),
        _mix("BF16", "BF16", 32),
        _mix("Q4_0", "Q4_0", 2, _GUARD_4),
        _mix("Q4_1", "Q4_1", 3),
        _mix("Q5_0", "Q5_0", 8, _GUARD_5),
        _mix("Q5_1", "Q5_1", 9),
        _mix("Q8_0", "Q8_0", 7),
        _mix(
            "Q2_K",
            "Q2_K",
            10,
            {
                "attn_v": ((_shared_by_four, _Q4), (_always, _Q3)),
                "ffn_down": ((_always, _Q3),),
                "attn_output": ((_always, _Q3),),
            },
            {"attn_output": ()},
            _Q5,
        ),
        _mix("Q3_K_S", "Q3_K", 11, eight_experts=_Q5),
        _mix(
            "Q3_K_M",
            "Q3_K",
            12,
            {
                "attn_v": ((_below(2), _Q5), (_always, _Q4)),
                "ffn_down": ((_first(16), _Q5), (_always, _Q4)),
                "attn_output": ((_always, _Q4),),
            },
            {"ffn_down": ((_first(16), _Q5), (_more_bits, _Q4)), "attn_output": ()},
            _Q5,
        ),
        _mix(
            "Q3_K_L",
            "Q3_K",
            13,
            {
                "attn_v": ((_always, _Q5),),
                "ffn_down": ((_always, _Q5),),
                "attn_output": ((_always, _Q5),),
            },
            {"ffn_down": ((_always, _Q4),), "attn_output": ((_always, _Q4),)},
        ),
        _mix(
            "Q4_K_S",
            "Q4_K",
            14,
            {"attn_v": ((_below(4), _Q5),), "ffn_down": ((_first(8), _Q5),)},
            {"ffn_down": ()},
            _Q5,
        ),
        _mix(
            "Q4_K_M",
            "Q4_K",
            15,
            {"attn_v": ((_more_bits, _Q6),), "ffn_down": ((_more_bits, _Q6),)},
            {"ffn_down": ((_first(16), _Q6), (_more_bits, _Q5))},
            _Q5,
        ),
        _mix("Q5_K_S", "Q5_K", 16),
        _mix("Q5_K_M", "Q5_K", 17, {"attn_v": ((_more_bits, _Q6),), "ffn_down": ((_more_bits, _Q6),)}),
        _mix("Q6_K", "Q6_K", 18),
    )
}
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# Part of a tensor's name -> its kind; the first that is found.
_KINDS = {
    "attn_qkv.weight": "attn_v",
    "attn_kv_b.weight": "attn_v",
    "attn_v.weight": "attn_v",
    "attn_k.weight": "attn_k",
    "attn_output.weight": "attn_output",
    "ffn_down": "ffn_down",
    "ffn_bypass": "ffn_down",  # not in llama.cpp; what it makes goes the same way
}
# Matrices that stay as they are, by part of the name: expert routers, position and segment embeddings, small ones of
# other families.
_KEPT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid",
    "position_embd",
    "token_types.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj",
    "indexer.q_proj",
    "attn_rel_b.weight",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    *(
        f"time_mix_{part}.weight"
        for part in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")
    ),
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
)
# What stands in for a type whose blocks do not divide a row; F16 where these do not either.
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def find(name: str) -> Mix:
    """The mix of a name, in any case; ParameterError lists them."""
    key = name.upper()
    mix = MIXES.get(_ALIASES.get(key, key))
    if mix is None:
        raise ParameterError(f"type: got {name!r:.30}, wanted one of {', '.join(MIXES)}")
    return mix


def is_quantised(kind: GGMLType) -> bool:
    """Whether a type has blocks of weights that share a scale."""
    return kind.block_size > 1


def stays(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is kept as it is: all but matrices (shape in ggml order), and a few of these."""
    dims = len(shape)
    while dims > 1 and shape[dims - 1] == 1:
        dims -= 1
    return dims < 2 or not name.endswith("weight") or any(part in name for part in _KEPT)


def preferred(
    mix: Mix,
    name: str,
    shape: tuple[int, ...],
    facts: Facts,
    pure: bool = False,
    output: GGMLType | None = None,
    embedding: GGMLType | None = None,
) -> GGMLType | None:
    """The type of a tensor (shape in ggml order) whose rows its blocks divide, None for one that stays as it is.

    pure: the mix's base type for all. output, embedding: types of output.weight and token_embd.weight. See `fitting`.
    """
    if stays(name, shape):
        return None
    is_embedding = name in ("token_embd.weight", "per_layer_token_embd.weight")
    is_output = name == "output.weight"
    as_output = is_output or (is_embedding and facts.tied and not pure)
    if is_embedding and embedding is not None:
        return embedding
    if as_output and output is not None:
        return output
    if pure or not is_quantised(mix.base) or (is_embedding and not as_output):
        return mix.base
    return _output(mix.base, shape[0], facts) if as_output else _by_rules(mix, name, facts)


def fitting(kind: GGMLType, k: int) -> GGMLType:
    """The type, or what stands in for it where its blocks do not divide rows of k weights."""
    if k % kind.block_size and kind.name in _FALLBACK:
        kind = GGMLType[_FALLBACK[kind.name]]
    return GGMLType.F16 if k % kind.block_size else kind


def fallen_note(fallen: Sequence[tuple[str, str, str]]) -> str:
    """What to tell about tensors that got another type than their mix has: their names, wanted and given types."""
    what = ", ".join(sorted({f"{wanted} -> {given}" for _, wanted, given in fallen}))
    return f"{len(fallen)} tensors, such as {fallen[0][0]}, have rows that the type's blocks do not divide: {what}"


def _output(base: GGMLType, k: int, facts: Facts) -> GGMLType:
    if facts.rules == "falcon" or k % base.block_size or base == GGMLType.Q8_0:
        return GGMLType.Q8_0
    return GGMLType.Q6_K


def _by_rules(mix: Mix, name: str, facts: Facts) -> GGMLType:
    what = next((kind for part, kind in _KINDS.items() if part in name), "")
    layer = _layer(name)
    rules = (mix.falcon if facts.rules == "falcon" else mix.rules).get(what, ())
    kind = next((kind for condition, kind in rules if condition(facts, layer)), mix.base)
    if what == "attn_v" and facts.n_layer == 80 and facts.n_gqa > 1 and facts.rules == "70B":
        # Eight times smaller than attn_q there: more bits cost little.
        kind = GGMLType.Q5_K if kind in (_Q3, _Q4) else kind
    if facts.n_expert == 8:
        if what in ("attn_v", "attn_k"):
            return GGMLType.Q8_0
        if what == "attn_output" and facts.rules != "falcon":
            return mix.eight_experts or mix.base
    return kind


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if len(parts) > 2 and parts[0] == "blk" and parts[1].isdigit() else 0

"""Which tensors a model's file must have, by its architecture's row, and which rows of fused ones stand for others."""

from __future__ import annotations

from collections.abc import Mapping

from .architecture_terms import (
    BYPASS,
    BYPASS_BIAS,
    EMBEDDING,
    EXPERTS,
    FUSED,
    FUSED_GATED,
    MODEL_WIDE,
    Architecture,
    Group,
    Shape,
)
from .errors import FormatError, UnsupportedError
from .gguf import GGUFFile, TensorInfo
from .gguf_header import show
from .powerinfer import own_block


def dimensions(
    *,
    n_embd: int,
    n_vocab: int,
    n_pos: int,
    n_one: int,
    n_expert: int,
    n_head: int,
    n_kv: int,
    key: int,
    value: int,
    rope_dim: int,
) -> dict[str, int]:
    """What the names of dimensions in the table of architectures stand for; n_one: neurons of an expert, or of all."""
    n_ff = n_one * max(1, n_expert)
    return {
        "n_embd": n_embd,
        "n_vocab": n_vocab,
        "n_pos": n_pos,
        "n_ff": n_ff,
        "n_gate_up": 2 * n_ff,
        "n_expert": n_expert,
        "n_one": n_one,
        "n_head": n_head,
        "n_kv": n_kv,
        "n_dim": key,
        "n_q": n_head * key,
        "n_k": n_kv * key,
        "n_v": n_kv * value,
        "n_qkv": (n_head + n_kv) * key + n_kv * value,
        "n_att": n_head * value,
        "n_rot": rope_dim // 2,
    }


def groups(file: GGUFFile, row: Architecture) -> tuple[Group, Group]:
    """The model-wide and the block tensors that this file has to have: of the optional ones, those that it has one of.

    UnsupportedError where it has some tensors of a group and lacks others, or a bypass of experts.
    """
    there = {name.removeprefix("blk.0.") for name in file.tensors}
    chosen = [EMBEDDING, row.required, *(group for group in row.optional if there & set(group))]
    chosen.append(max(row.ffn, key=lambda group: len(there & set(group))))
    for group in chosen[2:-1]:
        if missing := set(group) - there:
            has, lacks = show(min(there & set(group))), show(min(missing))
            raise UnsupportedError(f"{file.path}: {has} without {lacks} is not supported")
    if bypass := _bypass(file):
        if chosen[-1] is EXPERTS:
            raise UnsupportedError(f"{file.path}: a bypass (ffn_bypass) beside experts is not supported")
        chosen += bypass
    wanted = {name: shape for group in chosen for name, shape in group.items()}
    model = {name: shape for name, shape in wanted.items() if name in MODEL_WIDE}
    block = {name: shape for name, shape in wanted.items() if name not in MODEL_WIDE}
    return model, own_block(block) if file.powerinfer else block


def _bypass(file: GGUFFile) -> list[Group]:
    """The groups of a bypass, if any block has it: then all must."""
    names = {name.split(".", 2)[-1] for name in file.tensors if name.startswith("blk.")}
    return [BYPASS, *([BYPASS_BIAS] if names & set(BYPASS_BIAS) else [])] if names & {*BYPASS, *BYPASS_BIAS} else []


def check(file: GGUFFile, model: Group, block: Group, n_layer: int, sizes: Mapping[str, int], more: set[str]) -> None:
    """Every tensor is there in its shape, and no other is, but for `more`; FormatError or UnsupportedError."""
    wanted: dict[str, Shape] = dict(model)
    wanted |= {f"blk.{i}.{name}": shape for i in range(n_layer) for name, shape in block.items()}
    for name, shape in wanted.items():
        expected, info = tuple(sizes[size] for size in shape), file.tensors.get(name)
        if info is None or info.shape != expected:
            got = "no such tensor" if info is None else f"shape {info.shape}"
            raise FormatError(file.path, f"tensor {show(name)}", got, f"shape {expected}")
    for name in file.tensors:
        if name not in wanted and name not in more:
            arch = file.metadata["general.architecture"]
            raise UnsupportedError(f"{file.path}: tensor {show(name)} is not one that {arch} models are run with")


def fused_rows(file: GGUFFile, block: Group, n_layer: int, sizes: Mapping[str, int]) -> dict[str, TensorInfo]:
    """What the fused tensors of a model hold: rows (or entries, of a bias) by the names that the decoder knows."""
    found = {}
    for fused, parts in FUSED.items():
        for kind in ("weight", "bias"):
            name = f"{fused}.{kind}"
            if not _is_fused(block, name):
                continue
            for layer in range(n_layer):
                whole, first = file.tensors[f"blk.{layer}.{name}"], 0
                row = whole.type.type_size if kind == "bias" else whole.row_size
                for part, width in parts:
                    n, own = sizes[width], f"blk.{layer}.{part}.{kind}"
                    shape = (n,) if kind == "bias" else (whole.shape[0], n)
                    found[own] = TensorInfo(own, shape, whole.type, whole.offset + first * row, n * row)
                    first += n
    return found


def unfused(block: Group) -> frozenset[str]:
    """Names of a block's tensors as the decoder knows them."""
    names = set(block)
    for fused, parts in FUSED.items():
        for kind in ("weight", "bias"):
            if _is_fused(block, f"{fused}.{kind}"):
                names = names - {f"{fused}.{kind}"} | {f"{part}.{kind}" for part, _ in parts}
    return frozenset(names)


def _is_fused(block: Group, name: str) -> bool:
    """ffn_up is, where it is twice as wide as its name says."""
    return name in block and (name.startswith("attn") or block[name] == FUSED_GATED.get(name))

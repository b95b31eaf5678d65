"""Mixes: the types that llama-quantize chose for the same models (made by tests/quantize_peer.py)."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import quantize_cases
from gguf import LlamaFileType
from quantize_cases import CASES, by_kind

from hotcold.formats.errors import ParameterError
from hotcold.formats.mixes import MIXES, Facts, Mix, find, fitting, preferred, stays
from hotcold.formats.types import GGMLType

PEER = json.loads(quantize_cases.TYPES.read_text())


def choose(mix: Mix, name: str, shape: tuple[int, ...], facts: Facts, **options: Any) -> GGMLType | None:
    """The type that a tensor gets in the end."""
    kind = preferred(mix, name, shape, facts, **options)
    return None if kind is None else fitting(kind, shape[0])


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("label", CASES)
def test_types_are_llama_quantizes(label: str, name: str) -> None:
    case = CASES[label]
    chosen = {}
    for tensor, shape in case.tensors():
        kind = choose(MIXES[name], tensor, shape, case.facts)
        own = "F32" if len(shape) == 1 else "F16"
        chosen[tensor] = own if kind is None else kind.name
    assert by_kind(chosen) == PEER[label][name]


def test_file_types() -> None:
    for name, mix in MIXES.items():
        assert mix.file_type == LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"]


def test_names() -> None:
    assert find("q4_k").name == find("Q4_K_M").name == "Q4_K_M"
    assert find("q3_K").name == "Q3_K_M" and find("Q5_k").name == "Q5_K_M" and find("q6_k").name == "Q6_K"
    with pytest.raises(ParameterError, match="type: got 'Q7_K', wanted one of F32, F16, BF16, Q4_0"):
        find("Q7_K")


def test_what_stays() -> None:
    for name in ("blk.0.ffn_gate_inp.weight", "position_embd.weight", "blk.3.attn_q_norm.weight", "blk.1.attn_q.bias"):
        assert stays(name, (256, 256))
    assert stays("output_norm.weight", (256,)) and stays("a.weight", (256, 1, 1))
    assert not stays("blk.0.ffn_up_exps.weight", (256, 256, 8)) and not stays("token_embd.weight", (256, 256))


def test_rows_that_blocks_do_not_divide() -> None:
    for kind, other in (("Q2_K", "Q4_0"), ("Q3_K", "Q4_0"), ("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0")):
        assert fitting(GGMLType[kind], 512).name == kind
        assert fitting(GGMLType[kind], 96).name == other
        assert fitting(GGMLType[kind], 40) == GGMLType.F16
    assert fitting(GGMLType.Q4_0, 40) == GGMLType.F16 and fitting(GGMLType.F32, 7) == GGMLType.F32


def test_options() -> None:
    facts, tied = Facts("llama", 8), Facts("llama", 8, tied=True)
    mix, shape = MIXES["Q4_K_M"], (256, 256)
    q8, f16 = GGMLType.Q8_0, GGMLType.F16
    for name in ("output.weight", "token_embd.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight"):
        assert choose(mix, name, shape, facts, pure=True) == choose(mix, name, shape, tied, pure=True) == GGMLType.Q4_K
    assert choose(mix, "output.weight", shape, facts, output=q8) == q8
    assert choose(mix, "token_embd.weight", shape, facts, output=q8) == GGMLType.Q4_K
    assert choose(mix, "token_embd.weight", shape, tied, output=q8) == q8
    assert choose(mix, "token_embd.weight", shape, tied, output=q8, embedding=f16) == f16
    assert choose(mix, "token_embd.weight", shape, tied) == GGMLType.Q6_K


def test_facts_of_metadata() -> None:
    keys: dict[str, Any] = {"block_count": 3, "attention.head_count": np.array([8, 8, 8])}
    keys |= {"attention.head_count_kv": 2, "expert_count": 4}
    metadata = {"general.architecture": "x"} | {f"x.{key}": value for key, value in keys.items()}
    facts = Facts.of(metadata, ["token_embd.weight"])
    assert facts == Facts("x", 3, 8, 2, 4, tied=True) and facts.n_gqa == 4
    assert Facts.of({}, ["output.weight"], True) == Facts("", 0, importance=True)
    for odd in (math.nan, math.inf, "8", np.array(["a"]), np.array([], np.int32), [], True):
        assert Facts.of(metadata | {"x.block_count": odd}, []).n_layer == 0

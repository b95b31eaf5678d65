"""LoRA adapters: the logits are those of a model into which NumPy has merged them, and of the NumPy forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from adapters import ATTENTION, FFN, make_adapter, matrices, merged
from families import BY_NAME, FAMILIES, relative_error

from hotcold import Engine, GGUFFile
from hotcold.formats.errors import FormatError, ParameterError, UnsupportedError
from hotcold.runtime.graph import Graph
from hotcold.runtime.lora import Change, adapt

IDS = [(7 * i + 3) % 290 for i in range(40)]
DENSE = [family.name for family in FAMILIES if "short" not in family.name]


def logits(model: Path, lora: Any = (), ids: Any = IDS, one_by_one: bool = False, **options: Any) -> np.ndarray:
    with Engine(model, n_ctx=64, n_threads=2, lora=lora, **options) as engine:
        with closing(engine.new_sequence()) as sequence:
            if one_by_one:
                return np.concatenate([engine.eval(sequence, [id]).copy() for id in ids])
            return engine.eval(sequence, ids, all_logits=True).copy()


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 32])
def test_against_numpy(tiny_model: Callable[..., Path], tmp_path: Path, rank: int, one_by_one: bool) -> None:
    model, path = tiny_model(), tmp_path / "adapter.gguf"
    added = make_adapter(path, matrices(model) | {"output.weight": (300, 64)}, rank=rank)
    oracle = naive.load(model, kv_f16=True)
    plain = oracle.forward(IDS)
    for name, change in added.items():
        oracle.tensors[name] = oracle.tensors[name] - 0.5 * change
    wanted = oracle.forward(IDS)
    assert relative_error(plain, wanted) > 0.05
    assert relative_error(logits(model, [(path, -0.5)], one_by_one=one_by_one), wanted) < 1e-3


@pytest.mark.parametrize("name", DENSE)
def test_every_family(name: str, family_file: Callable[[str], Path], tmp_path: Path) -> None:
    """Fused matrices and those of experts' layers, post-norms, parallel blocks: all but the experts themselves."""
    model, path, family = family_file(name), tmp_path / "adapter.gguf", BY_NAME[name]
    with GGUFFile(model) as file:
        arch = file.metadata["general.architecture"]
    added = make_adapter(path, matrices(model, (*ATTENTION, *FFN, "ffn_gate_inp")), arch=arch, strength=0.1)
    whole = merged(model, tmp_path / "merged.gguf", (added, 1.0))
    wanted = logits(whole, ids=family.prompt, sparsity="dense")
    assert relative_error(logits(model, ids=family.prompt), wanted) > 5e-3
    assert relative_error(logits(model, [path], ids=family.prompt), wanted) < 1e-3


@pytest.mark.parametrize("qtype", ["F16", "Q8_0"])
def test_stored_in_other_types(tiny_model: Callable[..., Path], tmp_path: Path, qtype: str) -> None:
    model = tiny_model()
    added = make_adapter(tmp_path / "adapter.gguf", matrices(model), qtype=qtype, rank=32)
    wanted = logits(merged(model, tmp_path / "merged.gguf", (added, 1.0)))
    assert relative_error(logits(model, [tmp_path / "adapter.gguf"]), wanted) < (1e-3 if qtype == "F16" else 2e-2)


def test_several_add_up(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Of different ranks, matrices and scales; one without an alpha, whose scale is the user's alone."""
    model, paths = tiny_model(), [tmp_path / f"{i}.gguf" for i in range(3)]
    first = make_adapter(paths[0], matrices(model, ATTENTION), rank=3)
    second = make_adapter(paths[1], matrices(model, ("attn_k", *FFN)), rank=7, alpha=None, seed=1)
    third = make_adapter(paths[2], matrices(model), seed=2)
    whole = merged(model, tmp_path / "merged.gguf", (first, 1.0), (second, 0.4), (third, 0.0))
    wanted = logits(whole)
    assert relative_error(logits(model, [paths[0], (paths[1], 0.4), (paths[2], 0)]), wanted) < 1e-3
    assert relative_error(logits(model, [paths[0]]), wanted) > 5e-3


def test_quantised_weights_stay_as_they_are(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model(qtype="Q4_0")
    added = make_adapter(tmp_path / "adapter.gguf", matrices(model))

    class Adapted(naive.Model):
        def _linear(self, name: str, x: np.ndarray, expert: int | None = None) -> np.ndarray:
            y = super()._linear(name, x, expert)
            return y + x @ added[f"{name}.weight"].T if f"{name}.weight" in added else y

    oracle = Adapted(**vars(naive.load(model, kv_f16=True, q8=True)))
    assert relative_error(logits(model, [tmp_path / "adapter.gguf"]), oracle.forward(IDS)) < 2e-2


def test_sparse_ffns(family_file: Callable[[str], Path], tmp_path: Path) -> None:
    """Attention adapters go with them; adapted FFNs are dense, unless a sparse mode is asked for."""
    model = family_file("llama-relu")
    attention, whole = tmp_path / "attention.gguf", tmp_path / "whole.gguf"
    added = make_adapter(attention, matrices(model, ATTENTION), strength=0.1)
    make_adapter(whole, matrices(model))
    wanted = logits(merged(model, tmp_path / "merged.gguf", (added, 1.0)), sparsity="dense")
    with Engine(model, n_ctx=64, n_threads=2, lora=[attention]) as engine, closing(engine.new_sequence()) as sequence:
        assert engine.plan is not None
        assert relative_error(engine.eval(sequence, IDS, all_logits=True), wanted) < 1e-3
    with Engine(model, n_ctx=64, n_threads=2, lora=[whole]) as engine:
        assert engine.plan is None
    with pytest.raises(UnsupportedError, match=r"whole.gguf: 'blk.0.ffn_.*sparse mode"):
        Engine(model, lora=[whole], sparsity="exact")


def test_threads_meet_twice_more_for_a_value(tiny_model: Callable[..., Path]) -> None:
    """Queries, keys and values have their halves together."""
    from hotcold.formats.config import ModelConfig
    from hotcold.formats.lora import Factors
    from hotcold.runtime.decoder import build
    from hotcold.runtime.tensors import Tensors

    with GGUFFile(tiny_model()) as file:
        plain = build(ModelConfig.from_gguf(file))
        names = [f"blk.1.attn_{part}.weight" for part in ("q", "v")]
        factors = Factors(np.zeros((2, 64), np.float32), np.zeros((64, 2), np.float32))
        graph: Graph = adapt(plain, Tensors(file), {name: Change(factors, file.path) for name in names})
    at = next(i for i, node in enumerate(graph.nodes) if node.weight == "blk.1.attn_v.weight")
    ops = " ".join(node.op for node in graph.nodes[at + 1 : at + 8])
    assert ops == "matmul matmul pack pack matmul matmul rope"
    assert [node for node in graph.nodes if "lora" not in "".join((*node.reads, *node.writes))] == plain.nodes


BAD = {
    "type": (dict(kind="alora"), "adapter.type.*'alora'"),
    "waits": (dict(metadata={"adapter.alora.invocation_tokens": [1, 2]}), "aLoRA"),
    "architecture": (dict(arch="qwen2"), "general.architecture.*'qwen2'.*'llama'"),
    "alpha": (dict(alpha=float("nan")), "alpha.*nan"),
    "finite": (dict(strength=float("inf")), "lora_b.*infinite"),
    "unknown": (dict(shapes={"blk.7.attn_q.weight": (64, 64)}), "blk.7.attn_q.*none of that name"),
    "vector": (dict(shapes={"blk.0.attn_norm.weight": (64, 64)}), "blk.0.attn_norm.*matrices"),
    "shape": (dict(shapes={"blk.0.attn_q.weight": (64, 32)}), "attn_q.*from 32 to 64.*64 to 64"),
    "embedding": (dict(shapes={"token_embd.weight": (300, 64)}), "embeddings are not supported"),
    "nothing": (dict(shapes={}), "tensors.*0"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model, (options, message) = tiny_model(), BAD[name]
    make_adapter(tmp_path / "bad.gguf", **{"shapes": {"blk.0.attn_q.weight": (64, 64)}, **options})
    with pytest.raises((FormatError, UnsupportedError), match=message) as caught:
        Engine(model, lora=[tmp_path / "bad.gguf"])
    assert "\n" not in str(caught.value) and "bad.gguf" in str(caught.value)


def test_experts_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model(n_expert=4)
    make_adapter(tmp_path / "bad.gguf", {"blk.0.ffn_up_exps.weight": (96, 64)})
    with pytest.raises(UnsupportedError, match="experts are not supported"):
        Engine(model, lora=[tmp_path / "bad.gguf"])


def test_halves_that_do_not_meet(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from gguf import GGUFWriter

    for shape, message in (((64, 3), "ranks that agree"), ((64, 4, 1), "a matrix"), (None, "no such tensor")):
        writer = GGUFWriter(str(tmp_path / "bad.gguf"), "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((4, 64), np.float32))
        if shape:
            writer.add_tensor("blk.0.attn_q.weight.lora_b", np.ones(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(FormatError, match=message):
            Engine(tiny_model(), lora=[tmp_path / "bad.gguf"])


def test_a_model_is_no_adapter(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="general.type"):
        Engine(tiny_model(), lora=[tiny_model()])
    make_adapter(tmp_path / "adapter.gguf", {"blk.0.attn_q.weight": (64, 64)})
    with pytest.raises(UnsupportedError, match="'adapter'"):
        Engine(tmp_path / "adapter.gguf")


@pytest.mark.parametrize(
    "lora", ["adapter.gguf", [("a.gguf", 1, 2)], [("a.gguf", "x")], [("a.gguf", float("nan"))], [(3, 1.0)], [True]]
)
def test_wrong_arguments(tiny_model: Callable[..., Path], lora: Any) -> None:
    with pytest.raises(ParameterError, match="^lora: got"):
        Engine(tiny_model(), lora=lora)


def test_a_scale_beyond_all_bounds(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter.gguf", {"blk.0.attn_q.weight": (64, 64)})
    for scale in (1e39, 1e300):
        with pytest.raises(ParameterError, match="infinite"):
            Engine(tiny_model(), lora=[(tmp_path / "adapter.gguf", scale)])

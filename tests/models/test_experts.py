"""Mixtures of experts in the engine, against the NumPy forward pass; tolerances as in test_forward.py.

For quantised weights the oracle rounds activations too: otherwise a router's choice that is nearly a tie may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest

from hotcold import Engine
from hotcold.formats.errors import ParameterError
from hotcold.formats.gguf import TensorInfo
from hotcold.formats.types import GGMLType
from hotcold.runtime import sparsity
from hotcold.runtime.cpu import isa
from hotcold.runtime.cpu.buffers import Buffers
from hotcold.runtime.decoder import build

FLOAT_TOLERANCE = 5e-4
QUANT_TOLERANCE = 0.02
IDS = list(range(5, 165, 4))
K_SIZES = {"n_embd": 256, "n_ff": 256}
STRUCTURES: dict[str, dict[str, Any]] = {
    "llama": {"n_expert": 6},
    "qwen3moe": {"arch": "qwen3moe", "n_expert": 20, "n_expert_used": 4, "head_dim": 32, "seed": 2},
    "olmoe": {"arch": "olmoe", "n_expert": 9, "n_expert_used": 3, "seed": 1},
    "all-used": {"n_expert": 3, "n_expert_used": 3},
    "one": {"n_expert": 1, "n_expert_used": 1},
    "odd-sizes": {"n_embd": 96, "n_head": 3, "n_head_kv": 1, "n_ff": 37, "n_expert": 5},
    "relu": {"n_expert": 6, "metadata": {"llama.hidden_activation": "relu"}},
}

Make = Callable[..., Path]
Array = np.ndarray


def distance(got: Array, wanted: Array) -> float:
    """Root mean square error over the spread of what was wanted."""
    assert got.shape == wanted.shape and np.isfinite(got).all()
    return float(np.sqrt(np.mean(np.square(got - wanted))) / wanted.std())


def both_ways(engine: Engine, ids: list[int]) -> list[Array]:
    """The logits of a prompt, and those of its tokens one by one, in threes and then all others."""
    sequence = engine.new_sequence()
    found = [engine.eval(sequence, ids, all_logits=True).copy()]
    sequence.truncate(0)
    found.append(np.stack([engine.eval(sequence, [token])[0].copy() for token in ids]))
    sequence.truncate(0)
    pieces = [ids[:3], ids[3:6], ids[6:]]
    found.append(np.concatenate([engine.eval(sequence, piece, all_logits=True).copy() for piece in pieces]))
    sequence.close()
    return found


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("options", STRUCTURES.values(), ids=STRUCTURES)
def test_structures(tiny_model: Make, options: dict[str, Any], n_threads: int) -> None:
    """Logits, how often each expert was chosen, and the bytes that were read."""
    path = tiny_model(**options)
    oracle = naive.load(path, kv_f16=True)
    wanted = oracle.forward(IDS)
    assert oracle.gap > 4e-3  # or float32 rounding might choose another expert
    with Engine(path, n_threads=n_threads) as engine:
        for got in both_ways(engine, IDS):
            assert distance(got, wanted) < FLOAT_TOLERANCE
        used, c = engine.usage, engine.config
        assert used.experts is not None
        np.testing.assert_array_equal(used.experts, 3 * oracle.heat)
        assert used.density == pytest.approx(c.n_expert_used / c.n_expert)
        before = engine.usage
        sequence = engine.new_sequence()
        engine.eval(sequence, [7])
        one = engine.usage - before
        assert one.experts is not None and (one.experts.sum(axis=1) == c.n_expert_used).all()
        experts = c.n_layer * c.n_expert_used * 3 * c.n_embd * c.expert_neurons * 4
        routers = c.n_layer * c.n_embd * c.n_expert * 4
        assert one.step_bytes == experts + routers
        assert one.dense_bytes == experts * c.n_expert // c.n_expert_used + routers


@pytest.mark.parametrize("qtype", naive.COMPUTED_TYPES, ids=lambda qtype: qtype.name)
def test_types(tiny_model: Make, qtype: naive.QType) -> None:
    path = tiny_model(n_expert=6, qtype=qtype.name, **(K_SIZES if qtype.name.endswith("_K") else {}))
    floats = qtype in naive.FLOAT_TYPES
    wanted = naive.forward(path, IDS, kv_f16=True, q8=not floats)
    with Engine(path, n_threads=2) as engine:
        for got in both_ways(engine, IDS):
            assert distance(got, wanted) < (FLOAT_TOLERANCE if floats else QUANT_TOLERANCE)


@pytest.mark.parametrize("qtype", ["F32", "Q4_0", "Q6_K"])
@pytest.mark.parametrize("level", isa.available())
def test_levels(tiny_model: Make, monkeypatch: pytest.MonkeyPatch, level: str, qtype: str) -> None:
    monkeypatch.setenv("HOTCOLD_ISA", level)
    path = tiny_model(n_expert=6, qtype=qtype, **(K_SIZES if qtype.endswith("_K") else {}))
    wanted = naive.forward(path, IDS, kv_f16=True, q8=qtype != "F32")
    with Engine(path, n_threads=2) as engine:
        for got in both_ways(engine, IDS):
            assert distance(got, wanted) < (FLOAT_TOLERANCE if qtype == "F32" else QUANT_TOLERANCE)


def test_mixed_types(tiny_model: Make) -> None:
    """Gate, up and down of three types, floats among them, so that tokens are packed in both ways."""
    types = {"blk.0.ffn_up_exps": "F16", "blk.1.ffn_down_exps": "Q5_1", "blk.1.ffn_gate_exps": "F32"}
    types = {f"{name}.weight": kind for name, kind in types.items()}
    path = tiny_model(n_expert=6, qtype="Q8_0", types=types)
    wanted = naive.forward(path, IDS, kv_f16=True, q8=True)
    with Engine(path, n_threads=2) as engine:
        for got in both_ways(engine, IDS):
            assert distance(got, wanted) < QUANT_TOLERANCE


def test_threads_change_nothing(tiny_model: Make) -> None:
    path = tiny_model(arch="qwen3moe", n_expert=20, n_expert_used=4, head_dim=32, qtype="Q4_0")
    results = []
    for n_threads in (1, 2, 5):
        with Engine(path, n_threads=n_threads) as engine:
            results.append(both_ways(engine, IDS))
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_a_prompt_of_several_steps(tiny_model: Make) -> None:
    """More tokens than one step takes, nearly all of which want the same experts."""
    ids = [9] * 300 + IDS + [11] * 300
    path = tiny_model(n_expert=6, n_ctx_train=1024)
    oracle = naive.load(path, kv_f16=True)
    wanted = oracle.forward(ids)
    with Engine(path, n_threads=2) as engine:
        got = engine.eval(engine.new_sequence(), ids, all_logits=True)
        assert distance(got, wanted) < FLOAT_TOLERANCE
        np.testing.assert_array_equal(engine.usage.experts, oracle.heat)


MISTAKES: dict[str, tuple[dict[str, Any], Callable[[naive.Model], Any]]] = {
    "weights as they are": (STRUCTURES["llama"], lambda m: setattr(m, "weights_norm", False)),
    "weights of sum 1": (STRUCTURES["olmoe"], lambda m: setattr(m, "weights_norm", True)),
    "one expert less": (STRUCTURES["qwen3moe"], lambda m: setattr(m, "n_used", 3)),
    "experts in another order": (
        STRUCTURES["llama"],
        lambda m: m.tensors.update({"blk.1.ffn_down_exps.weight": m.tensors["blk.1.ffn_down_exps.weight"][::-1]}),
    ),
}


@pytest.mark.parametrize(("options", "spoil"), MISTAKES.values(), ids=MISTAKES)
def test_tolerance_catches_mistakes(
    tiny_model: Make, options: dict[str, Any], spoil: Callable[[naive.Model], Any]
) -> None:
    path = tiny_model(**options)
    wrong = naive.load(path, kv_f16=True)
    spoil(wrong)
    assert distance(wrong.forward(IDS), naive.forward(path, IDS, kv_f16=True)) > 20 * FLOAT_TOLERANCE


def test_modes(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """exact is dense; a threshold leaves neurons of the chosen experts out; what a mixture has not is said clearly."""
    path = tiny_model(n_expert=6)
    with Engine(path, sparsity="dense") as engine:
        dense = both_ways(engine, IDS)
        with pytest.raises(ParameterError, match="observe: 'tiny' is a mixture of experts; usage.experts says"):
            engine.observe(engine.new_sequence(), IDS, lambda *_: None)
    with Engine(path, sparsity="exact") as engine:
        for got, wanted in zip(both_ways(engine, IDS), dense, strict=True):
            np.testing.assert_array_equal(got, wanted)
    with pytest.raises(ParameterError, match="got predict, but 'tiny' is a mixture of experts"):
        Engine(path, sparsity="predict")
    monkeypatch.setattr(sparsity, "_thresholds", lambda *_: (0.1, 0.1))
    oracle = naive.load(path, kv_f16=True)
    oracle.floors = [0.1] * oracle.n_layer
    wanted = oracle.forward(IDS)
    assert distance(wanted, dense[0]) > 20 * FLOAT_TOLERANCE
    with Engine(path, sparsity="threshold=0.5") as engine:
        for got in both_ways(engine, IDS):
            assert distance(got, wanted) < FLOAT_TOLERANCE


def test_memory_of_a_large_mixture(tiny_model: Make) -> None:
    """Of 128 experts with 768 neurons, 8 used, n_embd 2048: what steps of 512 tokens need for their pairs."""
    with Engine(tiny_model(n_expert=6)) as engine:
        sizes = {"n_embd": 2048, "n_ff": 128 * 768, "n_expert": 128, "n_expert_used": 8, "n_layer": 1}
        config = replace(engine.config, **sizes)

    class Weights:
        def info(self, name: str) -> TensorInfo:
            k = 768 if "down_exps" in name else 2048
            return TensorInfo(name, (k, 2048), GGMLType.F32 if "inp" in name else GGMLType.Q4_0, 0, 0)

        def bands(self, name: str) -> None:
            return None

    tensors: Any = Weights()
    buffers = Buffers(build(config), tensors, config, 2, {"tokens": 512, "outputs": 128})
    before = sum(array.nbytes for array in buffers.arrays.values())
    for value in ("gate", "up", "sums"):
        buffers.floats(value)
    for value in ("f", "h"):
        buffers.packed(value)
    buffers.routing(0)
    assert 60e6 < sum(array.nbytes for array in buffers.arrays.values()) - before < 110e6

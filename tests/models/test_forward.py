"""The engine against the NumPy forward pass, on tiny random models.

Tolerances, as the root mean square error over the spread (standard deviation) of the oracle's logits:
- float weights: the oracle rounds keys and values to F16 as the cache does, which leaves float32 rounding and
  the few F16 roundings that it flips; float32 NumPy against float64 NumPy is 4e-5 at most here, so 5e-4.
- quantised weights: activations are rounded to 8 bits, 0.4 % of each block's largest, which the oracle does
  not do; llama.cpp is 0.01 to 0.03 away from it on these models, so 0.06.
In both, the largest logit must agree unless near.
test_tolerance_catches_mistakes shows that structural mistakes are at least 20 times larger than the first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from tiny import RopeOptions

from hotcold import Engine
from hotcold.runtime.cpu import isa

FLOAT_TOLERANCE = 5e-4
QUANT_TOLERANCE = 0.06
IDS = list(range(5, 165, 4))
K_SIZES = {"n_embd": 256, "n_ff": 512}
ODD_SIZES = {"n_layer": 3, "n_embd": 96, "n_head": 3, "n_head_kv": 1, "n_ff": 160, "n_vocab": 301}
# Long enough for some of the 8 pairs to be left alone, some scaled, some between.
LONG_YARN: dict[str, Any] = {"rope": RopeOptions("yarn", orig_ctx=4096), "n_ctx_train": 16384}
STRUCTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"arch": "qwen2"},
    "llama-tied": {"tied": True},
    "qwen2-tied": {"arch": "qwen2", "tied": True},
    "llama-biases": {"biases": True},
    "spm-vocabulary": {"tokenizer": "llama"},
    "odd-sizes": ODD_SIZES,
    "no-gqa": {"n_head_kv": 4},
    "one-kv-head": {"n_head_kv": 1},
    "wide-heads": {"head_dim": 32},
    "rope-base": {"rope_base": 1e6},
    "rope-linear": {"rope": RopeOptions("linear")},
    "rope-yarn": {"rope": RopeOptions("yarn")},
    "rope-yarn-ramp": LONG_YARN,
    "rope-yarn-neox": {**LONG_YARN, "arch": "qwen2"},
    "rope-yarn-betas": {"rope": RopeOptions("yarn", orig_ctx=4096, extra={"yarn_beta_fast": 8.0})},
    "rope-yarn-attn-factor": {"rope": RopeOptions("yarn", attn_factor=1.3)},
    "rope-factors": {"rope": RopeOptions(freqs=True)},
    "rope-factors-odd": {**ODD_SIZES, "rope": RopeOptions(freqs=True)},
    **{name: {"metadata": {"llama.hidden_activation": name}} for name in ("gelu", "relu", "relu2", "drelu")},
    "window": {"sliding_window": 7},
    "window-qwen2": {"arch": "qwen2", "sliding_window": 16},
    "window-one": {"sliding_window": 1},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "smollm2-like": {"qtype": "Q4_1", "types": {"token_embd.weight": "Q8_0"}, "tied": True, **ODD_SIZES},
    "q4-k-m-like": {
        "qtype": "Q4_K",
        "types": {"output.weight": "Q6_K", "blk.1.ffn_down.weight": "Q6_K", "blk.0.attn_v.weight": "Q5_0"},
        **K_SIZES,
    },
    "f16-embedding": {"qtype": "Q5_1", "types": {"token_embd.weight": "F16"}, "tied": True},
    "float-among-quants": {"qtype": "Q8_0", "types": {"blk.0.attn_q.weight": "BF16", "output.weight": "F32"}},
}

Make = Callable[..., Path]
Array = np.ndarray


def type_sizes(name: str) -> dict[str, int]:
    return K_SIZES if name.endswith("_K") else {}


def distance(got: Array, wanted: Array) -> float:
    """Root mean square error over the spread of what was wanted."""
    assert got.shape == wanted.shape
    return float(np.sqrt(np.mean(np.square(got - wanted))) / wanted.std())


def assert_close(got: Array, wanted: Array, tolerance: float) -> None:
    assert got.dtype == np.float32
    assert distance(got, wanted) < tolerance
    lost = wanted.max(axis=1) - wanted[np.arange(len(got)), got.argmax(axis=1)]
    assert np.all(lost < 10 * tolerance * wanted.std())


def logits(engine: Engine, ids: list[int]) -> Array:
    """All logits of a fresh sequence."""
    sequence = engine.new_sequence()
    try:
        return engine.eval(sequence, ids, all_logits=True).copy()
    finally:
        sequence.close()


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("options", STRUCTURES.values(), ids=STRUCTURES)
def test_structures(tiny_model: Make, options: dict[str, Any], n_threads: int) -> None:
    path = tiny_model(**options)
    with Engine(path, n_threads=n_threads) as engine:
        assert_close(logits(engine, IDS), naive.forward(path, IDS, kv_f16=True), FLOAT_TOLERANCE)


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("qtype", naive.COMPUTED_TYPES, ids=lambda qtype: qtype.name)
def test_types(tiny_model: Make, qtype: naive.QType, n_threads: int) -> None:
    """Each type, as a prompt and token by token: the two run different kernels."""
    path = tiny_model(qtype=qtype.name, **type_sizes(qtype.name))
    wanted = naive.forward(path, IDS, kv_f16=True)
    tolerance = FLOAT_TOLERANCE if qtype in naive.FLOAT_TYPES else QUANT_TOLERANCE
    with Engine(path, n_threads=n_threads) as engine:
        assert_close(logits(engine, IDS), wanted, tolerance)
        sequence = engine.new_sequence()
        rows = [engine.eval(sequence, [token])[0].copy() for token in IDS]
        assert_close(np.stack(rows), wanted, tolerance)


@pytest.mark.parametrize("options", MIXTURES.values(), ids=MIXTURES)
def test_mixed_types(tiny_model: Make, options: dict[str, Any]) -> None:
    path = tiny_model(**options)
    with Engine(path, n_threads=2) as engine:
        assert_close(logits(engine, IDS), naive.forward(path, IDS, kv_f16=True), QUANT_TOLERANCE)


@pytest.mark.parametrize("qtype", ["F32", "Q4_0", "Q4_K"])
@pytest.mark.parametrize("level", isa.available())
def test_levels(tiny_model: Make, monkeypatch: pytest.MonkeyPatch, level: str, qtype: str) -> None:
    """Every instruction-set level of this machine, as a prompt and as single tokens."""
    monkeypatch.setenv("HOTCOLD_ISA", level)
    path = tiny_model(qtype=qtype, sliding_window=7, **type_sizes(qtype))
    wanted = naive.forward(path, IDS, kv_f16=True)
    tolerance = FLOAT_TOLERANCE if qtype == "F32" else QUANT_TOLERANCE
    with Engine(path, n_threads=2) as engine:
        assert_close(logits(engine, IDS), wanted, tolerance)
        sequence = engine.new_sequence()
        rows = [engine.eval(sequence, [token])[0].copy() for token in IDS]
        assert_close(np.stack(rows), wanted, tolerance)


def swap_heads(model: naive.Model, name: str, order: list[int]) -> None:
    weight = model.tensors[name]
    model.tensors[name] = weight.reshape(len(order), -1, weight.shape[1])[order].reshape(weight.shape)


def wrong_group(model: naive.Model) -> None:
    """What an engine computes that gives head h the keys of h % n_head_kv instead of h // group."""
    order = [0, 2, 1, 3]
    swap_heads(model, "blk.0.attn_q.weight", order)
    output = model.tensors["blk.0.attn_output.weight"]
    model.tensors["blk.0.attn_output.weight"] = output.reshape(64, 4, -1)[:, order].reshape(output.shape)


MISTAKES: dict[str, tuple[dict[str, Any], Callable[[naive.Model], Any]]] = {
    "rope layout": ({}, lambda m: setattr(m.rope, "style", "neox")),
    "rope layout, neox": ({"arch": "qwen2"}, lambda m: setattr(m.rope, "style", "norm")),
    "rope base": ({}, lambda m: setattr(m.rope, "base", 9000.0)),
    "no linear scaling": ({"rope": RopeOptions("linear")}, lambda m: setattr(m.rope, "freq_scale", 1.0)),
    "yarn as linear": ({"rope": RopeOptions("yarn")}, lambda m: setattr(m.rope, "ext_factor", 0.0)),
    "yarn's original context": (LONG_YARN, lambda m: setattr(m.rope, "orig_ctx", 16384)),
    "yarn ramp": (LONG_YARN, lambda m: setattr(m.rope, "beta_fast", 8.0)),
    "attention factor": (
        {"rope": RopeOptions("yarn", attn_factor=1.3)},
        lambda m: setattr(m.rope, "attn_factor", 1.0),
    ),
    "no frequency factors": ({"rope": RopeOptions(freqs=True)}, lambda m: setattr(m.rope, "factors", None)),
    "window off by one": ({"sliding_window": 7}, lambda m: setattr(m, "window", 8)),
    "window forgotten": ({"sliding_window": 7}, lambda m: setattr(m, "window", 0)),
    "key heads swapped": ({}, lambda m: swap_heads(m, "blk.1.attn_k.weight", [1, 0])),
    "value heads swapped": ({}, lambda m: swap_heads(m, "blk.1.attn_v.weight", [1, 0])),
    "query heads swapped": ({}, lambda m: swap_heads(m, "blk.1.attn_q.weight", [1, 0, 2, 3])),
    "wrong group": ({}, wrong_group),
    "bias forgotten": ({"arch": "qwen2"}, lambda m: m.tensors.pop("blk.0.attn_v.bias")),
    "gate and up swapped": (
        {},
        lambda m: m.tensors.update(
            {
                "blk.0.ffn_gate.weight": m.tensors["blk.0.ffn_up.weight"],
                "blk.0.ffn_up.weight": m.tensors["blk.0.ffn_gate.weight"],
            }
        ),
    ),
    "norm epsilon": ({"eps": 1e-2}, lambda m: setattr(m, "eps", 1e-5)),
}


@pytest.mark.parametrize(("options", "spoil"), MISTAKES.values(), ids=MISTAKES)
def test_tolerance_catches_mistakes(
    tiny_model: Make, options: dict[str, Any], spoil: Callable[[naive.Model], Any]
) -> None:
    path = tiny_model(**options)
    wrong = naive.load(path, kv_f16=True)
    spoil(wrong)
    assert distance(wrong.forward(IDS), naive.forward(path, IDS, kv_f16=True)) > 20 * FLOAT_TOLERANCE


@pytest.mark.parametrize("pieces", [[1] * 40, [3, 1, 17, 19], [39, 1], [1, 39], [16, 16, 8], [33, 7]])
@pytest.mark.parametrize("qtype", ["F32", "Q4_0"])
def test_pieces_give_what_the_whole_gives(tiny_model: Make, pieces: list[int], qtype: str) -> None:
    path = tiny_model(qtype=qtype)
    tolerance = FLOAT_TOLERANCE if qtype == "F32" else QUANT_TOLERANCE
    with Engine(path, n_threads=2) as engine:
        wanted = logits(engine, IDS)
        sequence = engine.new_sequence()
        ends = np.cumsum(pieces)
        for start, end in zip(ends - pieces, ends, strict=True):
            last = engine.eval(sequence, IDS[start:end])
            assert last.shape == (1, engine.n_vocab)
            assert_close(last, wanted[end - 1 : end], tolerance)
        assert list(sequence.tokens) == IDS
        assert len(sequence) == len(IDS)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 600}, {"qtype": "Q4_0"}], ids=str)
def test_prompt_of_several_micro_batches(tiny_model: Make, options: dict[str, Any]) -> None:
    ids = np.random.default_rng(3).integers(0, 300, 1100).tolist()
    path = tiny_model(n_ctx_train=1200, n_layer=1, **options)
    tolerance = QUANT_TOLERANCE if "qtype" in options else FLOAT_TOLERANCE
    wanted = naive.forward(path, ids, kv_f16=True)
    with Engine(path, n_threads=2) as engine:
        assert_close(logits(engine, ids), wanted, tolerance)
        sequence = engine.new_sequence()
        assert_close(engine.eval(sequence, ids), wanted[-1:], tolerance)


@pytest.mark.parametrize("keep", [0, 1, 9, 16, 39, 40])
def test_truncate_and_continue(tiny_model: Make, keep: int) -> None:
    other = list(range(200, 230, 3))
    with Engine(tiny_model(), n_threads=2) as engine:
        wanted = logits(engine, IDS[:keep] + other)[keep:]
        sequence = engine.new_sequence()
        engine.eval(sequence, IDS)
        sequence.truncate(keep)
        assert list(sequence.tokens) == IDS[:keep]
        got = engine.eval(sequence, other, all_logits=True)
        assert list(sequence.tokens) == IDS[:keep] + other
        assert_close(got, wanted, FLOAT_TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"arch": "qwen2", "sliding_window": 7}], ids=str)
def test_sequences_do_not_mix(tiny_model: Make, options: dict[str, Any]) -> None:
    first, second = IDS, [299 - token for token in IDS[:25]]
    with Engine(tiny_model(**options), n_threads=2) as engine:
        wanted = {0: logits(engine, first), 1: logits(engine, second)}
        sequences = [engine.new_sequence(), engine.new_sequence()]
        for start in range(0, 25, 5):
            for which, ids in ((0, first), (1, second)):
                got = engine.eval(sequences[which], ids[start : start + 5], all_logits=True)
                assert_close(got, wanted[which][start : start + 5], FLOAT_TOLERANCE)
        sequences[1].close()
        assert_close(engine.eval(sequences[0], first[25:], all_logits=True), wanted[0][25:], FLOAT_TOLERANCE)


def test_closed_sequences_give_their_memory_back(tiny_model: Make) -> None:
    with Engine(tiny_model(), n_ctx=64, n_threads=1) as engine:
        wanted = logits(engine, IDS)
        engine_bytes = engine.kv_bytes
        for _ in range(20):
            assert np.array_equal(logits(engine, IDS), wanted)
        assert engine.kv_bytes == engine_bytes


def test_the_same_call_gives_the_same_bits(tiny_model: Make) -> None:
    path = tiny_model(qtype="Q4_K", **K_SIZES)
    with Engine(path, n_threads=2) as two, Engine(path, n_threads=1) as one:
        assert np.array_equal(logits(two, IDS), logits(two, IDS))
        assert_close(logits(one, IDS), logits(two, IDS), FLOAT_TOLERANCE)


def test_ids_may_be_an_array(tiny_model: Make) -> None:
    with Engine(tiny_model(), n_threads=1) as engine:
        sequence = engine.new_sequence()
        got = engine.eval(sequence, np.array(IDS, dtype=np.int64), all_logits=True)
        assert np.array_equal(got.copy(), logits(engine, IDS))

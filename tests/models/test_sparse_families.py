"""The sparse modes of every family.

What the last layer and the output make of a selection of neurons is computed in NumPy from what Engine.observe shows of
that layer; the layers before it are left whole. Modes that leave nothing out are compared with transformers' logits.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from bypasses import with_bypass
from checkpoints import copied
from families import BY_NAME, relative_error

from hotcold import Engine
from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import ParameterError
from hotcold.formats.gguf import GGUFFile
from hotcold.formats.section_file import Contents, SectionTensor, update_section
from hotcold.formats.types import GGMLType
from hotcold.solver import transpose
from hotcold.solver.convert import convert

MIXTURES = ("mixtral", "olmoe", "qwen3moe")
# Those that differ from another one only in attention or embeddings are left out.
SAME = ("falcon-7b", "gemma2-27b", "mistral", "phi3-longrope", "phi3-longrope-short", "qwen2")
DENSE = [name for name in BY_NAME if name not in (*MIXTURES, *SAME)]
ZEROS = ["arcee", "bamboo", "llama-relu", "nemotron", "opt"]
RANK = 32
Make = Callable[[str], Path]


def tensor(name: str, values: np.ndarray) -> SectionTensor:
    data = np.ascontiguousarray(values, np.float32).view(np.uint8)
    return SectionTensor(name, values.shape[::-1], GGMLType.F32, lambda: data)


class Last:
    """The last layer of a model, seen at work on a family's prompt, and the output after it; all in float64."""

    def __init__(self, path: Path, ids: np.ndarray) -> None:
        self.seen: dict[int, list[np.ndarray]] = {}
        with Engine(path, n_ctx=64, n_threads=1, sparsity="dense", use_section=False) as engine:

            def see(layer: int, *values: np.ndarray) -> None:
                self.seen[layer] = [np.array(value, np.float64) for value in values]

            engine.observe(engine.new_sequence(), ids, see)
            self.config, c = engine.config, engine.config
            self.layer = c.n_layer - 1
            self.tensors = {
                name: engine.file.dequantized(name).astype(np.float64)
                for name in (*(f"blk.{self.layer}.{each}" for each in c.tensors), *c.tensors)
                if name in engine.file
            }
        self.x, self.f, gate, up = self.seen[self.layer]
        self.act = naive.ACTIVATIONS[c.activation](gate)
        self.h = naive.glu(gate, up, c.activation)

    def bypass(self) -> np.ndarray:
        """What goes past the neurons."""
        made: np.ndarray = self.f @ self.tensor("ffn_bypass.weight").T + self.tensor("ffn_bypass.bias")
        return made

    def tensor(self, name: str) -> Any:
        return self.tensors.get(f"blk.{self.layer}.{name}", 0.0)

    def norm(self, x: np.ndarray, weight: Any, bias: Any) -> np.ndarray:
        if self.config.norm == "layer":
            x = x - x.mean(axis=1, keepdims=True)
        root = np.sqrt((x**2).mean(axis=1, keepdims=True) + self.config.norm_eps)
        return x / root * weight + bias

    def logits(self, on: np.ndarray) -> np.ndarray:
        """With these neurons, bool [n_tok, n_ff]."""
        return self.after(np.where(on, self.h, 0) @ self.tensor("ffn_down.weight").T + self.tensor("ffn_down.bias"))

    def after(self, out: np.ndarray) -> np.ndarray:
        """The logits that an output of the FFN leads to."""
        c = self.config
        if c.has("post_ffw_norm.weight"):
            out = self.norm(out, self.tensor("post_ffw_norm.weight"), 0.0)
        x = (self.x + out) * c.residual_scale
        y = self.norm(x, self.tensors["output_norm.weight"], self.tensors.get("output_norm.bias", 0.0))
        head = self.tensors["token_embd.weight" if c.tied_output else "output.weight"]
        found = y @ head.T * c.logit_scale
        return np.tanh(found / c.logit_softcap) * c.logit_softcap if c.logit_softcap else found


def run(path: Path, ids: np.ndarray, mode: str) -> tuple[np.ndarray, float]:
    """Logits of all tokens, evaluated as batches of many, few and one; and the density of the neurons."""
    rows, at, sizes = [], 0, [9, 1, 1, 2, 7, 1, 3]
    with Engine(path, n_ctx=64, n_threads=2, sparsity=mode) as engine:
        sequence = engine.new_sequence()
        for n in (*sizes, len(ids)):
            if part := ids[at : at + n].tolist():
                rows.append(np.array(engine.eval(sequence, part, all_logits=True)))
            at += n
        return np.concatenate(rows), engine.usage.density


class LastMixture(Last):
    """The same of a mixture of experts; what its FFN reads is taken from a copy whose last experts give zeros."""

    def __init__(self, path: Path, ids: np.ndarray, copy: Path) -> None:
        with GGUFFile(path) as file:
            c = self.config = ModelConfig.from_gguf(file)
            self.layer = c.n_layer - 1
            names = [*(f"blk.{self.layer}.{each}" for each in c.tensors), *c.tensors]
            self.tensors = {name: file.dequantized(name).astype(np.float64) for name in names if name in file}
            info = file.info(f"blk.{self.layer}.ffn_down_exps.weight")
        data = bytearray(path.read_bytes())
        data[info.offset : info.offset + info.nbytes] = bytes(info.nbytes)
        copy.write_bytes(data)
        with Engine(copy, n_ctx=64, n_threads=1) as engine:
            engine.eval(engine.new_sequence(), ids)
            buffers, n = engine._executor.tape.buffers, len(ids) * c.n_embd
            self.x, f = (buffers[name].view(np.float32)[:n].reshape(-1, c.n_embd).astype(np.float64) for name in "xf")
        gate, up = (np.einsum("tk,enk->ten", f, self.tensor(f"ffn_{part}_exps.weight")) for part in ("gate", "up"))
        self.act, self.h = naive.ACTIVATIONS[c.activation](gate), naive.glu(gate, up, c.activation)
        router = f @ self.tensor("ffn_gate_inp.weight").T
        shares = np.exp(router - router.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        least = np.sort(shares, axis=1)[:, -c.n_expert_used, None]
        self.weights = np.where(shares >= least, shares, 0)  # [n_tok, n_expert]
        if c.weights_norm:
            self.weights /= self.weights.sum(axis=1, keepdims=True)

    def logits(self, on: np.ndarray) -> np.ndarray:
        """With these neurons of the chosen experts, bool [n_tok, n_expert, expert_neurons]."""
        weighted = np.where(on, self.h, 0) * self.weights[:, :, None]
        return self.after(np.einsum("ten,ekn->tk", weighted, self.tensor("ffn_down_exps.weight")))


def with_section(path: Path, to: Path, *several: Contents) -> Path:
    shutil.copy(path, to)
    for contents in several:
        update_section(to, contents)
    return to


def down_t(path: Path) -> Contents:
    file = GGUFFile(path)
    return transpose.contents(file, Engine(path, n_ctx=8, n_threads=1).config)


def close(got: np.ndarray, wanted: np.ndarray, tolerance: float = 2e-3) -> None:
    error = np.abs(got - wanted).max(axis=1) / np.abs(wanted).max()
    assert error.max() < tolerance, error


@pytest.mark.parametrize("name", DENSE)
def test_the_oracle_is_transformers(family_file: Make, name: str) -> None:
    """With all neurons, what it makes of what observe shows are the family's logits."""
    family = BY_NAME[name]
    last = Last(family_file(name), family.prompt)
    assert relative_error(last.logits(np.ones_like(last.h, bool)), family.logits) < 2e-3
    c = last.config
    w, bias = (last.tensor(f"ffn_{'gate' if c.gated else 'up'}.{kind}") for kind in ("weight", "bias"))
    np.testing.assert_allclose(last.seen[last.layer][2], last.f @ w.T + bias, atol=1e-3 * np.abs(last.f).max())


@pytest.mark.parametrize("name", ZEROS)
@pytest.mark.parametrize("from_section", [False, True])
def test_exact_is_transformers(family_file: Make, tmp_path: Path, name: str, from_section: bool) -> None:
    family, path = BY_NAME[name], family_file(name)
    if from_section:
        path = with_section(path, tmp_path / "m.gguf", down_t(path))
    got, density = run(path, family.prompt, "exact")
    assert relative_error(got, family.logits) < 1e-3
    assert 0.1 < density < 0.9
    np.testing.assert_array_equal(run(path, family.prompt, "auto")[0], got)


def between(size: np.ndarray) -> float:
    """A threshold that leaves some 40 % of the neurons that are not zero; rounding does not matter there."""
    ordered = np.sort(size[size > 0])
    some = ordered[len(ordered) // 2 : len(ordered) * 2 // 3]
    gap = np.diff(some).argmax()
    return float(np.float32((some[gap] + some[gap + 1]) / 2))


def thresholds(limits: list[float]) -> Contents:
    table = np.array([limits], np.float32)
    return Contents({"hotcold.threshold.densities": [0.5]}, [tensor("ffn_thresholds", table)])


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("from_section", [False, True])
def test_threshold_drops_what_is_below(family_file: Make, tmp_path: Path, name: str, from_section: bool) -> None:
    last = Last(family_file(name), BY_NAME[name].prompt)
    size = np.abs(last.act)
    limit = between(size)
    parts = [thresholds([0.0] * last.layer + [limit]), *([down_t(family_file(name))] if from_section else [])]
    path = with_section(family_file(name), tmp_path / "m.gguf", *parts)
    wanted = last.logits(size >= limit)
    got, density = run(path, BY_NAME[name].prompt, "threshold=0.5")
    close(got, wanted)
    shares = [(size >= limit).mean()] + [1.0] * last.layer
    assert density == pytest.approx(np.mean(shares), abs=0.02)
    with pytest.raises(AssertionError):
        close(run(path, BY_NAME[name].prompt, "dense")[0], wanted)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts(family_file: Make, tmp_path: Path, name: str) -> None:
    family, path = BY_NAME[name], family_file(name)
    last = LastMixture(path, family.prompt, tmp_path / "zeroed.gguf")
    assert relative_error(last.logits(np.ones_like(last.h, bool)), family.logits) < 2e-3
    dense = run(path, family.prompt, "dense")[0]
    np.testing.assert_array_equal(run(path, family.prompt, "exact")[0], dense)
    size = np.abs(last.act)
    limit = between(size[last.weights > 0])
    with_limits = with_section(path, tmp_path / "m.gguf", thresholds([0.0] * last.layer + [limit]))
    wanted = last.logits(size >= limit)
    close(run(with_limits, family.prompt, "threshold=0.5")[0], wanted)
    with pytest.raises(AssertionError):
        close(dense, wanted)
    with pytest.raises(ParameterError, match="got predict, but .* is a mixture of experts"):
        Engine(path, n_ctx=8, sparsity="predict")


def predictors(last: Last, rng: np.random.Generator, input: str) -> tuple[Contents, np.ndarray]:
    """Random ones, which choose about half of the last layer's neurons and all of the others', and their scores there.

    Scores are less the cut, and NaN where rounding decides.
    """
    found, (n_ff, n_embd) = [], (last.h.shape[1], last.x.shape[1])
    for layer in range(last.layer + 1):
        a, b = rng.standard_normal((RANK, n_embd)), rng.standard_normal((n_ff, RANK))
        scores = np.maximum((last.x if input == "residual" else last.f) @ a.T, 0) @ b.T
        cut = np.median(scores, axis=0) if layer == last.layer else np.full(n_ff, -np.inf)
        found.append(tensor(f"blk.{layer}.ffn_pred_a.weight", a))
        found.append(tensor(f"blk.{layer}.ffn_pred_b.weight", b))
        found.append(tensor(f"blk.{layer}.ffn_pred_cut", cut))
    on = scores - cut.astype(np.float32)
    about = {"hotcold.predictor.kind": "relu", "hotcold.predictor.input": input}
    return Contents(about, found), np.where(np.abs(on) < 1e-4 * np.abs(scores).max(), np.nan, on)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("input", ["ffn_norm", "residual"])
def test_predict_computes_what_is_predicted(family_file: Make, tmp_path: Path, name: str, input: str) -> None:
    last = Last(family_file(name), BY_NAME[name].prompt)
    contents, on = predictors(last, np.random.default_rng(5), input)
    path = with_section(family_file(name), tmp_path / "m.gguf", contents)
    wanted = last.logits(on >= 0)
    got, density = run(path, BY_NAME[name].prompt, "predict")
    sure = ~np.isnan(on).any(axis=1)
    assert sure.mean() > 0.5
    close(got[sure], wanted[sure])
    assert density == pytest.approx(((on >= 0).mean() + last.layer) / (last.layer + 1), abs=0.03)


@pytest.mark.parametrize("name", DENSE)
def test_a_bypass(family_file: Make, tmp_path: Path, name: str) -> None:
    """In families with a norm after the FFN, parallel ones, and those without a gate: in dense and sparse modes."""
    ids, path = BY_NAME[name].prompt, with_bypass(family_file(name), tmp_path / "m.gguf")
    last = Last(path, ids)
    limit = between(np.abs(last.act))
    update_section(path, thresholds([0.0] * last.layer + [limit]))
    for mode, on in (("dense", np.ones_like(last.h, bool)), ("threshold=0.5", np.abs(last.act) >= limit)):
        neurons = np.where(on, last.h, 0) @ last.tensor("ffn_down.weight").T + last.tensor("ffn_down.bias")
        wanted = last.after(neurons + last.bypass())
        assert relative_error(last.after(neurons), wanted) > 0.02
        close(run(path, ids, mode)[0], wanted)


@pytest.mark.parametrize("sparsity", ["dense", "exact"])
def test_fatrelu_has_a_floor(tmp_path: Path, sparsity: str) -> None:
    """ProSparse's activation: of the prompt at once and token by token, against NumPy; a floor of zero is another."""
    family = BY_NAME["llama-relu"]
    folder = copied(family.folder, tmp_path / "fat", {"hidden_act": "fatrelu", "hidden_act_param": 0.25})
    path = convert(folder, tmp_path / "fat.gguf", "f32").path
    wanted = naive.forward(path, family.prompt.tolist(), kv_f16=True)
    assert relative_error(wanted, family.logits) > 0.02
    with Engine(path, n_ctx=64, n_threads=2, sparsity=sparsity) as engine:
        assert engine.config.activation == "relu" and set(engine.config.activation_floors) == {0.25}
        whole = engine.eval(engine.new_sequence(), family.prompt, all_logits=True).copy()
        sequence = engine.new_sequence()
        steps = np.concatenate([engine.eval(sequence, [id]).copy() for id in family.prompt])
        assert 0.05 < engine.usage.density < 0.6 or sparsity == "dense"
    for logits in (whole, steps):
        assert relative_error(logits, wanted) < 1e-3

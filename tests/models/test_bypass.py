"""A bypass beside the neurons, and floors by layer, against the NumPy forward pass: in every mode, all at once and not.

Tolerances are those of test_forward.py: RMS error over the spread of the oracle's logits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from adapters import make_adapter, matrices
from typer.testing import CliRunner

from hotcold import Engine, GGUFFile
from hotcold.formats.config import ModelConfig
from hotcold.formats.errors import FormatError, UnsupportedError
from hotcold.formats.section_file import Contents, SectionTensor, update_section
from hotcold.formats.types import GGMLType
from hotcold.runtime import limits
from hotcold.solver import neurons, profile, thresholds
from hotcold.solver.corpus import Corpus
from hotcold.solver.quantize import quantize
from hotcold.tools.cli import app

Make = Callable[..., Path]
IDS = list(range(5, 45))
N_LAYER, N_EMBD, N_FF, RANK = 2, 64, 96, 32
FLOORS = (0.1, 0.3)
RELU: dict[str, Any] = {"metadata": {"llama.hidden_activation": "relu"}, "bypass": True, "floors": FLOORS}


@dataclass
class Masked(naive.Model):
    """Neurons that a rule leaves out are zero: thresholds by layer, or predictors (a, b, cut) of f or the residual."""

    thresholds: list[float] = field(default_factory=list)
    predictors: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    residual_input: bool = False
    before_norm: Any = None
    active: list[float] = field(default_factory=list)
    chosen: Any = None

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        self.before_norm = x
        return super()._norm(name, x)

    def _ffn(self, layer: int, x: np.ndarray) -> np.ndarray:
        self.chosen = True
        if self.predictors:
            a, b, cut = self.predictors[layer]
            seen = self.before_norm if self.residual_input else x
            self.chosen = np.maximum(seen @ a.T, 0) @ b.T >= cut
        return super()._ffn(layer, x)

    def _hidden(self, layer: int, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        on = np.broadcast_to(self.chosen, gate.shape)
        if self.thresholds:
            on = on & (np.abs(naive.ACTIVATIONS[self.activation](gate)) >= self.thresholds[layer])
        h = np.where(on, super()._hidden(layer, gate, up), 0)
        self.active.append(float((h != 0).mean()))
        return h


def oracle(path: Path, **options: Any) -> Masked:
    return Masked(**vars(naive.load(path, kv_f16=True)), **options)


def ways(path: Path, sparsity: str, **options: Any) -> list[np.ndarray]:
    """Logits of IDS: as one prompt, in pieces down to single tokens, and in the last of three sequences at a time."""
    with Engine(path, n_ctx=64, n_threads=2, n_parallel=3, sparsity=sparsity, **options) as engine:
        found = []
        for pieces in ((40,), (9, 1, 1, 7, 2, 12, 3, 1, 4)):
            rows, at = [], 0
            with closing(engine.new_sequence()) as sequence:
                for n in pieces:
                    rows.append(np.array(engine.eval(sequence, IDS[at : at + n], all_logits=True)))
                    at += n
            found.append(np.concatenate(rows))
        together = [engine.new_sequence() for _ in range(3)]
        rows = []
        for token in IDS:
            rows.append(np.array(engine.eval_batch([(one, [token]) for one in together]))[2:])
        return [*found, np.concatenate(rows)]


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float((np.sqrt(((got - wanted) ** 2).mean(axis=1)) / wanted.std()).max())


def tensor(name: str, values: np.ndarray) -> SectionTensor:
    data = np.ascontiguousarray(values, np.float32)
    return SectionTensor(name, values.shape[::-1], GGMLType.F32, lambda: data.view(np.uint8))


def with_section(path: Path, to: Path, contents: Contents) -> Path:
    shutil.copy(path, to)
    update_section(to, contents)
    return to


def without(model: naive.Model, layer: int, *names: str) -> naive.Model:
    for name in names:
        del model.tensors[f"blk.{layer}.{name}"]
    return model


@pytest.mark.parametrize("sparsity", ["dense", "exact"])
def test_bypass_and_floors(tiny_model: Make, sparsity: str) -> None:
    path = tiny_model(**RELU)
    model = oracle(path)
    wanted = model.forward(IDS)
    assert 0.2 < np.mean(model.active) < 0.6
    for got in ways(path, sparsity):
        assert error(got, wanted) < 5e-4
    # each of the parts counts
    assert error(without(oracle(path), 1, "ffn_bypass.bias").forward(IDS), wanted) > 0.02
    assert error(without(oracle(path), 1, "ffn_bypass.weight", "ffn_bypass.bias").forward(IDS), wanted) > 0.02
    for floors in ([0.1, 0.1], [0.3, 0.3], [0.0, 0.3]):
        changed = oracle(path)
        changed.floors = floors
        assert error(changed.forward(IDS), wanted) > 5e-3


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("load", ["mmap", "copy"])
def test_quantised_weights(tiny_model: Make, kind: str, load: str) -> None:
    path = tiny_model(qtype=kind, **RELU)
    wanted = oracle(path).forward(IDS)
    for got in ways(path, "exact", load=load):
        assert error(got, wanted) < 0.06


@pytest.mark.parametrize("input", ["ffn_norm", "residual"])
def test_predictors_choose_neurons_only(tiny_model: Make, tmp_path: Path, input: str) -> None:
    """The bypass is there whatever they say, and has not changed the residual yet where they look at that."""
    rng, found, values = np.random.default_rng(3), [], []
    for layer in range(N_LAYER):
        own = rng.standard_normal((RANK, N_EMBD)), rng.standard_normal((N_FF, RANK)), rng.standard_normal(N_FF)
        for name, part in zip(("a.weight", "b.weight", "cut"), own, strict=True):
            found.append(tensor(f"blk.{layer}.ffn_pred_{name}", part))
        values.append(own)
    about = {"hotcold.predictor.kind": "relu", "hotcold.predictor.input": input}
    path = with_section(tiny_model(**RELU), tmp_path / "m.gguf", Contents(about, found))
    model = oracle(path, predictors=values, residual_input=input == "residual")
    wanted = model.forward(IDS)
    assert 0.05 < np.mean(model.active) < 0.4
    for got in ways(path, "predict"):
        assert error(got, wanted) < 2e-3


def test_a_predictor_that_says_yes_to_all_is_exact(tiny_model: Make, tmp_path: Path) -> None:
    found = []
    for layer in range(N_LAYER):
        parts = {"a.weight": np.zeros((RANK, N_EMBD)), "b.weight": np.zeros((N_FF, RANK)), "cut": np.full(N_FF, -1.0)}
        found += [tensor(f"blk.{layer}.ffn_pred_{name}", part) for name, part in parts.items()]
    about = {"hotcold.predictor.kind": "relu", "hotcold.predictor.input": "ffn_norm"}
    path = with_section(tiny_model(**RELU), tmp_path / "m.gguf", Contents(about, found))
    wanted = oracle(path).forward(IDS)
    for got in ways(path, "predict"):
        assert error(got, wanted) < 5e-4


def test_thresholds_of_a_swiglu_model(tiny_model: Make, tmp_path: Path) -> None:
    contents = Contents({"hotcold.threshold.densities": [0.5]}, [tensor("ffn_thresholds", np.array([[0.16, 0.2]]))])
    path = with_section(tiny_model(bypass=True), tmp_path / "m.gguf", contents)
    model = oracle(path, thresholds=[0.16, 0.2])
    wanted = model.forward(IDS)
    assert 0.1 < np.mean(model.active) < 0.9
    for got in ways(path, "threshold=0.5"):
        assert error(got, wanted) < 2e-3
    assert error(ways(path, "dense")[0], wanted) > 0.02


def test_floors_hold_where_thresholds_are_lower(tiny_model: Make, tmp_path: Path) -> None:
    contents = Contents({"hotcold.threshold.densities": [0.5]}, [tensor("ffn_thresholds", np.array([[0.2, 0.2]]))])
    path = with_section(tiny_model(**RELU), tmp_path / "m.gguf", contents)
    wanted = oracle(path, thresholds=[0.2, 0.3]).forward(IDS)
    for got in ways(path, "threshold=0.5"):
        assert error(got, wanted) < 2e-3


@pytest.mark.parametrize("floors", [FLOORS, (0.0, 0.3)])
def test_threads_meet_no_oftener(tiny_model: Make, floors: tuple[float, float]) -> None:
    """The bypass is computed beside what takes less than a whole pass of the threads."""
    meetings = []
    for bypass in (False, True):
        path = tiny_model(**(RELU | {"bypass": bypass, "floors": floors}))
        for sparsity in ("dense", "exact"):
            with Engine(path, n_ctx=64, n_threads=1, sparsity=sparsity) as engine:
                meetings.append(int(engine._executor.tape.rows[:, 2].sum()))
    assert meetings[:2] == meetings[2:]


# --- the offline half ---


def test_what_is_observed_has_no_bypass_yet(tiny_model: Make) -> None:
    """Residual, normed input, gates: what predictors are trained on; and the count of active neurons has the floors."""
    path, seen = tiny_model(**RELU), []
    rule = neurons.exact("relu", FLOORS)
    active: list[float] = []

    def see(layer: int, x: np.ndarray, f: np.ndarray, gate: np.ndarray, up: np.ndarray) -> None:
        weight = naive.load(path).tensors[f"blk.{layer}.ffn_norm.weight"]
        np.testing.assert_allclose(naive.rmsnorm(x.astype(np.float64), weight, 1e-5), f, rtol=1e-3, atol=1e-3)
        active.append(float(rule.active(layer, gate).mean()))
        seen.append(layer)

    with Engine(path, n_ctx=64, n_threads=2, sparsity="dense") as engine:
        engine.observe(engine.new_sequence(), IDS, see)
    model = oracle(path)
    model.forward(IDS)
    assert seen == [0, 1]
    np.testing.assert_allclose(active, model.active, atol=1e-3)


def test_floors_of_the_rule() -> None:
    gate = np.array([[-1.0, 0.0, 0.05, 0.2, 0.5]], np.float32)
    assert neurons.exact("relu").active(0, gate).tolist() == [[False, False, True, True, True]]
    rule = neurons.exact("relu", FLOORS)
    assert rule.active(0, gate).tolist() == [[False, False, False, True, True]]
    assert rule.active(1, gate).tolist() == [[False, False, False, False, True]]
    squared = neurons.exact("relu2", FLOORS)
    assert squared.active(0, gate).tolist() == [[False, False, False, False, True]]
    up = np.full_like(gate, 2)
    assert neurons.hidden("relu", gate, up, 0.3).tolist() == [[0, 0, 0, 0, 1]]
    with pytest.raises(Exception, match="wanted --threshold"):
        neurons.exact("silu", FLOORS)


def test_a_kept_count_is_of_its_floors(tiny_model: Make) -> None:
    text = Corpus("x", np.arange(9, dtype=np.int32), None)
    with GGUFFile(tiny_model(**RELU)) as file:
        names = {profile.kept_name(file, text, neurons.exact("relu", floors)) for floors in ((), FLOORS, (0.1, 0.2))}
    assert len(names) == 3


def test_neurons_below_their_floor_cost_nothing_to_drop(tiny_model: Make) -> None:
    with Engine(tiny_model(**RELU), n_ctx=64, n_threads=1, sparsity="dense") as engine:
        text = Corpus("x", np.array(IDS, np.int32), None)
        found = thresholds.collect(engine, text, np.ones((N_LAYER, N_FF), np.float32))
    for layer, floor in enumerate(FLOORS):
        first = int(thresholds._bins(np.array([floor]))[0])
        assert found.count[layer, 1:first].sum() > 0 and found.error[layer, :first].sum() == 0
        assert found.error[layer, first:].sum() > 0


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_bytes_of_a_step(tiny_model: Make, mode: str) -> None:
    """The bypass is read always, with the FFN's other weights."""
    found = []
    for bypass in (False, True):
        with Engine(tiny_model(**(RELU | {"bypass": bypass})), n_ctx=64, n_threads=1, sparsity=mode) as engine:
            engine.eval(engine.new_sequence(), [1])
            usage = engine.usage
            listed = usage.active * 2 * N_EMBD * 4 if mode == "exact" else N_LAYER * 2 * N_FF * N_EMBD * 4
            assert usage.ffn_bytes == listed + N_LAYER * N_EMBD * (N_FF + bypass * N_EMBD) * 4
            found.append((limits.bytes_outside_ffn(engine), usage.dense_bytes))
    assert found[0][0] == found[1][0]
    assert found[1][1] - found[0][1] == N_LAYER * N_EMBD * N_EMBD * 4


# --- files ---


def test_a_bypass_is_quantised_as_ffn_down_is(tiny_model: Make, tmp_path: Path) -> None:
    source, out = (
        tiny_model(qtype="F16", n_layer=4, n_embd=256, n_ff=512, **(RELU | {"floors": (0.1,) * 4})),
        tmp_path / "o",
    )
    quantize(source, out, "Q4_K_M")
    with GGUFFile(out) as file:
        types = {name: info.type.name for name, info in file.tensors.items()}
        assert ModelConfig.from_gguf(file).activation_floors == pytest.approx((0.1,) * 4)
    for layer in range(4):
        assert types[f"blk.{layer}.ffn_bypass.weight"] == types[f"blk.{layer}.ffn_down.weight"]
        assert types[f"blk.{layer}.ffn_bypass.bias"] == "F32"
    assert {types[f"blk.{layer}.ffn_bypass.weight"] for layer in range(4)} == {"Q4_K", "Q6_K"}
    wanted = oracle(out).forward(IDS)
    for got in ways(out, "exact"):
        assert error(got, wanted) < 0.06


@pytest.mark.parametrize("sparsity", ["auto", "exact", "dense"])
def test_adapters_of_the_bypass(tiny_model: Make, tmp_path: Path, sparsity: str) -> None:
    """It is dense whatever the neurons are, so sparse modes stay."""
    path, adapter = tiny_model(**RELU), tmp_path / "adapter.gguf"
    added = make_adapter(adapter, matrices(path, ["ffn_bypass"]))
    model = oracle(path)
    plain = model.forward(IDS)
    for name, change in added.items():
        model.tensors[name] = model.tensors[name] + change
    wanted = model.forward(IDS)
    assert len(added) == N_LAYER and error(plain, wanted) > 0.02
    for got in ways(path, sparsity, lora=[adapter]):
        assert error(got, wanted) < 1e-3
    with Engine(path, n_ctx=64, sparsity=sparsity, lora=[adapter]) as engine:
        assert (engine.plan is None) == (sparsity == "dense")


def test_what_a_file_must_have(tiny_model: Make) -> None:
    with GGUFFile(tiny_model(**RELU)) as file:
        config = ModelConfig.from_gguf(file)
        assert config.has("ffn_bypass.weight") and config.has("ffn_bypass.bias")
        assert config.activation_floors == pytest.approx(FLOORS)
        whole, key = dict(file.tensors), "llama.hidden_activation_threshold"
        for layer in range(N_LAYER):
            file.tensors.pop(f"blk.{layer}.ffn_bypass.bias")
        config = ModelConfig.from_gguf(file)
        assert config.has("ffn_bypass.weight") and not config.has("ffn_bypass.bias")
        for layer in range(N_LAYER):
            for part in ("weight", "bias"):
                file.tensors.clear()
                file.tensors |= whole
                del file.tensors[f"blk.{layer}.ffn_bypass.{part}"]
                with pytest.raises(FormatError, match=f"'blk.{layer}.ffn_bypass.{part}': got no such tensor"):
                    ModelConfig.from_gguf(file)
        for name, wrong in (("weight", "blk.0.ffn_gate.weight"), ("bias", "blk.0.ffn_gate.weight")):
            file.tensors |= whole | {f"blk.1.ffn_bypass.{name}": whole[wrong]}
            with pytest.raises(
                FormatError, match=rf"'blk.1.ffn_bypass.{name}': got shape \(64, 96\), wanted shape \(64"
            ):
                ModelConfig.from_gguf(file)
        file.tensors |= whole
        for values, said in (
            ([0.1], "got 1 values, wanted one for each of 2 layers"),
            ([0.1, 0.2, 0.3], "got 3 values, wanted one for each of 2 layers"),
            ([0.1, -0.2], "wanted numbers from 0 to"),
            ([0.1, np.nan], "wanted numbers from 0 to"),
            ([0.1, np.inf], "wanted numbers from 0 to"),
        ):
            file.metadata[key] = np.array(values, np.float32)
            with pytest.raises(FormatError, match=f"'{key}': got .*{said}" if "wanted n" in said else said):
                ModelConfig.from_gguf(file)
        file.metadata[key] = np.array([1, 2], np.int32)
        with pytest.raises(FormatError, match="wanted numbers from 0 to"):
            ModelConfig.from_gguf(file)
        file.metadata[key] = 0.5
        assert ModelConfig.from_gguf(file).activation_floors == (0.5, 0.5)
        file.metadata[key] = ["0.5", "0.5"]
        with pytest.raises(FormatError, match=key):
            ModelConfig.from_gguf(file)
        del file.metadata[key]
        assert ModelConfig.from_gguf(file).activation_floors == (0.0, 0.0)


def test_one_layer_of_many_has_it(tiny_model: Make) -> None:
    """The error is about that tensor, not about the number of layers."""
    with GGUFFile(tiny_model(n_layer=12, bypass=True)) as file:
        for layer in range(11):
            for part in ("weight", "bias"):
                del file.tensors[f"blk.{layer}.ffn_bypass.{part}"]
        with pytest.raises(FormatError, match="'blk.0.ffn_bypass.weight': got no such tensor"):
            ModelConfig.from_gguf(file)


def test_not_beside_experts(tiny_model: Make) -> None:
    with GGUFFile(tiny_model(bypass=True)) as dense, GGUFFile(tiny_model(n_expert=4)) as file:
        file.tensors |= {name: info for name, info in dense.tensors.items() if "bypass" in name}
        with pytest.raises(UnsupportedError, match="a bypass .ffn_bypass. beside experts is not supported"):
            ModelConfig.from_gguf(file)


def test_inspect_says_it(tiny_model: Make) -> None:
    def ffn(path: Path) -> str:
        result = CliRunner().invoke(app, ["inspect", str(path), "--json"])
        assert result.exit_code == 0, result.output
        text: str = json.loads(result.output)["model"]["features"]["FFN"]
        return text

    assert ffn(tiny_model(**RELU)) == (
        "96 neurons; ReLU, gated, 0 below 0.1 to 0.3 by layer; zeros are skipped (--sparsity exact); "
        "a dense bypass beside them, with a bias"
    )
    text = ffn(tiny_model(**(RELU | {"bypass": False, "floors": (0.2, 0.2)})))
    assert "gated, 0 below 0.2;" in text and "bypass" not in text

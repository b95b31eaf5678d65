"""The sparse modes against a NumPy forward pass that masks neurons, on tiny models with and without a section.

Tolerances are those of test_forward.py: RMS error over the spread of the oracle's logits, 5e-4 for float weights and
0.06 for quantised ones, which the oracle does not round activations for.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from hotcold import LLM, Engine
from hotcold.formats.errors import ParameterError
from hotcold.formats.section_file import Contents, SectionTensor, update_section
from hotcold.formats.types import GGMLType
from hotcold.runtime.sparsity import Sparsity

IDS = list(range(5, 45))
RELU = {"llama.hidden_activation": "relu"}
N_LAYER, N_EMBD, N_FF, RANK = 2, 64, 96, 32
QUANTS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
MakeModel = Callable[..., Path]


@dataclass
class Masked(naive.Model):
    """Neurons that a rule leaves out are zero; down_t, where given, stands for ffn_down."""

    thresholds: list[float] = field(default_factory=list)
    predictors: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)  # a, b, cut
    down_t: list[np.ndarray] = field(default_factory=list)
    residual_input: bool = False
    rectified: bool = True
    active: list[float] = field(default_factory=list)
    before_norm: Any = None

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        self.before_norm = x
        return super()._norm(name, x)

    def _ffn(self, layer: int, x: np.ndarray) -> np.ndarray:
        residual = self.before_norm
        gate, up = self._linear(f"blk.{layer}.ffn_gate", x), self._linear(f"blk.{layer}.ffn_up", x)
        h = naive.glu(gate, up, self.activation)
        act = naive.ACTIVATIONS[self.activation](gate)
        on = act != 0
        if self.thresholds:
            on = np.abs(act) >= self.thresholds[layer]
        if self.predictors:
            a, b, cut = self.predictors[layer]
            r = (residual if self.residual_input else x) @ a.T
            on = (np.maximum(r, 0) if self.rectified else r) @ b.T >= cut
        self.active.append(float(on.mean()))
        h = np.where(on, h, 0)
        return h @ self.down_t[layer] if self.down_t else self._linear(f"blk.{layer}.ffn_down", h)


def oracle(path: Path, **options: Any) -> Masked:
    return Masked(**vars(naive.load(path, kv_f16=True)), **options)


def logits(path: Path, sparsity: str, n_threads: int = 2, **options: Any) -> np.ndarray:
    """Logits of IDS, evaluated as batches of many tokens, few tokens and one token."""
    with Engine(path, n_ctx=64, n_threads=n_threads, sparsity=sparsity, **options) as engine:
        sequence, rows, at = engine.new_sequence(), [], 0
        for n in (9, 1, 1, 7, 2, 12, 3, 1, 4):
            rows.append(np.array(engine.eval(sequence, IDS[at : at + n], all_logits=True)))
            at += n
    assert at == len(IDS)
    return np.concatenate(rows)


def assert_near(got: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    error = np.sqrt(((got - wanted) ** 2).mean(axis=1)) / wanted.std()
    assert error.max() < tolerance, error


def raw(values: np.ndarray, kind: str) -> np.ndarray:
    return np.ascontiguousarray(quants.quantize(values, GGMLQuantizationType[kind])).view(np.uint8)


def tensor(name: str, values: np.ndarray, kind: str = "F32") -> SectionTensor:
    """A section's tensor from float32 values in NumPy's order."""
    data = raw(values.astype(np.float32), kind)
    return SectionTensor(name, values.shape[::-1], GGMLType[kind], lambda: data)


def with_section(path: Path, to: Path, contents: Contents) -> Path:
    shutil.copy(path, to)
    update_section(to, contents)
    return to


def down_t_contents(path: Path, kind: str) -> tuple[Contents, list[np.ndarray]]:
    """ffn_down_t of a type, made from the model's ffn_down, and the values that it stands for."""
    model = naive.load(path)
    found, values = [], []
    for layer in range(model.n_layer):
        down = np.ascontiguousarray(model.tensors[f"blk.{layer}.ffn_down.weight"].T)
        found.append(tensor(f"blk.{layer}.ffn_down_t.weight", down, kind))
        values.append(naive.dequantize(raw(down.astype(np.float32), kind), GGMLQuantizationType[kind]).astype(float))
    return Contents({}, found), values


def k_sizes(kind: str) -> dict[str, Any]:
    return {"n_embd": 256, "n_ff": 512} if kind.endswith("_K") else {}


# --- exact ---


@pytest.mark.parametrize("activation", ["relu", "relu2", "drelu"])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_exact_is_dense(tiny_model: MakeModel, activation: str, n_threads: int) -> None:
    path = tiny_model(metadata={"llama.hidden_activation": activation})
    model = oracle(path)
    wanted = model.forward(IDS)
    assert 0.3 < np.mean(model.active) < 0.7
    assert_near(logits(path, "exact", n_threads), wanted, 5e-4)
    np.testing.assert_array_equal(logits(path, "auto", n_threads), logits(path, "exact", n_threads))


@pytest.mark.parametrize("kind", ["F16", "BF16", *QUANTS])
def test_exact_of_every_type(tiny_model: MakeModel, kind: str) -> None:
    path = tiny_model(qtype=kind, metadata=RELU, **k_sizes(kind))
    assert_near(logits(path, "exact"), oracle(path).forward(IDS), 0.06 if kind in QUANTS else 5e-4)


@pytest.mark.parametrize("sizes", [{"n_embd": 96, "n_head": 3, "n_head_kv": 1, "n_ff": 37}, {"n_embd": 40, "n_ff": 5}])
def test_exact_of_odd_sizes(tiny_model: MakeModel, sizes: dict[str, int]) -> None:
    path = tiny_model(metadata=RELU, **sizes)
    assert_near(logits(path, "exact"), oracle(path).forward(IDS), 5e-4)


def test_qwen2_too(tiny_model: MakeModel) -> None:
    path = tiny_model(arch="qwen2", metadata={"qwen2.hidden_activation": "relu"})
    assert_near(logits(path, "exact"), oracle(path).forward(IDS), 5e-4)


def test_the_same_for_any_number_of_threads(tiny_model: MakeModel) -> None:
    path = tiny_model(qtype="Q4_0", metadata=RELU)
    one = logits(path, "exact", 1)
    for n_threads in (2, 5):
        np.testing.assert_array_equal(logits(path, "exact", n_threads), one)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("mode", ["exact", "dense"])
def test_a_sections_down_t_serves_both_modes(tiny_model: MakeModel, tmp_path: Path, kind: str, mode: str) -> None:
    """Rounded far more coarsely than ffn_down, so that it shows which of the two was used."""
    plain = tiny_model(metadata=RELU, n_ff=96)
    contents, values = down_t_contents(plain, kind)
    path = with_section(plain, tmp_path / "m.gguf", contents)
    wanted = oracle(path, down_t=values).forward(IDS)
    got = logits(path, mode)
    assert_near(got, wanted, 0.02 if kind in QUANTS else 5e-4)  # panels of many tokens are rounded to 8 bits
    if kind in ("Q4_0", "Q4_1"):
        with pytest.raises(AssertionError):
            assert_near(logits(path, mode, use_section=False), wanted, 0.02)


# --- threshold ---


def thresholds(values: list[list[float]], densities: list[float]) -> Contents:
    table = np.array(values, np.float32)
    return Contents({"hotcold.threshold.densities": densities}, [tensor("ffn_thresholds", table)])


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_threshold_drops_what_is_below(tiny_model: MakeModel, tmp_path: Path, activation: str) -> None:
    plain = tiny_model(metadata={"llama.hidden_activation": activation})
    # no gate of these models is so near to one of them that float32 rounding decides
    path = with_section(plain, tmp_path / "m.gguf", thresholds([[0.16, 0.2], [0.3, 0.4]], [0.5, 0.25]))
    for density, chosen in ((0.5, [0.16, 0.2]), (0.25, [0.3, 0.4]), (0.375, [0.23, 0.3])):
        model = oracle(path, thresholds=chosen)
        wanted = model.forward(IDS)
        assert 0.05 < np.mean(model.active) < 0.9
        assert_near(logits(path, f"threshold={density}"), wanted, 2e-3)
        with pytest.raises(AssertionError):
            assert_near(logits(path, "dense"), wanted, 2e-3)


def test_threshold_with_quantised_weights(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Rounded gates fall on other sides of a threshold, so only the number of active neurons is checked closely."""
    path = with_section(tiny_model(qtype="Q4_0"), tmp_path / "m.gguf", thresholds([[0.2, 0.2]], [0.5]))
    model = oracle(path, thresholds=[0.2, 0.2])
    assert_near(logits(path, "threshold=0.5"), model.forward(IDS), 0.15)
    with Engine(path, n_ctx=64, sparsity="threshold=0.5") as engine:
        engine.eval(engine.new_sequence(), IDS)
        assert abs(engine.usage.density - np.mean(model.active)) < 0.02


# --- predict ---


def predictors(rng: np.random.Generator, kind: str, about: dict[str, str]) -> tuple[Contents, list[Any]]:
    found, values = [], []
    for layer in range(N_LAYER):
        a, b = rng.standard_normal((RANK, N_EMBD)), rng.standard_normal((N_FF, RANK))
        cut = rng.standard_normal(N_FF)
        found.append(tensor(f"blk.{layer}.ffn_pred_a.weight", a, kind))
        found.append(tensor(f"blk.{layer}.ffn_pred_b.weight", b, kind))
        found.append(tensor(f"blk.{layer}.ffn_pred_cut", cut))
        values.append((a, b, cut.astype(np.float32)))
    about = {"kind": "relu", "input": "ffn_norm"} | about
    return Contents({f"hotcold.predictor.{name}": value for name, value in about.items()}, found), values


@pytest.mark.parametrize("about", [{}, {"kind": "dejavu"}, {"input": "residual"}])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_predict_computes_what_is_predicted(
    tiny_model: MakeModel, tmp_path: Path, activation: str, about: dict[str, str]
) -> None:
    plain = tiny_model(metadata={"llama.hidden_activation": activation})
    contents, values = predictors(np.random.default_rng(3), "F32", about)
    path = with_section(plain, tmp_path / "m.gguf", contents)
    rules = {"residual_input": "input" in about, "rectified": "kind" not in about}
    model = oracle(path, predictors=values, **rules)
    wanted = model.forward(IDS)
    assert 0.2 < np.mean(model.active) < 0.8
    assert_near(logits(path, "predict"), wanted, 2e-3)
    with Engine(path, n_ctx=64, sparsity="predict") as engine:
        sequence = engine.new_sequence()
        for token in IDS:
            engine.eval(sequence, [token])
        assert abs(engine.usage.density - np.mean(model.active)) < 1e-3
        usage, plan = engine.usage, engine.plan
        assert plan is not None and plan.predictor
        assert 0 < usage.predictor_share < 1 or usage.ticks == 0


def test_quantised_predictors(tiny_model: MakeModel, tmp_path: Path) -> None:
    contents, values = predictors(np.random.default_rng(4), "Q8_0", {})
    path = with_section(tiny_model(qtype="Q8_0", metadata=RELU), tmp_path / "m.gguf", contents)
    wanted = oracle(path, predictors=values).forward(IDS)
    error = np.sqrt(((logits(path, "predict") - wanted) ** 2).mean(axis=1)) / wanted.std()
    assert np.median(error) < 0.06  # where a score is near its cut, rounding decides, so a few tokens are far off


# --- usage ---


def test_usage_counts_neurons_and_bytes(tiny_model: MakeModel) -> None:
    path = tiny_model(metadata=RELU)
    matrix = N_EMBD * N_FF * 4
    with Engine(path, n_ctx=64, sparsity="exact") as engine:
        sequence = engine.new_sequence()
        engine.eval(sequence, IDS[:9])
        before = engine.usage
        assert (before.steps, before.places) == (1, 9 * N_LAYER * N_FF)
        assert before.ffn_bytes == before.dense_bytes == 3 * N_LAYER * matrix  # many tokens: everything
        for token in IDS[9:12]:
            engine.eval(sequence, [token])
        used = engine.usage - before
        assert used.predictor_share == 0
        assert (used.steps, used.places, used.dense_bytes) == (3, 3 * N_LAYER * N_FF, 9 * N_LAYER * matrix)
        assert used.ffn_bytes == (3 * N_LAYER * N_FF + 2 * used.active) * N_EMBD * 4
        model = oracle(path)
        model.forward(IDS[:12])
        assert before.active > 0 and abs(used.density - np.mean(model.active)) < 0.15
    with Engine(path, n_ctx=64, sparsity="dense") as engine:
        engine.eval(engine.new_sequence(), IDS)
        assert (engine.usage.density, engine.usage.byte_share, engine.usage.steps) == (1.0, 1.0, 1)


def test_an_answer_says_what_it_read(tiny_model: MakeModel) -> None:
    with LLM(tiny_model(metadata=RELU), n_ctx=64) as llm:
        llm.generate("hello", max_tokens=5, temperature=0)
        usage = llm.stats().usage
        assert usage is not None and usage.steps == llm.stats().decode_steps
        assert 0.2 < usage.density < 0.8 and usage.byte_share < 0.9


# --- bad input ---


@pytest.mark.parametrize("text", ["", "sparse", "threshold", "threshold=", "threshold=0", "threshold=2", "dense=1"])
def test_modes_that_are_none(text: str) -> None:
    with pytest.raises(ParameterError, match="sparsity: got"):
        Sparsity.parse(text)


def test_a_mode_reads_back_as_written() -> None:
    for text in ("auto", "dense", "exact", "predict", "threshold=0.35"):
        assert str(Sparsity.parse(text)) == text


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("exact", "silu is never zero"),
        ("threshold=0.5", "has no thresholds; `hotcold sparsify` makes them"),
        ("predict", "has no predictors; `hotcold train-predictor` makes them"),
    ],
)
def test_what_a_model_does_not_have(tiny_model: MakeModel, mode: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Engine(tiny_model(), n_ctx=64, sparsity=mode)


def test_a_density_below_all_that_the_section_knows(tiny_model: MakeModel, tmp_path: Path) -> None:
    path = with_section(tiny_model(), tmp_path / "m.gguf", thresholds([[0.1, 0.1]], [0.5]))
    with pytest.raises(ParameterError, match="wanted at least 0.5"):
        Engine(path, n_ctx=64, sparsity="threshold=0.3")


def test_observe_needs_a_dense_engine(tiny_model: MakeModel) -> None:
    with Engine(tiny_model(metadata=RELU), n_ctx=64) as engine, pytest.raises(ParameterError, match="dense engine"):
        engine.observe(engine.new_sequence(), IDS, lambda *_: None)
